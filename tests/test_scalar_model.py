"""A trunk with a scalar head: zero at first, the gradients of a naive forward, whatever the
micro-batches, saved and loaded like the rest.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import CheckpointError, ConfigError, ModelError
from posttrain.backend.losses import Tensors
from posttrain.backend.scalar_trainer import ScalarTrainer
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, Datum, LoraConfig, ModelInput
from tests.conftest import gradients, random_tokens, rounded, trainer_of


def scalar_data(count: int, seed: int = 0, prompt: Sequence[int] = ()) -> list[Datum]:
    """Ragged sequences behind a common prompt, with a label at some of their own positions."""
    rng = np.random.default_rng(seed)
    data = []
    for length in rng.integers(3, 30, count):
        weights = np.concatenate([np.zeros(len(prompt)), rng.random(length) < 0.6]).astype(np.float32)
        weights[-1] = 1
        tokens = [*prompt, *random_tokens(rng, length)]
        inputs = {"weights": weights, "labels": (rng.random(len(tokens)) < 0.5).astype(np.float32)}
        data.append(Datum(ModelInput.from_ints(tokens), inputs))
    return data


def bce(scalars_N: torch.Tensor, inputs: Tensors) -> tuple[torch.Tensor, Tensors]:
    loss_N = binary_cross_entropy_with_logits(scalars_N, inputs["labels"], reduction="none")
    return loss_N * inputs["weights"], {}


def trainer(micro_batch_tokens: int = 16384) -> ScalarTrainer:
    return ScalarTrainer("tiny", BackendConfig(micro_batch_tokens=micro_batch_tokens))


def nudge_head(*trainers: ScalarTrainer) -> None:
    """A zero head sends no gradient into the trunk."""
    for t in trainers:
        assert t.scalar_head is not None
        drawn = torch.empty(t.scalar_head.shape).normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        t.scalar_head.data.copy_(drawn)


def train(client: TrainingClient, steps: range) -> None:
    for step in steps:
        client.forward_backward(scalar_data(4, step), bce)
        client.optim_step(AdamParams(1e-3)).result()


def scalars(client: TrainingClient) -> np.ndarray:
    outputs = client.forward(scalar_data(4, 99), bce).result().loss_fn_outputs
    return np.concatenate([out["scalars"].array for out in outputs])


def test_every_scalar_is_zero_at_first_and_the_loss_is_ln_2(torch_service: ServiceClient) -> None:
    client = torch_service.create_scalar_client("tiny")
    metrics = client.forward(scalar_data(5), bce).result().metrics
    assert metrics["loss:sum"] / metrics["num_loss_tokens:sum"] == pytest.approx(math.log(2), abs=rounded(1e-6))
    assert not scalars(client).any()


@pytest.mark.parametrize("options", [{}, {"master_weights": False}, {"offload_optimizer": True}])
def test_in_bf16_as_on_a_gpu_the_head_is_fp32_and_a_resumed_step_the_same(options: dict, tmp_path: Path) -> None:
    with ServiceClient(BackendConfig(engine="torch", dtype="bfloat16", **options), tmp_path) as service:
        client, resumed = (service.create_scalar_client("micro") for _ in range(2))
        train(client, range(2))
        resumed.load_state_with_optimizer(client.save_state("two").result().path).result()
        head, same = (trainer_of(c).scalar_head for c in (client, resumed))
        assert head.dtype == torch.float32 and not torch.equal(head, head.bfloat16()) and torch.equal(head, same)
        for c in (client, resumed):
            train(c, range(2, 3))
        assert torch.equal(head, same) and np.array_equal(scalars(client), scalars(resumed))


def test_loss_and_gradients_equal_a_naive_forward_and_a_linear_row() -> None:
    ours, data = trainer(), scalar_data(6)
    nudge_head(ours)
    loss = ours.run(data, bce).metrics["loss:sum"]
    found = gradients(ours)
    ours.zero_grad()
    row = nn.Linear(128, 1, bias=False).to(ours.device, torch.float64)
    assert ours.scalar_head is not None
    row.weight.data.copy_(ours.scalar_head)
    model = ours.base.double()
    total = torch.zeros((), dtype=torch.float64, device=ours.device)
    for datum in data:
        tokens = torch.tensor([datum.model_input.to_ints()], device=ours.device)
        hidden_TH = model(tokens, output_hidden_states=True).hidden_states[-1][0]
        labels, weights = (
            datum.loss_fn_inputs[key].to_torch().to(ours.device, torch.float64) for key in ("labels", "weights")
        )
        total += binary_cross_entropy_with_logits(row(hidden_TH)[:, 0], labels, weights, reduction="sum")
    total.backward()
    assert row.weight.grad is not None
    assert loss == pytest.approx(total.item(), rel=rounded(1e-6))
    assert torch.allclose(found.pop("scalar_head").double(), row.weight.grad, atol=rounded(2e-5), rtol=rounded(1e-5))
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.allclose(
            found.pop(name).double(), p.grad, atol=rounded(2e-5), rtol=rounded(1e-4)
        ), name
    assert not found


def test_neither_micro_batches_nor_shared_prompts_change_a_gradient() -> None:
    cut, whole, custom = trainer(micro_batch_tokens=40), trainer(), trainer()
    nudge_head(cut, whole, custom)
    prompt = random_tokens(np.random.default_rng(0), 60)
    shared, alone = scalar_data(8, prompt=prompt), [[datum] for datum in scalar_data(8, prompt=prompt)]
    outputs = whole.run(shared, bce).loss_fn_outputs
    one_by_one = [cut.run(one, bce).loss_fn_outputs[0] for one in alone]
    custom.run_custom(shared, summed_bce)
    for a, b in zip(outputs, one_by_one, strict=True):
        assert np.allclose(a["scalars"].array, b["scalars"].array, atol=rounded(1e-5)) and a["scalars"].array.any()
    for other in (cut, custom):
        for name, gradient in gradients(whole).items():
            assert torch.allclose(gradient, gradients(other)[name], atol=rounded(1e-4)), name


def summed_bce(data_D: list[Datum], scalars_D: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    losses = []
    for datum, scalars_T in zip(data_D, scalars_D, strict=True):
        labels, weights = (torch.tensor(datum.loss_fn_inputs[key].array) for key in ("labels", "weights"))
        losses.append(binary_cross_entropy_with_logits(scalars_T, labels, weights, reduction="sum"))
    return torch.stack(losses).sum(), {}


@pytest.mark.parametrize("lora", [None, LoraConfig(4)])
def test_saved_and_resumed_bit_by_bit(torch_service: ServiceClient, lora: LoraConfig | None) -> None:
    whole, first, resumed = (torch_service.create_scalar_client("tiny", lora) for _ in range(3))
    train(whole, range(4))
    train(first, range(2))
    path = first.save_state("half").result().path
    resumed.load_state_with_optimizer(path).result()
    train(resumed, range(2, 4))
    assert np.array_equal(scalars(resumed), scalars(whole)) and scalars(whole).any()
    opened = torch_service.create_scalar_client_from_state(path)
    assert np.array_equal(scalars(opened), scalars(first))


# Trap: a scalar model taken for a policy, or the other way round.
def test_a_trunk_comes_from_a_language_model_and_the_two_are_not_mistaken(torch_service: ServiceClient) -> None:
    policy, model = torch_service.create_training_client("tiny", seed=3), torch_service.create_scalar_client("tiny")
    policy_path = policy.save_state("policy").result().path
    train(model, range(1))
    scalar_path = model.save_state("scalar").result().path
    model.load_state(policy_path).result()
    embeddings, policys = (trainer_of(client).base.get_input_embeddings().weight for client in (model, policy))
    assert torch.equal(embeddings, policys)  # type: ignore
    assert not scalars(model).any()
    for mistake in (
        lambda: policy.load_state(scalar_path).result(),
        lambda: model.load_state_with_optimizer(policy_path).result(),
        lambda: torch_service.create_scalar_client_from_state(policy_path),
    ):
        with pytest.raises(CheckpointError, match="scalar"):
            mistake()
    with pytest.raises(ModelError, match="create_scalar_client_from_state"):
        torch_service.create_sampling_client(model_path=scalar_path)


def test_what_a_scalar_model_cannot_do_is_a_typed_error(torch_service: ServiceClient, tmp_path: Path) -> None:
    client = torch_service.create_scalar_client("tiny")
    for sample in (
        client.save_weights_and_get_sampling_client,
        lambda: client.save_weights_for_sampler(str(tmp_path)).result(),
    ):
        with pytest.raises(ModelError, match="no vocabulary to sample from"):
            sample()
    with pytest.raises(ConfigError, match="give it a callable"):
        client.forward(scalar_data(1), "cross_entropy").result()
    with pytest.raises(ModelError, match="train_unembed"):
        torch_service.create_scalar_client("tiny", LoraConfig(train_unembed=True))
