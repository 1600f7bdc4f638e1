"""Block `trainer`: every kind of pass in the GPU's dtype against fp32 on the CPU. On a CPU: bf16
against fp32.
"""

from collections.abc import Callable
from unittest.mock import patch

import chz
import numpy as np
import torch

from benchmarks.gpu.checks import Record
from benchmarks.gpu.data import policy_data
from posttrain.backend.config import BackendConfig, training_device
from posttrain.backend.trainer import Trainer
from posttrain.backend.types import AdamParams, Datum, LoraConfig

GRADIENT_BOUND = 0.05  # relative, of bf16 activations
LOGPROB_BOUND = 0.05  # mean over tokens


def policy_pass(trainer: Trainer, data: list[Datum]) -> np.ndarray:
    outputs = trainer.run(data, "importance_sampling").loss_fn_outputs
    return np.concatenate([output["logprobs"].array for output in outputs])


def custom_pass(trainer: Trainer, data: list[Datum]) -> np.ndarray:
    def loss(data: list[Datum], logprobs_D: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return -torch.cat(logprobs_D).mean(), {}

    return np.concatenate([output["logprobs"].array for output in trainer.run_custom(data, loss).loss_fn_outputs])


CASES: dict[str, tuple[BackendConfig, LoraConfig | None, Callable[[Trainer, list[Datum]], np.ndarray], float]] = {
    "full": (BackendConfig(), None, policy_pass, 1.0),
    "several micro-batches": (BackendConfig(micro_batch_tokens=128), None, policy_pass, 1.0),
    "checkpointing": (BackendConfig(gradient_checkpointing=True), None, policy_pass, 1.0),
    "temperature": (BackendConfig(), None, policy_pass, 0.6),
    "custom loss": (BackendConfig(), None, custom_pass, 1.0),
    "custom loss, several micro-batches": (BackendConfig(micro_batch_tokens=128), None, custom_pass, 1.0),
    "lora": (BackendConfig(), LoraConfig(rank=8), policy_pass, 1.0),
}


ON_A_GPU = {  # "auto", which all others have, packs rows there
    f"attention={name}": (BackendConfig(attention=name), None, policy_pass, 1.0) for name in ("dense", "flex", "varlen")
}


def gradient_of(trainer: Trainer) -> torch.Tensor:
    """Of the fp32 copies, where there are any, as the step will read it."""
    trainer.trained.hand_over_gradients()
    return torch.cat([p.grad.flatten().float().cpu() for p in trainer.trained.stepped.values() if p.grad is not None])


def main() -> None:
    record, device = Record(), training_device()
    low = {} if device.type == "cuda" else {"dtype": "bfloat16"}
    for name, case in (CASES | (ON_A_GPU if device.type == "cuda" else {})).items():
        with record.going_on(name):
            compare(record, name, device, low, *case)
    record.print()


def compare(
    record: Record,
    name: str,
    device: torch.device,
    low: dict[str, str],
    config: BackendConfig,
    lora: LoraConfig | None,
    run: Callable[[Trainer, list[Datum]], np.ndarray],
    temperature: float,
) -> None:
    data = policy_data(12, temperature)
    with patch("posttrain.backend.trainer.training_device", lambda _: torch.device("cpu")):
        reference = Trainer("tiny", chz.replace(config, attention="auto"), lora=lora)
    trainer = Trainer("tiny", chz.replace(config, **low), lora=lora)
    if device.type == "cuda":
        record.holds(f"{name}: rows are packed", trainer.packs == (config.attention != "dense"))
    ours, theirs = run(trainer, data), run(reference, data)
    record.at_most(f"{name}: |dlogp| mean", float(np.abs(ours - theirs).mean()), LOGPROB_BOUND)
    a, b = gradient_of(trainer), gradient_of(reference)
    record.at_most(f"{name}: gradient", float((a - b).norm() / b.norm()), GRADIENT_BOUND)
    norms = [t.optim_step(AdamParams(1e-3)).metrics["grad_norm"] for t in (trainer, reference)]
    record.at_most(f"{name}: gradient's norm", abs(norms[0] / norms[1] - 1), GRADIENT_BOUND)


if __name__ == "__main__":
    main()
