"""A run's calls on a GPU (pretend_gpu.py): no tensor on the wrong device, in bf16, with every setting that has a branch
of its own there.
"""

import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import chz
import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

import posttrain.backend.config
import tests.pretend_gpu
from posttrain.backend import attention, device_lock
from posttrain.backend.config import BackendConfig
from posttrain.backend.loss_terms import LossTerm
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.trainer import Trainer
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams
from tests.conftest import random_tokens, trainer_of
from tests.pretend_gpu import GPU, MOVES, OnGpu, aten, computed, pretend_gpu
from tests.test_scalar_model import scalars, train

GAP = 0.05  # nats, mean: of bf16
NO_WORK = {aten.detach.default, aten.lift_fresh.default}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(posttrain.backend.config.AUTO_DTYPES, "cuda", "bfloat16")
    with pretend_gpu():
        yield


def policy_data(answers: int = 3, prompt: int = 60) -> list[Datum]:
    """Groups on a shared prompt, a datum alone, and one whose advantage is 0."""
    rng, data = np.random.default_rng(0), []
    groups = [(random_tokens(rng, prompt), answers), (random_tokens(rng, 5), 1)]
    for shared, count in groups:
        for member in range(count):
            tokens = shared + random_tokens(rng, 6 + member)
            length = len(tokens) - 1
            inputs = {
                "target_tokens": tokens[1:],
                "logprobs": np.full(length, -5.5, np.float32),
                "advantages": np.full(length, member - 1, np.float32),
                "mask": (np.arange(length) >= len(shared) - 1).astype(np.float32),
                "temperature": np.full(length, 0.8, np.float32),
            }
            data.append(Datum(ModelInput.from_ints(tokens[:-1]), inputs))
    return data


def logprobs(client: TrainingClient, data_D: Sequence[Datum]) -> np.ndarray:
    outputs = client.forward(list(data_D), "importance_sampling").result().loss_fn_outputs
    return np.concatenate([output["logprobs"].array for output in outputs])


