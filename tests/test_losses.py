"""Every loss against hand-computed numbers and against a second implementation through the whole
model's logits.
"""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.backend import logprobs
from posttrain.backend.batching import micro_batches
from posttrain.backend.config import BackendConfig
from posttrain.backend.custom_loss import run_in_two_passes
from posttrain.backend.data_checks import check_data, resolve_loss
from posttrain.backend.errors import ConfigError, ContextLengthError, DataError, NonFiniteError
from posttrain.backend.logprobs import LogitTransform, fp32_logits, target_logprobs
from posttrain.backend.loss_terms import LossTerm
from posttrain.backend.losses import LOSSES
from posttrain.backend.trainer import Trainer
from posttrain.backend.types import AdamParams, Datum, LoraConfig, ModelInput, TensorData
from tests.conftest import ROUNDING, VOCABULARY, full_logits, gradients, policy_data, random_tokens, rounded

P, Q, A = [-1.0, -0.5, -3.0], [-1.2, -0.2, -1.0], [2.0, -1.0, 0.5]  # ratios 1.2214, 0.7408, 0.1353
R = [math.exp(p - q) for p, q in zip(P, Q, strict=True)]

# name, config, loss of each token by hand, d loss / d p of each token by hand, and whether it is clipped
HAND_CASES = [
    (
        "importance_sampling",
        {},
        [-r * a for r, a in zip(R, A, strict=True)],
        [-r * a for r, a in zip(R, A, strict=True)],
        None,
    ),
    ("reinforce", {}, [-p * a for p, a in zip(P, A, strict=True)], [-a for a in A], None),
    # min(r A, clip(r, .8, 1.2) A): clipped at 1.2; r = .74 < .8 with A < 0 takes -.8 and is flat; r
    # = .135 with A > 0 is not clipped
    ("ppo", {}, [-1.2 * 2, 0.8, -R[2] * 0.5], [0.0, 0.0, -R[2] * 0.5], [1, 1, 0]),
    (
        "ppo",
        {"clip_low_threshold": 0.5, "clip_high_threshold": 1.5},
        [-R[0] * 2, R[1], -R[2] * 0.5],
        [-R[0] * 2, R[1], -R[2] * 0.5],
        [0, 0, 0],
    ),
    (
        "cispo",
        {},
        [-r * p * a for r, p, a in zip(R, P, A, strict=True)],
        [-r * a for r, a in zip(R, A, strict=True)],
        [0, 0, 0],
    ),
    (
        "cispo",
        {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
        [-1.2 * -1.0 * 2, -0.8 * -0.5 * -1, -0.8 * -3.0 * 0.5],
        [-1.2 * 2, 0.8, -0.8 * 0.5],
        [1, 1, 1],
    ),
    (
        "dro",
        {"beta": 0.3},
        [-(p * a - 0.15 * (p - q) ** 2) for p, q, a in zip(P, Q, A, strict=True)],
        [-a + 0.3 * (p - q) for p, q, a in zip(P, Q, A, strict=True)],
        None,
    ),
]


@pytest.mark.parametrize(("name", "config", "loss", "gradient", "clipped"), HAND_CASES)
def test_policy_losses_equal_hand_computation(
    name: str, config: dict, loss: list[float], gradient: list[float], clipped: list[int] | None
) -> None:
    p = torch.tensor(P, dtype=torch.float64, requires_grad=True)
    inputs = {"logprobs": torch.tensor(Q, dtype=torch.float64), "advantages": torch.tensor(A, dtype=torch.float64)}
    loss_N, diagnostics = LOSSES[name].fn(p, inputs, **config)
    loss_N.sum().backward()
    assert loss_N.tolist() == pytest.approx(loss, abs=1e-9)
    assert p.grad is not None and p.grad.tolist() == pytest.approx(gradient, abs=1e-9)
    expected = {"ratio": pytest.approx(R)} | ({} if clipped is None else {"clip_fraction": clipped})
    assert {key: value.tolist() for key, value in diagnostics.items()} == expected


def naive_loss(trainer: Trainer, datum: Datum, name: str, config: dict) -> torch.Tensor:
    """The same loss through the model's full logits, one sequence at a time, written a second
    time.
    """
    logits_TV = full_logits(trainer.base, datum.model_input.to_ints())
    inputs = {key: value.to_torch() for key, value in datum.loss_fn_inputs.items()}
    if "temperature" in inputs:
        logits_TV = logits_TV / inputs["temperature"][:, None]
    p = torch.log_softmax(logits_TV, -1)[torch.arange(len(logits_TV)), inputs["target_tokens"]]
    if name == "cross_entropy":
        return -(inputs["weights"] * p).sum()
    q, advantage, mask = inputs["logprobs"], inputs["advantages"], inputs["mask"]
    ratio = torch.exp(p - q)
    low, high = config.get("clip_low_threshold"), config.get("clip_high_threshold")
    per_token = {
        "importance_sampling": lambda: ratio * advantage,
        "ppo": lambda: torch.min(ratio * advantage, torch.clip(ratio, low or 0.8, high or 1.2) * advantage),
        "cispo": lambda: torch.clip(ratio, low or 0.0, high or 4.0).detach() * p * advantage,
        "dro": lambda: p * advantage - config["beta"] / 2 * (p - q) ** 2,
    }[name]()
    return -(per_token * mask).sum()


@pytest.mark.parametrize("name", ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"])
@pytest.mark.parametrize("model", ["tiny", "gpt2-tiny"])
def test_trainer_loss_and_gradient_equal_full_logits(name: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "posttrain.backend.logprobs.CHUNK_ELEMENTS", dict.fromkeys(("cpu", "cuda"), 260 * 7)
    )  # many small chunks
    trainer = Trainer(model, BackendConfig(micro_batch_tokens=64))
    data, config = policy_data(9), {"beta": 0.2} if name == "dro" else {}
    for d, datum in enumerate(data):
        length = datum.model_input.length
        if name == "cross_entropy":
            weights = np.where(np.arange(length) % 3 == 0, 0.0, 0.5 + d)
            datum.loss_fn_inputs = {"target_tokens": datum.loss_fn_inputs["target_tokens"]} | Datum(
                datum.model_input,
                {"weights": weights.astype(np.float32)},
            ).loss_fn_inputs
        else:
            temperature = np.full(length, 0.7 if d % 2 else 1.0, dtype=np.float32)
            datum.loss_fn_inputs |= Datum(datum.model_input, {"temperature": temperature}).loss_fn_inputs
    output = trainer.run(data, name, config)
    chunked = gradients(trainer)
    trainer.zero_grad()
    expected = sum(naive_loss(trainer, datum, name, config) for datum in data)
    assert isinstance(expected, torch.Tensor)
    expected.backward()
    assert output.metrics["loss:sum"] == pytest.approx(expected.item(), rel=rounded(2e-6))
    for key, gradient in gradients(trainer).items():
        assert (chunked[key] - gradient).norm() <= ROUNDING * gradient.norm(), key


# Trap: gradients that depend on how a batch was cut.
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_gradients_do_not_depend_on_micro_batches_or_order(lora: LoraConfig | None) -> None:
    data = policy_data(24, seed=1)
    results = []
    for budget, order in ((10**6, range(24)), (40, range(24)), (1, range(24)), (130, reversed(range(24)))):
        trainer = Trainer("tiny", BackendConfig(micro_batch_tokens=budget), lora=lora)
        shuffled = list(order)
        output = trainer.run([data[d] for d in shuffled], "importance_sampling")
        logprobs = {d: out["logprobs"].array for d, out in zip(shuffled, output.loss_fn_outputs, strict=True)}
        results.append((gradients(trainer), logprobs))
    for other_gradients, other_logprobs in results[1:]:
        for name, gradient in results[0][0].items():
            assert (other_gradients[name] - gradient).norm() <= ROUNDING * gradient.norm(), name
        for d, logprobs in results[0][1].items():
            assert np.allclose(other_logprobs[d], logprobs, atol=rounded(2e-6))


# Trap: continuations behind a shared prompt that see each other.
@pytest.mark.parametrize("model", ["tiny", "llama-tiny", "gpt2-tiny"])
def test_sharing_the_prompts_of_groups_changes_nothing(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members of a group in one row behind their prompt, against every sequence on its own."""
    data = []
    for group in range(4):
        prompt = random_tokens(np.random.default_rng(group), 5 + 3 * group)
        for datum in policy_data(5, seed=group, longest=12):
            own = datum.model_input.to_ints()
            inputs = {
                key: np.concatenate([np.zeros(len(prompt) - 1), value.array])
                for key, value in datum.loss_fn_inputs.items()
            }
            inputs["target_tokens"] = np.array(
                prompt[1:] + own[:1] + datum.loss_fn_inputs["target_tokens"].array.tolist()
            )[:-1]
            inputs["mask"][: len(prompt) - 1] = 0
            data.append(Datum(ModelInput.from_ints((prompt + own)[:-1]), inputs))
    shared, alone = (Trainer(model, BackendConfig(micro_batch_tokens=150)) for _ in range(2))
    assert any(
        batch.ends_BT is not None for batch in micro_batches(data, range(len(data)), 150, shared.device, share=True)
    )
    output = shared.run(data, "importance_sampling")
    monkeypatch.setattr("posttrain.backend.batching.SHARED_ROWS_PAY", 0.0)
    assert all(batch.ends_BT is None for batch in micro_batches(data, range(len(data)), 150, shared.device, share=True))
    expected = alone.run(data, "importance_sampling")
    for ours, theirs in zip(output.loss_fn_outputs, expected.loss_fn_outputs, strict=True):
        assert np.allclose(ours["logprobs"].array, theirs["logprobs"].array, atol=rounded(5e-6))
    for name, gradient in gradients(alone).items():
        assert (gradients(shared)[name] - gradient).norm() <= ROUNDING * gradient.norm(), name


def test_gradient_checkpointing_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, checkpointed = (Trainer("tiny", BackendConfig(gradient_checkpointing=flag)) for flag in (False, True))
    # Trap: torch would take the generators back to the forward pass, while an engine draws from them.
    monkeypatch.setattr(torch, "set_rng_state", lambda state: pytest.fail("a generator was put back"))
    for trainer in (plain, checkpointed):
        trainer.run(policy_data(6), "importance_sampling")
    expected = gradients(plain)
    for name, gradient in gradients(checkpointed).items():
        assert torch.allclose(
            gradient, expected[name], rtol=rounded(1e-5), atol=rounded(1e-6) * expected[name].abs().max().item()
        ), name


def test_custom_loss_is_one_autograd_pass_equal_to_the_built_in() -> None:
    """In two passes, as ranks compute it, too. The loss does not read the first of the data, which has no advantage."""
    data = policy_data(8, seed=2)
    data[0].loss_fn_inputs["advantages"].array[:] = 0
    for datum in data:
        temperature_T = np.linspace(0.5, 2, datum.model_input.length, dtype=np.float32)
        datum.loss_fn_inputs["temperature"] = TensorData(temperature_T)
    built_in, custom = (Trainer("tiny", BackendConfig(micro_batch_tokens=50)) for _ in range(2))
    expected = built_in.run(data, "importance_sampling")

    def loss(data_D: list[Datum], logprobs_D: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        total = torch.zeros(())
        for datum, p in zip(data_D[1:], logprobs_D[1:], strict=True):
            inputs = {key: value.to_torch() for key, value in datum.loss_fn_inputs.items()}
            total = total - ((p - inputs["logprobs"]).exp() * inputs["advantages"] * inputs["mask"]).sum()
        return total, {"mine": 7.0}

    outputs = []
    for run in (custom.run_custom, partial(run_in_two_passes, custom.run_terms, output_name=custom.output_name)):
        custom.zero_grad()
        outputs.append(run(data, loss))
        for ours, theirs in zip(outputs[-1].loss_fn_outputs, expected.loss_fn_outputs, strict=True):
            assert np.allclose(ours["logprobs"].array, theirs["logprobs"].array, atol=rounded(5e-6))
        for name, gradient in gradients(built_in).items():
            assert (gradients(custom)[name] - gradient).norm() <= 10 * ROUNDING * gradient.norm(), name
    one, two = (output.metrics for output in outputs)
    assert one["mine"] == 7.0 and two == pytest.approx(one, rel=rounded(1e-5))
    assert one["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=rounded(1e-5))


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo"])
def test_data_without_advantage_get_logprobs_and_leave_no_gradient(name: str) -> None:
    """They skip the backward pass; metrics, logprobs and the gradient of the others must not
    notice.
    """
    data = policy_data(8, seed=3)
    for datum in data[::2]:
        datum.loss_fn_inputs["advantages"].array[:] = 0
    mixed, only_others = Trainer("tiny", BackendConfig()), Trainer("tiny", BackendConfig())
    output, expected = mixed.run(data, name), only_others.run(data[1::2], name)
    assert output.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=rounded(1e-6))
    assert output.metrics["num_loss_tokens:sum"] == sum(datum.loss_fn_inputs["mask"].array.sum() for datum in data)
    assert all(
        (out["logprobs"].array[datum.loss_fn_inputs["mask"].array > 0] < 0).all()
        for out, datum in zip(output.loss_fn_outputs, data, strict=True)
    )
    for key, gradient in gradients(only_others).items():
        assert (gradients(mixed)[key] - gradient).norm() <= rounded(1e-6) * gradient.norm(), key


def test_topk_cross_entropy_targets() -> None:
    """(N, K) targets with weights: distillation from K candidates per position."""
    trainer = Trainer("tiny", BackendConfig())
    tokens, targets, weights = [5, 6, 7], [[8, 9], [10, 11], [12, 13]], [[0.7, 0.3], [1.0, 0.0], [0.0, 0.0]]
    output = trainer.run(
        [Datum(ModelInput.from_ints(tokens), {"target_tokens": targets, "weights": weights})], "cross_entropy"
    )
    logprobs_TV = full_logits(trainer.base, tokens).log_softmax(-1)
    expected = -(0.7 * logprobs_TV[0, 8] + 0.3 * logprobs_TV[0, 9] + logprobs_TV[1, 10])
    assert output.metrics["loss:sum"] == pytest.approx(expected.item(), rel=rounded(1e-5))
    assert output.loss_fn_outputs[0]["logprobs"].shape == [3, 2]


def test_adam_and_clipping_equal_torch() -> None:
    trainer = Trainer("tiny", BackendConfig())
    reference = {name: p.detach().clone().requires_grad_() for name, p in trainer.named_trainable.items()}
    optimizer = torch.optim.AdamW(
        reference.values(), lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False
    )
    for seed in range(3):
        trainer.run(policy_data(4, seed), "importance_sampling")
        for name, gradient in gradients(trainer).items():
            reference[name].grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(reference.values(), 1.0)
        optimizer.step()
        response = trainer.optim_step(AdamParams(3e-3, eps=1e-8, weight_decay=0.1, grad_clip_norm=1.0))
        assert response.metrics["grad_norm"] == pytest.approx(norm.item(), rel=rounded(1e-5))
    for name, p in trainer.named_trainable.items():
        assert torch.allclose(p, reference[name], atol=rounded(1e-6)), name


# Trap: a step applied after a NaN, or after a failed pass.
def test_nan_gradient_changes_no_weight_and_names_the_datum() -> None:
    trainer = Trainer("tiny", BackendConfig())
    data = policy_data(3)
    data[1].loss_fn_inputs["logprobs"].array[:] = -1e30  # ratio exp(1e30) is infinite
    before = {name: p.detach().clone() for name, p in trainer.named_trainable.items()}
    with pytest.raises(NonFiniteError) as caught:
        trainer.run(data, "importance_sampling")
    assert caught.value.datum_indices == [1]
    trainer.optim_step(AdamParams(1e-2))
    for name, p in trainer.named_trainable.items():
        assert torch.equal(p, before[name]), "the failed pass left a gradient behind"


def bad_datum(**changes: object) -> Datum:
    datum = policy_data(1)[0]
    return Datum(datum.model_input, {**datum.loss_fn_inputs, **changes})


@pytest.mark.parametrize(
    ("datum", "error", "says"),
    [
        (Datum(ModelInput.empty(), {}), DataError, "empty"),
        (Datum(ModelInput.from_ints([5]), {"target_tokens": [6]}), DataError, "lacks loss_fn_inputs"),
        (bad_datum(advantages=[1.0]), DataError, "advantages has shape"),
        (bad_datum(advantages=np.full(policy_data(1)[0].model_input.length, np.nan)), NonFiniteError, "not finite"),
        (
            Datum(ModelInput.from_ints([999]), {"target_tokens": [1], "logprobs": [0.0], "advantages": [0.0]}),  # type: ignore
            DataError,
            "vocabulary",
        ),
        (
            Datum(ModelInput.from_ints([5] * 600), {k: [1] * 600 for k in ("target_tokens", "logprobs", "advantages")}),  # type: ignore
            ContextLengthError,
            "context",
        ),
    ],
)
def test_bad_data_is_refused_before_torch_sees_it(datum: Datum, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Trainer("tiny", BackendConfig()).run([datum], "importance_sampling")


# Trap: an error that names another datum than the bad one.
@pytest.mark.parametrize("d", [0, 3, 4])
@pytest.mark.parametrize("t", [0, -1])
def test_the_one_bad_datum_of_a_batch_is_named(d: int, t: int) -> None:
    infinite, foreign = policy_data(5, seed=2), policy_data(5, seed=2)
    infinite[d].loss_fn_inputs["advantages"].array[t] = np.inf
    with pytest.raises(NonFiniteError, match=f"datum {d + 7}: advantages") as caught:
        check_data(infinite, (), VOCABULARY, 512, first=7)
    assert caught.value.datum_indices == [d + 7]
    foreign[d].loss_fn_inputs["target_tokens"].array[t] = VOCABULARY
    with pytest.raises(DataError, match=f"datum {d + 7} has a token outside"):
        check_data(foreign, (), VOCABULARY, 512, first=7)
    # Trap: at a temperature of -1 the least likely token is the likeliest, in silence; probabilities for logprobs
    for name, wrong in (("temperature", 0.0), ("temperature", -1.0), ("logprobs", 0.5)):
        data = policy_data(5, seed=2)
        for datum in data:
            datum.loss_fn_inputs |= {"temperature": TensorData(np.ones(datum.model_input.length, np.float32))}
        check_data(data, ("logprobs",), VOCABULARY, 512)
        data[d].loss_fn_inputs[name].array[t] = wrong
        with pytest.raises(DataError, match=rf"datum {d + 7}: {name} .*above 0"):
            check_data(data, ("logprobs",), VOCABULARY, 512, first=7)


# Trap: torch multiplies (T,) by (T, 1) each with each, and the loss is that of T x T pairs.
@pytest.mark.parametrize(
    ("loss_fn", "name", "shape"),
    [
        *[("cross_entropy", "weights", shape) for shape in ((5, 1), (5, 5))],
        *[("importance_sampling", name, (5, 1)) for name in ("advantages", "logprobs")],
        *[("ppo", name, (5, 1)) for name in ("clip_low_threshold", "target_tokens")],
        *[("cross_entropy", "target_tokens", (5, 1, 1)), ("gspo", "sequence_ratio_mask", (5, 1))],
    ],
)
def test_inputs_of_another_shape_than_their_targets_are_refused(loss_fn: str, name: str, shape: tuple) -> None:
    names = {"cross_entropy": ["weights"], "gspo": ["logprobs", "advantages", "sequence_ratio_mask"]}
    inputs: dict[str, Any] = {key: np.ones(5) for key in names.get(loss_fn, ["logprobs", "advantages"])}
    inputs["target_tokens"] = np.ones(5, np.int64)
    inputs[name] = np.ones(shape, np.int64 if name == "target_tokens" else np.float32)
    with pytest.raises(DataError, match="datum 0: .* shape"):
        check_data([Datum(ModelInput.from_ints([5] * 5), inputs)], resolve_loss(loss_fn, None).required, VOCABULARY, 9)


def test_targets_that_are_no_whole_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="target_tokens is float32"):
        check_data([bad_datum(target_tokens=[5.0] * bad_datum().model_input.length)], (), VOCABULARY, 512)


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [
        ("pppo", None, "did you mean 'ppo'"),
        ("mine:losss", None, "nor a function of a module that is here"),
        ("ppo", {"beta": 1}, "not an option"),
        ("dro", None, "beta"),
        (len, None, "loss_fn=len: too many positional arguments"),
        (LOSSES["dro"].fn, None, "missing a required argument: 'beta'"),
        (LOSSES["dro"].fn, {"beta": 1, "gamma": 1}, "unexpected keyword argument 'gamma'"),
    ],
)
def test_unknown_losses_and_options_are_refused(name: Any, config: dict | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve_loss(name, config)


# Trap: zeros in the place of logprobs; a loss over all positions without its gradient.
@pytest.mark.parametrize("budget", [10**6, 40])
def test_every_position_has_its_logprob_whatever_its_weight(budget: int) -> None:
    """In every pass: what carries no loss is told, too, and a custom loss over all positions is
    differentiated at all of them.
    """
    data, trainer = policy_data(6, seed=4), Trainer("tiny", BackendConfig(micro_batch_tokens=budget))
    plain = [Datum(d.model_input, {"target_tokens": d.loss_fn_inputs["target_tokens"]}) for d in data]
    for datum in data[::2]:
        datum.loss_fn_inputs["advantages"].array[:] = 0  # passes without a backward

    def mean_over_all(data_D: list[Datum], logprobs_D: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return torch.cat(logprobs_D).mean(), {}

    logits_D = [full_logits(trainer.base, d.model_input.to_ints()) for d in data]
    targets_D = [d.loss_fn_inputs["target_tokens"].to_torch() for d in data]
    expected_D = [z.log_softmax(-1).gather(-1, t[:, None])[:, 0] for z, t in zip(logits_D, targets_D, strict=True)]
    torch.cat(expected_D).mean().backward()
    expected = gradients(trainer)
    trainer.zero_grad()
    outputs = [
        trainer.run_custom(data, mean_over_all),
        trainer.run(data, "importance_sampling"),
        trainer.run(data, "importance_sampling", backward=False),
        trainer.run(plain, lambda p_N, inputs: (-p_N, {}), backward=False),
    ]
    for output in outputs:
        for out, p in zip(output.loss_fn_outputs, expected_D, strict=True):
            assert np.allclose(out["logprobs"].array, p.detach().numpy(), atol=rounded(5e-6))
    trainer.zero_grad()
    metrics = trainer.run_custom(data, mean_over_all).metrics
    assert metrics["surrogate_loss:sum"] == pytest.approx(metrics["loss:sum"], rel=rounded(1e-5))  # it is linear
    for name, gradient in gradients(trainer).items():
        assert (gradient - expected[name]).norm() <= 2 * ROUNDING * expected[name].norm() + 1e-9, name


def without_weight(data: list[Datum]) -> list[Datum]:
    for datum in data:
        datum.loss_fn_inputs["mask"].array[:] = 0
    return data


def test_data_without_any_weight_have_loss_zero_and_no_gradient() -> None:
    data, trainer = without_weight(policy_data(3)), Trainer("tiny", BackendConfig())

    def weighted(data_D: list[Datum], logprobs_D: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        masks_D = [datum.loss_fn_inputs["mask"].to_torch() for datum in data_D]
        return torch.stack([(p * mask).sum() for p, mask in zip(logprobs_D, masks_D, strict=True)]).sum(), {}

    passes = trainer.run(data, "ppo"), trainer.run_custom(data, weighted), trainer.run(data, "ppo", backward=False)
    for output in passes:
        assert output.metrics["loss:sum"] == 0 and all(out["logprobs"].array.all() for out in output.loss_fn_outputs)
    before = {name: p.clone() for name, p in trainer.named_trainable.items()}
    assert trainer.optim_step(AdamParams(1e-2)).metrics["grad_norm"] == 0
    assert all(torch.equal(p, before[name]) for name, p in trainer.named_trainable.items())
    with pytest.raises(DataError, match="detached"):
        trainer.run_custom(data, lambda data_D, logprobs_D: (logprobs_D[0].sum().detach(), {}))
    with pytest.raises(NonFiniteError, match="custom loss is not finite"):
        trainer.run_custom(data, lambda data_D, logprobs_D: (logprobs_D[0].sum() * math.inf, {}))


# Trap: a micro-batch, or all data, without a token of a loss.
def test_a_micro_batch_may_lack_a_loss() -> None:
    """The longest rows fill the first micro-batch: they have no token of one of the losses, or of
    none.
    """
    rng = np.random.default_rng(0)
    silent, long, short = without_weight(policy_data(1)), policy_data(2, seed=1), policy_data(2, seed=2, longest=6)
    silent[0] = Datum(
        ModelInput.from_ints(random_tokens(rng, 60)),
        {key: np.zeros(60, dtype=value.array.dtype) for key, value in silent[0].loss_fn_inputs.items()},
    )
    for datum in short:  # the same arrays, for a loss of another kind
        datum.loss_fn_inputs["weights"] = datum.loss_fn_inputs["mask"]
    results = []
    for budget in (10**6, 30):
        trainer = Trainer("tiny", BackendConfig(micro_batch_tokens=budget))
        terms = [LossTerm(silent + long, "importance_sampling"), LossTerm(short, "cross_entropy")]
        results.append((trainer.run_terms(terms), gradients(trainer)))
    (whole, expected), (cut, found) = results
    assert [out.metrics for out in cut] == [pytest.approx(out.metrics, rel=rounded(1e-4)) for out in whole]
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 2 * ROUNDING * gradient.norm(), name


@pytest.mark.parametrize("transform", [LogitTransform(0.25), LogitTransform(softcap=3.0), LogitTransform(2.0, 5.0)])
@pytest.mark.parametrize("tempered", [False, True])
@pytest.mark.parametrize("kept", [0, 1, 3])  # of three chunks, on a GPU with so much room
def test_scaled_and_capped_logits_forward_and_backward(
    transform: LogitTransform, tempered: bool, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", dict.fromkeys(("cpu", "cuda"), 60))
    monkeypatch.setattr(logprobs, "_kept", lambda *_: kept)
    monkeypatch.setattr(logprobs, "fp32_logits", lambda *x: computed.append(len(x[0])) or fp32_logits(*x))
    torch.manual_seed(0)
    hidden, head = (torch.randn(size, 8, requires_grad=True) for size in (7, 20))
    targets, temperature = torch.randint(20, (7, 2)), torch.rand(7) + 0.5 if tempered else None
    logits = transform.scale * hidden @ head.T
    if transform.softcap:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    expected = (logits / (1 if temperature is None else temperature[:, None])).log_softmax(-1).gather(-1, targets)
    found = target_logprobs(hidden, head, targets, temperature, transform)
    assert torch.allclose(found, expected, atol=rounded(1e-6))
    weight = torch.randn(7, 2)
    theirs = torch.autograd.grad((expected * weight).sum(), (hidden, head))
    for ours, gradient in zip(torch.autograd.grad((found * weight).sum(), (hidden, head)), theirs, strict=True):
        assert torch.allclose(ours, gradient, atol=rounded(1e-5))
    assert computed == [3, 3, 1] + [3, 3, 1][: 3 - kept]
