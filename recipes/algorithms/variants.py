"""What beside_grpo.py runs beside GRPO, and the folders of the runs."""

from typing import Any

from rl.algorithms import ALGORITHMS

GRPO = ALGORITHMS["grpo"].settings
HALF = {"dtype": "bfloat16"}
# Options of RL and of its backend. With one step per batch GSPO's ratio is 1, and it is GRPO.
VARIANTS: dict[str, dict[str, tuple[dict[str, str], dict[str, Any]]]] = {
    "algorithms": {
        "grpo": (GRPO, {}),
        "dynamic sampling": (GRPO | {"max_refills": "4"}, {}),
        "critic": (ALGORITHMS["ppo_critic"].settings | {"num_substeps": "1"}, {}),
        "grpo, 4 steps a batch": (GRPO | {"num_substeps": "4"}, {}),
        "gspo, 4 steps a batch": (ALGORITHMS["gspo"].settings | {"num_substeps": "4"}, {}),
    },
    "precision": {
        "float32": (GRPO, {}),
        "8-bit moments": (GRPO, {"moments": "8bit"}),
        "bfloat16, float32 masters": (GRPO, HALF),
        "bfloat16, masters, 8-bit moments": (GRPO, HALF | {"moments": "8bit"}),
        "bfloat16, stochastic rounding": (GRPO, HALF | {"master_weights": False}),
    },
}


def folder_name(variant: str) -> str:
    return variant.replace(",", "").replace(" ", "_")
