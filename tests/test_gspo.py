"""GSPO's loss by hand, by a second implementation, and as an algorithm of RL; options of losses that are
refused; data with different numbers of targets in one pass.
"""

# Trap: a sequence's ratio taken over a micro-batch, over the prompt, or over rows that share a prefix.

import math

import numpy as np
import pytest
import torch

from posttrain.backend.config import BackendConfig
from posttrain.backend.data_checks import resolve_loss
from posttrain.backend.errors import ConfigError, DataError, NonFiniteError
from posttrain.backend.losses import LOSSES
from posttrain.backend.trainer import Trainer
from posttrain.backend.types import Datum, ModelInput, TensorData
from tests.conftest import ROUNDING, full_logits, gradients, policy_data, rounded

CLIP = {"clip_low_threshold": 0.95, "clip_high_threshold": 1.05}


def test_gspo_equals_hand_computation() -> None:
    """Three sequences, with log-ratios of (0.2, -0.4), (-0.1, and 5 on a token that is not marked),
    (0.2): ratios of exp(-0.1), exp(-0.1) and exp(0.2) on all their tokens.
    """
    inputs = {
        "logprobs": torch.tensor([-1.2, -1.6, -0.4, -5.5, -0.7], dtype=torch.float64),
        "advantages": torch.tensor([1.0, 2.0, -2.0, -1.0, 3.0], dtype=torch.float64),
        "sequence_ratio_mask": torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]),
        "sequence": torch.tensor([4, 4, 7, 7, 9]),
    }
    p = torch.tensor([-1.0, -2.0, -0.5, -0.5, -0.5], dtype=torch.float64, requires_grad=True)
    loss_N, diagnostics = LOSSES["gspo"].fn(p, inputs, **CLIP)
    loss_N.sum().backward()
    s = math.exp(-0.1)
    # below the lower threshold: kept for a positive advantage, clipped for a negative one
    assert loss_N.tolist() == pytest.approx([-s, -2 * s, 2 * 0.95, 0.95, -3 * 1.05])
    assert p.grad is not None and p.grad.tolist() == pytest.approx([-s, -2 * s, 0, 0, 0])
    assert diagnostics["ratio"].tolist() == pytest.approx([s, s, s, s, math.exp(0.2)])
    assert diagnostics["clip_fraction"].tolist() == [0, 0, 1, 1, 1]
    per_token = inputs | {"clip_high_threshold": torch.tensor([1.05, 1.05, 1.05, 1.05, 9.0], dtype=torch.float64)}
    assert LOSSES["gspo"].fn(p, per_token, **CLIP)[0].tolist() == pytest.approx(
        [-s, -2 * s, 1.9, 0.95, -3 * math.exp(0.2)]
    )
    lower = inputs | {"clip_low_threshold": torch.tensor([0.5, 0.5, 0.5, 0.99, 0.5], dtype=torch.float64)}
    assert LOSSES["gspo"].fn(p, lower, **CLIP)[0].tolist() == pytest.approx([-s, -2 * s, 2 * s, 0.99, -3 * 1.05])
    unmarked = inputs | {"sequence_ratio_mask": torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0])}  # a ratio of 1, not 0 / 0
    assert LOSSES["gspo"].fn(p, unmarked, **CLIP)[1]["ratio"].tolist() == pytest.approx([s, s, 1, 1, math.exp(0.2)])


def marked(count: int) -> list[Datum]:
    """As a script for Tinker has them: no mask, all positions in the loss, the answer's marked."""
    data = policy_data(count, seed=3)
    for datum in data:
        datum.loss_fn_inputs["sequence_ratio_mask"] = datum.loss_fn_inputs.pop("mask")
    return data


