"""bf16 weights with fp32 masters, 8-bit moments, stochastic rounding, an offloaded optimizer."""

import gc
import weakref
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from posttrain.backend import lean_adamw
from posttrain.backend.config import BackendConfig, param_dtype
from posttrain.backend.data_checks import check_finite
from posttrain.backend.errors import CheckpointError, ConfigError, NonFiniteError
from posttrain.backend.lean_adamw import (
    MEAN_LEVELS,
    PIECE_BYTES,
    SQUARE_LEVELS,
    STEP_BYTES,
    LeanAdamW,
    dequantized,
    quantized,
    to_bf16,
)
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.trainer import Trainer
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, Datum, LoraConfig
from tests.conftest import policy_data, trainer_of

BF16 = {"dtype": "bfloat16"}
SETTINGS = {
    "masters": BF16,
    "masters, 8 bits": {**BF16, "moments": "8bit"},
    "rounded": {**BF16, "master_weights": False},
    "rounded, 8 bits": {**BF16, "master_weights": False, "moments": "8bit"},
    "8 bits": {"moments": "8bit"},
    "offloaded": {"offload_optimizer": True},
    "masters, offloaded, 8 bits": {**BF16, "offload_optimizer": True, "moments": "8bit"},
}


def backend(settings: dict[str, Any]) -> BackendConfig:
    return BackendConfig(engine="torch", max_length=64, **settings)


def train(client: TrainingClient, seeds: range) -> None:
    for seed in seeds:
        for data in (policy_data(3, seed), policy_data(3, seed + 100)):
            client.forward_backward(data, "importance_sampling")
        client.optim_step(AdamParams(1e-3, weight_decay=0.01, grad_clip_norm=1.0)).result()


def exact(client: TrainingClient) -> dict[str, torch.Tensor]:
    trainer = trainer_of(client)
    return {name: t.detach().clone() for name, t in trainer.trained.exact(trainer.model.state_dict()).items()}


# Trap: a hook of a tensor that refers to what holds the tensor is a circle which the garbage collector does not see.
@pytest.mark.parametrize("name", SETTINGS)
def test_a_trainer_that_is_let_go_leaves_no_weight(name: str) -> None:
    trainer = Trainer("micro", backend(SETTINGS[name]))
    trainer.run(policy_data(3, 0), "importance_sampling")
    trainer.optim_step(AdamParams(1e-3))
    weights = [*trainer.model.parameters(), *trainer.trained.stepped.values()]
    left = [weakref.ref(weight) for weight in weights]
    del trainer, weights
    gc.collect()
    assert not any(weight() is not None for weight in left)


@pytest.mark.parametrize("lora", [None, LoraConfig(4)], ids=["all weights", "lora"])
@pytest.mark.parametrize("name", SETTINGS)
def test_resuming_is_bit_identical(name: str, lora: LoraConfig | None, tmp_path: Path) -> None:
    with ServiceClient(backend(SETTINGS[name]), tmp_path) as service:
        uninterrupted, first = (service.create_training_client("micro", lora) for _ in range(2))
        train(uninterrupted, range(4))
        train(first, range(2))
        path = first.save_state("middle").result().path
        resumed = service.create_training_client_from_state_with_optimizer(path)
        train(resumed, range(2, 4))
        ours, theirs = exact(resumed), exact(uninterrupted)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        sampled = dict(resumed._trainer.sampled.sampler_weights())
        assert all(torch.equal(sampled[key], t) for key, t in uninterrupted._trainer.sampled.sampler_weights())


# Trap: no gradient arrives at the weights, so their hooks meet None.
@pytest.mark.parametrize("name", SETTINGS)
def test_a_pass_whose_tokens_are_all_clipped_changes_no_step(name: str) -> None:
    clipped, other = policy_data(2, 0)
    inputs = {key: value.array for key, value in clipped.loss_fn_inputs.items()}
    rising = {"logprobs": inputs["logprobs"] - 10, "advantages": abs(inputs["advantages"])}
    clipped = Datum(clipped.model_input, inputs | rising)
    weights, are_clipped = [], []
    for passes in ([clipped, other, clipped], [other]):
        trainer = Trainer("micro", backend(SETTINGS[name]))
        are_clipped += [trainer.run([datum], "ppo").metrics["clip_fraction:mean"] == 1 for datum in passes]
        trainer.optim_step(AdamParams(1e-3))
        weights.append(trainer.trained.exact(trainer.model.state_dict()))
    assert are_clipped == [True, False, True, False]
    assert all(torch.equal(weights[0][key], t) for key, t in weights[1].items())