def custom(data: list[Datum], logprobs_D: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """With a Datum's own arrays, as losses written for Tinker."""
    masks_D = [datum.loss_fn_inputs["mask"].to_torch() for datum in data]
    return -torch.stack([(p * mask).sum() for p, mask in zip(logprobs_D, masks_D, strict=True)]).mean(), {
        "largest": max(float(p.detach().max()) for p in logprobs_D)
    }


def sampled_gap(client: TrainingClient, sampler: Any) -> float:
    """Mean |dlogp| of a sampled answer."""
    prompt = random_tokens(np.random.default_rng(1), 8)
    sequence = (
        sampler.sample(ModelInput.from_ints(prompt), 1, SamplingParams(max_tokens=6, stop=[])).result().sequences[0]
    )
    tokens = prompt + sequence.tokens
    datum = Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": np.ones(len(tokens) - 1)})
    (output,) = client.forward([datum], "cross_entropy").result().loss_fn_outputs
    return float(np.abs(output["logprobs"].array[len(prompt) - 1 :] - sequence.logprobs).mean())


LORA = LoraConfig(rank=4)
VARIANTS: dict[str, tuple[str, LoraConfig | None, dict[str, Any]]] = {
    "full": ("micro", None, {}),
    "8-bit moments, no copies": ("micro", None, {"moments": "8bit", "master_weights": False}),
    "offloaded, several micro-batches": ("micro", None, {"offload_optimizer": True, "micro_batch_tokens": 64}),
    "fp32 weights, compiled": ("micro", None, {"param_dtype": "float32", "compile": True}),
    "fp32": ("micro", None, {"dtype": "float32"}),
    "checkpointing, flex": ("micro", None, {"gradient_checkpointing": True, "attention": "flex"}),
    "varlen": ("micro", None, {"attention": "varlen"}),
    "dense": ("micro", None, {"attention": "dense"}),
    "gpt2, LoRA, checkpointing": ("gpt2-tiny", LORA, {"gradient_checkpointing": True}),
    "LoRA": ("micro", LORA, {}),
    "LoRA unmerged, shared engines": ("micro", LORA, {"lora": "unmerged", "share_engines": True}),
    "LoRA of one base": ("micro", LORA, {"lora": "shared"}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_setting_trains_samples_saves_and_resumes_on_a_gpu(name: str, gpu: None, tmp_path: Path) -> None:
    model, lora, settings = VARIANTS[name]
    data = policy_data()
    with ServiceClient(BackendConfig(engine="torch", **settings), tmp_path) as service:
        client = service.create_training_client(model, lora)
        trainer = trainer_of(client)
        assert all(p.device == GPU for p in trainer.model.parameters())
        assert trainer.packs == (settings.get("attention") != "dense")
        before = logprobs(client, data)
        held = client.save_weights_and_get_sampling_client()
        # Trap: opening the torch sampler gave the trainer's model another kernel, which takes no packed rows.
        client.forward_backward(data, "importance_sampling")
        client.forward_backward_custom(data, custom)
        norm = client.optim_step(AdamParams(1e-2, grad_clip_norm=1.0)).result().metrics["grad_norm"]
        assert np.isfinite(norm) and norm > 0
        after = logprobs(client, data)
        assert np.abs(after - before).mean() > 1e-3
        sampler = client.save_weights_and_get_sampling_client()
        assert sampled_gap(client, sampler) < GAP
        held.sample(ModelInput.from_ints([4, 5, 6]), 1, SamplingParams(max_tokens=2, top_p=0.9, top_k=20)).result()
        scores = sampler.compute_logprobs(data[0].model_input).result()
        assert len(scores) == data[0].model_input.length
        path = client.save_state("state").result().path
        client.save_weights_for_sampler("policy").result()
        client.forward_backward(data, "importance_sampling")
        client.optim_step(AdamParams(1e-2)).result()
        resumed = logprobs(client, data)
        client.load_state_with_optimizer(path).result()
        np.testing.assert_array_equal(logprobs(client, data), after)
        client.forward_backward(data, "importance_sampling")
        client.optim_step(AdamParams(1e-2)).result()
        np.testing.assert_array_equal(logprobs(client, data), resumed)


@pytest.mark.parametrize("settings", [{}, {"offload_optimizer": True}, {"moments": "8bit", "master_weights": False}])
def test_a_scalar_model_trains_and_resumes_on_a_gpu(settings: dict[str, Any], gpu: None, tmp_path: Path) -> None:
    with ServiceClient(BackendConfig(engine="torch", **settings), tmp_path) as service:
        client = service.create_scalar_client("micro")
        train(client, range(2))
        path = client.save_state("two").result().path
        train(client, range(2, 3))
        three = scalars(client)
        client.load_state_with_optimizer(path).result()
        train(client, range(2, 3))
        np.testing.assert_array_equal(scalars(client), three)


def test_terms_kept_forwards_and_the_base_without_its_adapter_on_a_gpu(gpu: None, tmp_path: Path) -> None:
    data = policy_data()
    likely = [
        Datum(d.model_input, {"target_tokens": d.loss_fn_inputs["target_tokens"], "weights": d.loss_fn_inputs["mask"]})
        for d in data
    ]
    with ServiceClient(BackendConfig(engine="torch"), tmp_path) as service:
        client = service.create_lora_training_client("micro", rank=4)
        first = logprobs(client, data)
        terms = [LossTerm(data, "importance_sampling"), LossTerm(likely, "cross_entropy")]
        kept = client.forward_terms(terms, keep=True).result()
        terms = [replace(term, kept_D=output.kept_D) for term, output in zip(terms, kept, strict=True)]
        again = client.forward_backward_terms(terms).result()
        client.optim_step(AdamParams(1e-2)).result()
        assert [output.metrics["loss:sum"] for output in kept] == [output.metrics["loss:sum"] for output in again]
        base = client.forward(data, "importance_sampling", without_adapter=True).result().loss_fn_outputs
        assert np.abs(np.concatenate([output["logprobs"].array for output in base]) - first).mean() < GAP
        assert np.abs(logprobs(client, data) - first).mean() > 1e-3


def test_the_passes_are_those_of_a_cpu_up_to_rounding(gpu: None, tmp_path: Path) -> None:
    data, found = policy_data(), []
    configs = (
        BackendConfig(device="cpu"),
        BackendConfig(),
        BackendConfig(attention="dense"),
        BackendConfig(attention="flex"),
        BackendConfig(dtype="float32"),
    )
    for config in configs:
        with ServiceClient(chz.replace(config, engine="torch"), tmp_path) as service:
            found.append(logprobs(service.create_training_client("micro"), data))
    assert all(0 < np.abs(p - found[0]).mean() < GAP for p in found[1:4])
    np.testing.assert_allclose(found[4], found[0], atol=1e-4)


def refuses(*_: Any) -> Any:
    raise RuntimeError("no such heads")


def not_a_number(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.nan * (query + key.mean() + value.mean()).transpose(1, 2)


@pytest.mark.parametrize(
    ("kernel", "replaced", "left", "reason"),
    [
        ("_of_sequences", refuses, "flex", "RuntimeError: no such heads"),
        ("_of_sequences", not_a_number, "flex", "the kernel's results differ by nan"),
        ("_flex", refuses, "varlen", "RuntimeError: no such heads"),
    ],
)
def test_rows_are_packed_with_the_kernel_that_has_the_heads(
    kernel: str,
    replaced: Any,
    left: str,
    reason: str,
    gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Flash attention has heads of up to 256, and FlexAttention's blocks may not fit a smaller GPU."""
    monkeypatch.setattr(attention, kernel, replaced)
    trainer = Trainer("micro", BackendConfig())
    assert f"rows are packed with backend.attention={left}: {reason}" in capsys.readouterr().out
    assert (trainer.packs, trainer.shares_prefixes, trainer.whole_sequences) == (True, left == "flex", left == "varlen")
    trainer.run(policy_data(), "importance_sampling")


# Trap: while vLLM records its graphs, an allocation or a copy of another thread breaks the recording, or fails.
@pytest.mark.parametrize(("settings", "lora"), [({"share_engines": True}, None), ({"lora": "shared"}, LORA)])
def test_nothing_computes_while_an_engine_may_open(
    settings: dict[str, Any], lora: LoraConfig | None, gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_lock: set[str] = set()

    def noted(func: Any, args: Any, kwargs: Any) -> Any:
        out = computed(func, args, kwargs)
        locked = device_lock._computing or device_lock._held_alone
        if not (locked or func.is_view or func in NO_WORK) and any(
            isinstance(x, OnGpu) for x in tree_leaves((args, kwargs, out))
        ):
            frames = [f for f in traceback.extract_stack() if "/posttrain/" in f.filename]
            without_lock.add(f"{func} {frames[-1].name if frames else ''}")
        return out

    monkeypatch.setattr(tests.pretend_gpu, "computed", noted)
    data = policy_data()
    with ServiceClient(BackendConfig(engine="torch", **settings), tmp_path) as service:
        client = service.create_training_client("micro", lora)
        sampler = client.save_weights_and_get_sampling_client()
        client.forward_backward(data, "importance_sampling")
        client.optim_step(AdamParams(1e-2, grad_clip_norm=1.0)).result()  # before it `sampler` gets a copy
        sampler.sample(ModelInput.from_ints([4, 5]), 1, SamplingParams(max_tokens=2)).result()
        client.save_weights_for_sampler("policy").result()
        client.load_state_with_optimizer(client.save_state("state").result().path).result()
    assert not without_lock


@pytest.mark.parametrize("settings", [{}, {"moments": "8bit"}, {"moments": "8bit", "master_weights": False}])
def test_a_step_of_the_optimizer_copies_nothing_to_the_gpu(
    settings: dict[str, Any], gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait there for all that the GPU computes, for each weight."""
    moved: list[torch.Size] = []

    def noted(func: Any, args: Any, kwargs: Any) -> Any:
        if func in MOVES and any(isinstance(x, torch.Tensor) and not isinstance(x, OnGpu) for x in tree_leaves(args)):
            moved.append(args[0].shape)
        return computed(func, args, kwargs)

    trainer = Trainer("micro", BackendConfig(**settings))
    for _ in range(2):
        trainer.run(policy_data(), "importance_sampling")
        moved.clear()  # the first step makes what the others need
        with monkeypatch.context() as patched:
            patched.setattr(tests.pretend_gpu, "computed", noted)
            trainer.optim_step(AdamParams(1e-3, grad_clip_norm=1.0))
    assert not moved


def test_numbers_of_two_devices_do_not_meet(gpu: None) -> None:
    """The stand-in itself."""
    on_gpu, on_cpu = torch.ones(2, 2, device=GPU), torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="same device"):
        torch.mm(on_gpu, on_cpu)
    with pytest.raises(TypeError, match="convert cuda:0"):
        on_gpu.numpy()
    with pytest.raises(RuntimeError, match="'cuda' device type for generator"):
        torch.rand(2, device=GPU, generator=torch.Generator())
    with pytest.raises(RuntimeError, match="that Python may free"):
        on_cpu.to(GPU, non_blocking=True)
    assert on_cpu.pin_memory().to(GPU, non_blocking=True).device == GPU
    with torch.autocast("cuda", torch.bfloat16):
        product = torch.nn.functional.linear(on_gpu, on_gpu)
    assert product.dtype == torch.bfloat16 and product.device == GPU and product.cpu().device.type == "cpu"
    assert (on_gpu * torch.tensor(2.0)).sum().item() == 8 and on_gpu[torch.tensor([0])].shape == (1, 2)