def naive(trainer: Trainer, datum: Datum) -> torch.Tensor:
    """One sequence at a time, through the model's own logits."""
    logits_TV = full_logits(trainer.base, datum.model_input.to_ints())
    inputs = {key: value.to_torch() for key, value in datum.loss_fn_inputs.items()}
    p = torch.log_softmax(logits_TV, -1).gather(-1, inputs["target_tokens"][:, None])[:, 0]
    marks = inputs.get("sequence_ratio_mask", inputs.get("mask"))
    assert marks is not None
    answer = torch.nonzero(marks)[:, 0]
    s = torch.exp((p - inputs["logprobs"])[answer].mean()).detach()
    total = torch.zeros(())
    for t in answer.tolist():
        advantage = float(inputs["advantages"][t])
        low, high = s * advantage, float(s.clip(0.8, 1.2)) * advantage
        total = total - (s * advantage * torch.exp(p[t] - p[t].detach()) if low <= high else torch.tensor(high))
    return total


@pytest.mark.parametrize("budget", [10**6, 40])
@pytest.mark.parametrize("form", [marked, lambda count: policy_data(count, seed=3)], ids=["marked", "mask"])
def test_gspo_equals_a_second_implementation(budget: int, form) -> None:  # noqa: ANN001
    data, trainer = form(6), Trainer("micro", BackendConfig(micro_batch_tokens=budget))
    output = trainer.run(data, "gspo")
    ours = gradients(trainer)
    trainer.zero_grad()
    loss = torch.stack([naive(trainer, datum) for datum in data]).sum()
    loss.backward()
    assert output.metrics["loss:sum"] == pytest.approx(loss.item(), rel=rounded(1e-4))
    for name, gradient in gradients(trainer).items():
        assert (ours[name] - gradient).norm() <= 10 * ROUNDING * max(gradient.norm(), 1e-3), name


def test_the_gradient_of_gspo_equals_a_difference() -> None:
    """With equal advantages in a sequence, the surrogate's gradient is |M| times that of -s A
    (Zheng et al. 2025, eq. 10), here by central differences.
    """
    q, advantage = torch.tensor([-1.1, -0.6, -2.0], dtype=torch.float64), 0.7

    def ratio(p: torch.Tensor) -> float:
        return math.exp(float((p - q).mean()))

    p = torch.tensor([-1.0, -0.7, -2.1], dtype=torch.float64, requires_grad=True)
    inputs = {"logprobs": q, "advantages": torch.full((3,), advantage), "sequence": torch.zeros(3, dtype=torch.int64)}
    LOSSES["gspo"].fn(p, inputs)[0].sum().backward()
    assert p.grad is not None
    for t in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[t] = 1e-6
        slope = (ratio(p.detach() + step) - ratio(p.detach() - step)) / 2e-6
        assert float(p.grad[t]) == pytest.approx(-3 * slope * advantage, rel=rounded(1e-6))


def test_gspo_asks_which_tokens_a_ratio_is_of() -> None:
    trainer, data = Trainer("micro", BackendConfig()), marked(3)
    del data[1].loss_fn_inputs["sequence_ratio_mask"]
    with pytest.raises(DataError, match="datum 1"):
        trainer.run(data, "gspo")
    for datum in data:
        datum.loss_fn_inputs.pop("sequence_ratio_mask", None)
    with pytest.raises(DataError, match="datum 0 lacks sequence_ratio_mask"):
        trainer.run(data, "gspo")
    data = marked(3)
    data[2].loss_fn_inputs["sequence_ratio_mask"].array[:] = 0
    with pytest.raises(DataError, match="datum 2 has advantages"):
        trainer.run(data, "gspo")