@pytest.mark.parametrize("name", ["masters", "rounded", "rounded, 8 bits", "8 bits"])
def test_moments_are_finite_after_each_step_that_is_taken(name: str) -> None:
    """So a sync, which checks the weights of passes alone, misses nothing."""
    taken = []
    for exponent in range(16, 21):  # the squares of some are beyond fp32
        trainer = Trainer("micro", backend(SETTINGS[name]))
        for p in trainer.trained.stepped.values():
            p.grad = torch.full_like(p, 10.0**exponent)
        with suppress(NonFiniteError):
            trainer.optim_step(AdamParams(1e-3))
            trainer.check_finite()
            taken.append(exponent)
        assert exponent in taken or not trainer.trained.optimizer.state
    assert taken and len(taken) < 5


@pytest.mark.parametrize("settings", [{"offload_optimizer": True}], ids=str)
def test_an_offloaded_optimizer_takes_the_same_steps(settings: dict[str, Any], tmp_path: Path) -> None:
    with ServiceClient(backend(settings), tmp_path) as offloaded, ServiceClient(backend({}), tmp_path) as plain:
        clients = [service.create_training_client("micro") for service in (offloaded, plain)]
        for client in clients:
            train(client, range(2))
        ours, theirs = (exact(client) for client in clients)
        assert all(torch.equal(ours[key].cpu(), theirs[key].cpu()) for key in theirs)


# Trap: updates below half a step of bf16, which a bf16 weight without a master would lose.
def test_small_steps_add_up_in_masters_and_on_average_in_rounded_weights(tmp_path: Path) -> None:
    moved = {}
    for name, settings in {"plain": {}, "masters": BF16, "rounded": {**BF16, "master_weights": False}}.items():
        with ServiceClient(backend(settings), tmp_path) as service:
            client = service.create_training_client("micro")
            before = exact(client)
            for _ in range(10):
                client.forward_backward(policy_data(4), "importance_sampling")
                client.optim_step(AdamParams(1e-5)).result()
            key = "model.layers.0.mlp.up_proj.weight"
            moved[name] = (exact(client)[key].float() - before[key].float()).flatten()
    cosine = torch.nn.functional.cosine_similarity(moved["masters"], moved["plain"], dim=0)
    assert cosine > 0.9 and moved["masters"].abs().mean() > 0.5 * moved["plain"].abs().mean()
    along = (moved["rounded"] @ moved["plain"]) / moved["plain"].norm() ** 2
    assert 0.7 < along < 1.3


def test_a_checkpoint_holds_the_masters_and_opens_in_fp32(tmp_path: Path) -> None:
    with ServiceClient(backend(BF16), tmp_path / "a") as service, ServiceClient(backend({}), tmp_path / "b") as plain:
        client = service.create_training_client("micro")
        train(client, range(2))
        path = client.save_state("state").result().path
        opened = plain.create_training_client_from_state_with_optimizer(path)
        ours, theirs = exact(opened), exact(client)
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == torch.float32 for key in theirs)
    says = r"holds moments in float32: continue with backend\.moments=float32"
    with (
        ServiceClient(backend({"moments": "8bit"}), tmp_path / "c") as other,
        pytest.raises(CheckpointError, match=says),
    ):
        other.create_training_client_from_state_with_optimizer(path)


def test_gradients_of_bf16_weights_add_up_in_fp32() -> None:
    one, several = (Trainer("micro", backend({**BF16, "micro_batch_tokens": n})) for n in (4096, 40))
    for trainer in (one, several):
        trainer.run(policy_data(12), "importance_sampling")
        trainer.trained.hand_over_gradients()
    for name, p in one.trained.stepped.items():
        other = several.trained.stepped[name].grad
        assert p.grad is not None and other is not None and p.grad.dtype == torch.float32
        assert (p.grad - other).norm() <= 0.03 * p.grad.norm(), name


