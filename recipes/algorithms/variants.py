"""What beside_grpo.py runs beside GRPO."""

from typing import Any

from rl.algorithms import ALGORITHMS

GRPO = ALGORITHMS["grpo"].settings
PLAIN = ALGORITHMS["importance_sampling"].settings  # clips nothing, so that what goes wrong is seen
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
    "off_policy": {
        "synchronous": (GRPO, {}),
        "1 step off-policy": (GRPO | {"max_steps_off_policy": "1"}, {}),
        "2 steps off-policy": (GRPO | {"max_steps_off_policy": "2"}, {}),
        "4 steps off-policy": (GRPO | {"max_steps_off_policy": "4"}, {}),
        "8 steps off-policy": (GRPO | {"max_steps_off_policy": "8"}, {}),
    },
    "faults": {
        "as it should be": (PLAIN, {}),
        "weights 8 steps old": (PLAIN | {"max_steps_off_policy": "8"}, {}),
        "the same, without their correction": (PLAIN | {"max_steps_off_policy": "8", "loss_fn": "reinforce"}, {}),
        "bfloat16": (PLAIN, HALF),
        "temperature 0.3": (PLAIN | {"temperature": "0.3"}, {}),
        "learning rate 10 times as high": (PLAIN | {"learning_rate": "3e-3"}, {}),
    },
}
# Metrics of the runs that are drawn beside their held-out accuracy.
GAP = "optim/logprob_gap_mean"
DRAWN = {
    "off_policy": [GAP],
    "faults": [GAP, "optim/ratio_p99", "optim/entropy", "optim/grad_norm", "env/all/by_group/frac_mixed"],
}