# Trap: torch's clamp gives the upper bound to every ratio where the lower is above it.
@pytest.mark.parametrize("name", ["ppo", "gspo", "cispo"])
def test_a_lower_bound_above_the_upper_is_refused(name: str) -> None:
    data, trainer = policy_data(3), Trainer("micro", BackendConfig())
    with pytest.raises(ConfigError, match="clip_low_threshold=1.2 is above clip_high_threshold=0.2"):
        trainer.run(data, name, {"clip_low_threshold": 1.2, "clip_high_threshold": 0.2})
    for datum in data:
        datum.loss_fn_inputs["clip_high_threshold"] = TensorData(np.full(datum.model_input.length, 5.0))
    data[2].loss_fn_inputs["clip_high_threshold"].array[-1] = 0.5
    with pytest.raises(DataError, match="datum 2: clip_low_threshold is above clip_high_threshold at some token"):
        trainer.run(data, name, {"clip_low_threshold": 0.8})


# Trap: a penalty that becomes a reward for leaving the sampler.
@pytest.mark.parametrize(
    ("name", "option", "value", "says"),
    [
        ("dro", "beta", -0.1, "=-0.1 must be at least 0"),
        ("cispo", "clip_low_threshold", -0.1, "=-0.1 must be at least 0"),
        *(
            ("ppo", "clip_low_threshold", wrong, "=.*a number is needed")
            for wrong in ("many", None, True, math.nan, [1])
        ),
    ],
)
def test_options_of_losses_are_numbers_and_not_negative(name: str, option: str, value: object, says: str) -> None:
    assert resolve_loss(name, {option: 0.9}).scales_with_advantage == (name != "dro")
    with pytest.raises(ConfigError, match=f"loss_fn_config.{option}{says}"):
        resolve_loss(name, {option: value})  # type: ignore[dict-item]


# --- different numbers of targets -------------------------------------------------------------------


def of_width(width: int | None, length: int = 6, seed: int = 0) -> Datum:
    rng = np.random.default_rng([seed, width or 0])
    shape = (length,) if width is None else (length, width)
    inputs = {"target_tokens": rng.integers(4, 260, shape), "weights": rng.random(shape).astype(np.float32)}
    return Datum(ModelInput.from_ints(rng.integers(4, 260, length).tolist()), inputs)


def test_data_of_different_widths_are_passed_in_one_call() -> None:
    data = [of_width(None), of_width(3), of_width(None, seed=1), of_width(2, length=9), of_width(3, seed=1)]
    trainer, alone = Trainer("micro", BackendConfig()), Trainer("micro", BackendConfig())
    together = trainer.run(data, "cross_entropy")
    apart = [alone.run([datum], "cross_entropy") for datum in data]
    for output, expected, datum in zip(together.loss_fn_outputs, apart, data, strict=True):
        p = output["logprobs"].array
        assert p.shape == datum.loss_fn_inputs["target_tokens"].array.shape
        assert p == pytest.approx(expected.loss_fn_outputs[0]["logprobs"].array, abs=rounded(1e-5))
    for name in ("loss:sum", "num_loss_tokens:sum"):
        assert together.metrics[name] == pytest.approx(sum(output.metrics[name] for output in apart))
    for name, gradient in gradients(alone).items():
        assert torch.allclose(gradients(trainer)[name], gradient, atol=rounded(1e-5))

    def with_width(p: torch.Tensor, inputs: dict) -> tuple[torch.Tensor, dict]:
        return -(inputs["weights"] * p), {"width": p.new_full(p.shape[:1], p[0].numel())}

    mean = trainer.run(data, with_width, backward=False).metrics["width:mean"]
    assert mean == pytest.approx((6 * (1 + 3 + 1 + 3) + 9 * 2) / 33), "of all tokens, not of widths"
    before = gradients(trainer)
    data[3].loss_fn_inputs["weights"].array[2] = np.nan
    with pytest.raises(NonFiniteError, match="datum 3"):
        trainer.run(data, "cross_entropy")
    assert all(torch.equal(before[name], gradient) for name, gradient in gradients(trainer).items()), "checked first"
    with pytest.raises(DataError, match="passes of their own"):
        trainer.run_custom([of_width(None), of_width(3)], lambda data, logprobs_D: (logprobs_D[0].sum(), {}))