def test_codes_are_right_on_average_and_squares_never_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1000, generator=generator) * torch.logspace(-4, 0, 1000)
    decoded = [dequantized(*quantized(values, MEAN_LEVELS, generator), MEAN_LEVELS) for _ in range(200)]
    assert (decoded[0] - values).abs().max() <= 0.1 * values.abs().max()
    mean = torch.stack(decoded).mean(0)
    assert ((mean - values).abs() <= 0.02 * values.abs() + 1e-5 * values.abs().max()).float().mean() > 0.99
    squares = values**2
    code, scale = quantized(squares, SQUARE_LEVELS, generator)
    assert code.dtype == torch.uint8 and scale.shape == (4,)
    assert bool((dequantized(code, scale, SQUARE_LEVELS)[squares > 0] > 0).all())
    far_below = dequantized(*quantized(torch.tensor([1.0, *[1e-9] * 255]), SQUARE_LEVELS, generator), SQUARE_LEVELS)
    assert set(far_below.tolist()) == {1.0, float(SQUARE_LEVELS[0])}
    # Trap: a small negative value that is rounded to 0, and read as the largest level
    lowest = float(MEAN_LEVELS[0])
    small = torch.tensor([1.0, *[-lowest / 2] * 255])
    assert set(dequantized(*quantized(small, MEAN_LEVELS, generator), MEAN_LEVELS).tolist()) == {1.0, 0.0, -lowest}
    zeros = torch.zeros(300)
    assert not dequantized(*quantized(zeros, MEAN_LEVELS, generator), MEAN_LEVELS).any()


def test_stochastic_rounding_by_hand() -> None:
    step = 2.0**-7  # of bf16 at 1
    values = torch.full((20_000,), 1 + step / 4)
    rounded = to_bf16(values, torch.Generator().manual_seed(0)).float()
    assert set(rounded.tolist()) == {1.0, 1 + step}
    assert float((rounded > 1).float().mean()) == pytest.approx(0.25, abs=0.02)
    exact_values = torch.tensor([0.0, -1.0, 1.5, -(2.0**-20)])
    assert torch.equal(to_bf16(exact_values, torch.Generator().manual_seed(0)).float(), exact_values)


def test_lean_steps_in_fp32_are_torchs() -> None:
    data = [torch.randn(300, 3, generator=torch.Generator().manual_seed(k)) for k in range(6)]
    ours, theirs = (torch.nn.Parameter(data[0].clone()) for _ in range(2))
    lean, plain = LeanAdamW([ours], 0, False), torch.optim.AdamW([theirs], lr=0.0)
    for gradient in data[1:]:
        for p, optimizer in ((ours, lean), (theirs, plain)):
            p.grad = gradient.clone()
            optimizer.param_groups[0].update(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
            optimizer.step()
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_steps_in_8_bits_are_near_torchs() -> None:
    start, *gradients = (torch.randn(300, 3, generator=torch.Generator().manual_seed(k)) for k in range(21))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    for p, optimizer in ((ours, LeanAdamW([ours], 0, True)), (theirs, torch.optim.AdamW([theirs], lr=0.0))):
        for gradient in gradients:
            p.grad = gradient.clone()
            optimizer.param_groups[0].update(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
            optimizer.step()
    assert 0 < (ours - theirs).norm() < 0.1 * (theirs - start).norm()


# Trap: with the same random numbers in each step, what is rounded away once is rounded away for ever.
def test_each_step_parameter_and_seed_rounds_by_random_numbers_of_its_own() -> None:
    patterns = []  # which of 1,000 weights of 1 a step of a third of bf16's own has raised
    for seed in (0, 1):
        both = [torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = LeanAdamW(both, seed, False)
        optimizer.param_groups[0].update(lr=2.0**-7 / 3)
        for _ in range(2):
            for p in both:
                p.data.fill_(1)
                p.grad = -torch.ones_like(p)
            optimizer.step()
            patterns += [p.detach() > 1 for p in both]
    assert all(float(raised.float().mean()) == pytest.approx(1 / 3, abs=0.06) for raised in patterns)
    assert all(0.3 < float((a != b).float().mean()) < 0.6 for a, b in combinations(patterns, 2))


class Allocated(TorchDispatchMode):
    """The most bytes of new tensors that exist at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._live = 0, dict[int, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self._live:
                self._live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._live.pop, storage._cdata)
        self.peak = max(self.peak, sum(self._live.values()))
        return out


def test_a_step_needs_the_memory_that_is_planned_and_its_pieces_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the largest weight of 8B, half a billion values, rounding whole took 80 bytes each."""

    def steps(piece: int) -> tuple[list[torch.Tensor], float]:
        monkeypatch.setattr(lean_adamw, "PIECE", piece)
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(600, 257, generator=generator).bfloat16())
        lean, allocated = LeanAdamW([p], 0, True), Allocated()
        lean.param_groups[0]["lr"] = 1e-2
        for _ in range(2):
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            lean.step()
        with allocated:
            lean.step()
        return [p, *lean.state[p].values()], allocated.peak / p.numel()

    (whole, most), (pieces, least) = steps(2**24), steps(1024)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))
    assert 0.75 * STEP_BYTES < least <= STEP_BYTES < most <= STEP_BYTES + PIECE_BYTES


def test_weights_in_bf16_keep_their_rotations_in_fp32() -> None:
    trainer = Trainer("micro", backend({**BF16, "master_weights": False}))
    assert {p.dtype for p in trainer.base.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in trainer.base.buffers() if b.is_floating_point()} == {torch.float32}
    adapted = Trainer("micro", backend(BF16), lora=LoraConfig(rank=4))
    assert {p.dtype for p in adapted.named_trainable.values()} == {torch.float32} and not adapted.trained.masters
    assert {p.dtype for p in adapted.base.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_settings_that_contradict_each_other_are_refused() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert param_dtype(cuda, BackendConfig(dtype="bfloat16")) == torch.bfloat16
    assert param_dtype(cpu, BackendConfig()) == torch.float32
    for settings, says in (
        ({"param_dtype": "bfloat16"}, "needs backend.dtype=bfloat16"),
        ({"master_weights": False}, "the weights are float32"),
        ({**BF16, "master_weights": False, "offload_optimizer": True}, "has float32 copies"),
    ):
        with pytest.raises(ConfigError, match=says):
            param_dtype(cpu, backend(settings))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_of_a_lora_run_is_its_base(dtype: str, tmp_path: Path) -> None:
    with ServiceClient(backend({"dtype": dtype}), tmp_path) as service:
        base, adapted = (service.create_training_client("micro", lora) for lora in (None, LoraConfig(rank=4)))
        train(adapted, range(2))
        data = policy_data(5)
        ours = adapted.forward(data, "importance_sampling", without_adapter=True).result().loss_fn_outputs
        theirs = base.forward(data, "importance_sampling").result().loss_fn_outputs
        trained = adapted.forward(data, "importance_sampling").result().loss_fn_outputs
        pairs = [(a["logprobs"].array, b["logprobs"].array) for a, b in zip(ours, theirs, strict=True)]
        assert all((a == b).all() for a, b in pairs)
        assert any((a["logprobs"].array != b).any() for a, (b, _) in zip(trained, pairs, strict=True))
        with pytest.raises(ConfigError, match="has no adapter"):
            base.forward(data, "importance_sampling", without_adapter=True).result()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_weights_and_optimizer_state_are_finite_or_named(value: float) -> None:
    """3e38 is finite, and its square is not."""
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    check_finite({"w": weight}, optimizer)
    optimizer.state[weight]["exp_avg_sq"][2, 1] = value
    if value == 3e38:
        check_finite({"w": weight}, optimizer)
    else:
        with pytest.raises(NonFiniteError, match="1 of 3 tensors are not finite, first 'exp_avg_sq of w'"):
            check_finite({"w": weight}, optimizer)
