"""Two and three ranks on the CPU train what one process trains: the same gradients for every loss,
model and kind of fine-tuning, the same errors, and the same folders.
"""

# Trap: a rank that makes a pass less than the others; a gradient that is a mean; a loss that fails
# on one rank's rows only; what is not sharded, and what is not fp32.

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import multiprocessing
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.fsdp import FSDPModule

from posttrain.backend import ranks
from posttrain.backend.batching import micro_batches
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import NonFiniteError
from posttrain.backend.loss_terms import LossTerm
from posttrain.backend.losses import LOSSES, Tensors
from posttrain.backend.merged_lora import _weight
from posttrain.backend.scalar_trainer import ScalarTrainer
from posttrain.backend.sharded_trainer import ShardedScalarTrainer, ShardedTrainer
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.trainer import Trainer
from posttrain.backend.types import AdamParams, Datum, LoraConfig
from posttrain.backend.weight_files import read_joined, write_shard
from tests.commands import CONTEXT
from tests.conftest import policy_data, random_tokens, rounded, too_few_gpus
from tests.every_architecture import random_model, save
from tests.test_scalar_model import bce, scalar_data

SMALL = BackendConfig(micro_batch_tokens=60)  # several micro-batches, of unequal number
HALF = BackendConfig(micro_batch_tokens=60, dtype="bfloat16")  # as on a GPU
OPTIONS: dict[str, dict[str, float]] = {"dro": {"beta": 0.2}}


def likelihood_data(data: list[Datum]) -> list[Datum]:
    """Weights instead of advantages, some of them 0."""
    return [
        Datum(datum.model_input, {"target_tokens": datum.loss_fn_inputs["target_tokens"],
                                  "weights": (np.arange(datum.model_input.length) % 3).astype(np.float32)})
        for datum in data
    ]  # fmt: skip


def group_data() -> list[Datum]:
    """Groups behind shared prompts."""
    data: list[Datum] = []
    for group in range(3):
        prompt = random_tokens(np.random.default_rng(group), 20 + group)
        for datum in policy_data(4, seed=group, longest=9):
            tokens = [*prompt, *datum.model_input.to_ints()]
            inputs = {name: np.concatenate([np.zeros(len(prompt), value.array.dtype), value.array])
                      for name, value in datum.loss_fn_inputs.items()}  # fmt: skip
            inputs["target_tokens"] = np.append(np.array(tokens[1:]), 5)
            data.append(Datum(datum.model_input.from_ints(tokens), inputs))
    return data


def losses_of(name: str, trainer: Trainer) -> None:
    data = policy_data(11, seed=2)
    if name == "cross_entropy":
        data = likelihood_data(data)
    if name == "gspo":
        for datum in data:
            datum.loss_fn_inputs["sequence_ratio_mask"] = datum.loss_fn_inputs["mask"]
    trainer.run(data, name, OPTIONS.get(name))


def terms(trainer: Trainer) -> None:
    """Losses that share their passes, and two calls whose gradients add up."""
    trainer.run_terms([LossTerm(policy_data(5, seed=3), "ppo"), LossTerm(policy_data(4, seed=4), "reinforce")])
    trainer.run(policy_data(1, seed=5), "importance_sampling")  # fewer rows than ranks


def without_gradient(trainer: Trainer) -> None:
    """Data without advantage pass forward only, and a clipped loss has zeros."""
    data = policy_data(7, seed=6)
    for datum in data[::2]:
        datum.loss_fn_inputs["advantages"].array[:] = 0
    for datum in data[1:3]:
        datum.loss_fn_inputs["logprobs"].array[:] = -15.0
        datum.loss_fn_inputs["advantages"].array[:] = 1.0
    trainer.run(data, "ppo")


def custom(trainer: Trainer) -> None:
    def loss(data: list[Datum], p_D: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return torch.stack([p.square().mean() * (d + 1) for d, p in enumerate(p_D)]).sum(), {"data": len(data)}

    metrics = trainer.run_custom(policy_data(6, seed=7), loss).metrics
    assert metrics["data"] == 6
    assert metrics["surrogate_loss:sum"] == pytest.approx(2 * metrics["loss:sum"], rel=1e-4)  # of squares


def scalars(trainer: Trainer) -> None:
    assert trainer.scalar_head is not None
    head = torch.linspace(-1, 1, trainer.scalar_head.shape[1])[None]
    trainer.scalar_head.data.copy_(ranks.shard_like(head, trainer.scalar_head.data))
    trainer.run(scalar_data(7, prompt=[3, 4, 5]), bce)


# name -> kind of trainer, model, adapter, passes
CASES: dict[str, tuple[type[Trainer], str, LoraConfig | None, Callable[[Trainer], None]]] = {
    **{name: (Trainer, "micro", None, partial(losses_of, name)) for name in LOSSES},
    "lora": (Trainer, "micro", LoraConfig(rank=4), partial(losses_of, "importance_sampling")),
    "terms": (Trainer, "micro", None, terms),
    "no gradient": (Trainer, "micro", None, without_gradient),
    "shared prompts": (Trainer, "micro", None, lambda trainer: trainer.run(group_data(), "ppo")),  # type: ignore[dict-item]
    "untied": (Trainer, "gpt2-tiny", None, partial(losses_of, "ppo")),
    "custom": (Trainer, "micro", None, custom),
    # what its layers train depends on a row's length; it has saved tensors that are no weights
    "compressed": (Trainer, "deepseek_v4", None, partial(losses_of, "ppo")),
    "frozen": (Trainer, "ernie4_5_moe", None, partial(losses_of, "ppo")),  # a new model does not train all
    "shared layers": (Trainer, "zamba2", None, partial(losses_of, "ppo")),  # weights of one layer are another's, too
    "scalar": (ScalarTrainer, "micro", None, scalars),
    "scalar lora": (ScalarTrainer, "micro", LoraConfig(rank=4), scalars),
}
# One process differs by 1.03e-5 between micro-batches of 60 and of 100 tokens, in Mamba's D.
ROUNDED = {"shared layers": 2e-5}
SHARDED = {Trainer: ShardedTrainer, ScalarTrainer: ShardedScalarTrainer}


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """As a step sees them; with their norm."""
    trainer.trained.hand_over_gradients()
    norm = trainer._grad_norm([p.grad for p in trainer.named_trainable.values() if p.grad is not None])
    found = {name: ranks.whole(p.grad).clone() for name, p in trainer.named_trainable.items() if p.grad is not None}
    return found | {"norm": norm.reshape(1)}


def open_trainer(
    case: str, processes: ranks.Processes | None = None, sharding: str = "shard", config: BackendConfig = SMALL
) -> Trainer:
    kind, model, lora, _ = CASES[case]
    model = FOLDERS.get(model, model)
    if processes is None:
        return kind(model, config, 0, lora)
    return SHARDED[kind](model, config, 0, lora, processes=processes, shard=sharding == "shard")


FOLDERS: dict[str, str] = {}  # of models that are no presets


def use_models_of(folder: Path) -> None:
    FOLDERS.update({kind: str(folder / kind) for kind in ("deepseek_v4", "ernie4_5_moe", "zamba2")})


def fails_on_one(p_N: torch.Tensor, inputs: Tensors) -> tuple[torch.Tensor, Tensors]:
    if (inputs["advantages"] == 7).any():
        raise ValueError("datum 3 is bad")
    return p_N * inputs["advantages"], {}


def infinite_on_one(p_N: torch.Tensor, inputs: Tensors) -> tuple[torch.Tensor, Tensors]:
    return p_N * inputs["advantages"] * torch.where(inputs["advantages"] == 7, torch.inf, 1.0), {}


def marked_data() -> list[Datum]:
    data = policy_data(6, seed=8)
    data[3].loss_fn_inputs["advantages"].array[:] = 7
    return data


def outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error} {getattr(error, 'datum_indices', '')}"
    return "no error"


def compute_gradients(processes: ranks.Processes, folder: Path) -> None:
    """What came out, in a file of the first rank."""
    found: dict[str, Any] = {}
    for sharding in ("shard", "replicate"):
        opened: dict[str, Trainer] = {}
        for case, (*model, passes) in CASES.items():
            trainer = opened.get(str(model)) or open_trainer(case, processes, sharding)
            opened[str(model)] = trainer
            passes(trainer)
            found[f"{case}, {sharding}"] = gradients(trainer)
            trainer.zero_grad()
        trainer = opened[str([Trainer, "micro", None])]
        before = {name: tensor.clone() for name, tensor in trainer.sampled.sampler_weights()}
        errors = [outcome(lambda t=trainer, fn=fn: t.run(marked_data(), fn)) for fn in (fails_on_one, infinite_on_one)]
        trainer.zero_grad()
        found[f"errors, {sharding}"] = processes.gathered(errors)
        trainer.run(policy_data(5), "ppo")
        if processes.rank == processes.count - 1:
            parameter = next(iter(trainer.named_trainable.values()))
            assert parameter.grad is not None
            ranks.local(parameter.grad).view(-1)[:1].fill_(torch.nan)
        found[f"steps, {sharding}"] = processes.gathered(outcome(lambda t=trainer: t.optim_step(AdamParams(1e-3))))
        after = dict(trainer.sampled.sampler_weights())
        found[f"unchanged, {sharding}"] = all(torch.equal(before[name], after[name]) for name in before)
        found[f"step, {sharding}"] = two_steps(trainer)
    if processes.is_first:
        torch.save(found, folder / f"found{processes.count}.pt")


def two_steps(trainer: Trainer) -> tuple[list[float], torch.Tensor]:
    """Norms of two gradients, of which the second is clipped, and all weights after it. Adam would not notice how
    long one gradient is, but how long it is beside the other."""
    trainer.run(policy_data(5), "importance_sampling")
    first = trainer.optim_step(AdamParams(1e-3, grad_clip_norm=1e6)).metrics["grad_norm"]
    trainer.run(policy_data(5, seed=1), "importance_sampling")
    second = trainer.optim_step(AdamParams(1e-3, grad_clip_norm=first / 3)).metrics["grad_norm"]
    return [first, second], torch.cat([tensor.flatten() for _, tensor in sorted(trainer.sampled.sampler_weights())])


def publish_weights(processes: ranks.Processes, folder: Path) -> None:
    """After a step, so that an adapter's update is not 0."""
    same = {}
    for case in ("ppo", "untied", "lora"):
        for sharding in ("shard", "replicate"):
            trainer = open_trainer(case, processes, sharding)
            assert isinstance(trainer, ShardedTrainer)
            CASES[case][-1](trainer)
            trainer.optim_step(AdamParams(1e-2))
            files = folder / f"weights {case} {sharding} {processes.count}"
            write_shard(files, processes.rank, processes.count, trainer.weight_shard())
            whole = {name: tensor.clone() for name, tensor in trainer.sampled.sampler_weights()}
            processes.wait()
            read = dict(read_joined(files))
            same[f"{case}, {sharding}"] = read.keys() == whole.keys() and all(
                torch.equal(read[name], tensor) for name, tensor in whole.items()
            )
    if processes.is_first:
        torch.save(same, folder / "published.pt")


def compute_in_bf16(processes: ranks.Processes, folder: Path) -> None:
    """The norm of a step, outputs after it, and of an adapter whether a pass reads the sampler's weights."""
    found: dict[str, Any] = {"dtypes": set()}
    for case in BF16:
        trainer = open_trainer(case, processes, config=HALF)
        if case == "ppo":
            assert isinstance(trainer, ShardedTrainer)
            found["units"] = sum(isinstance(module, FSDPModule) for module in trainer._root.modules())
            found["layers"] = len(list(trainer._layers()))
        for layer in trainer.base.modules() if case == "ppo" else ():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_hook(lambda layer, *_: found["dtypes"].add(layer.weight.dtype))
        found[case] = step_in_bf16(case, trainer)
    read = {}
    for name, layer in trainer.base.named_modules():
        if hasattr(layer, "lora_A"):
            layer.register_forward_hook(lambda layer, *_, name=name: read.update({f"{name}.weight": _weight(layer)}))
    trainer.run(policy_data(5), "ppo", backward=False)
    sent = dict(trainer.sampled.sampler_weights())
    found["as sent"] = len(read) == 14 and all(torch.equal(sent[name], weight) for name, weight in read.items())
    if processes.is_first:
        torch.save(found, folder / "bf16.pt")


BF16 = ("ppo", "scalar", "scalar lora", "lora")


def step_in_bf16(case: str, trainer: Trainer) -> tuple[float, np.ndarray]:
    CASES[case][-1](trainer)
    norm = trainer.optim_step(AdamParams(1e-3)).metrics["grad_norm"]
    data, loss = (scalar_data(4, seed=1), bce) if "scalar" in case else (policy_data(4, seed=1), "ppo")
    outputs = trainer.run(data, loss, backward=False).loss_fn_outputs
    return norm, np.concatenate([output[trainer.output_name].array for output in outputs])


# cases whose checkpoints are read at other numbers of ranks, with the sharding of those who write
SAVED = {
    "ppo": "shard",
    "untied": "shard",
    "lora": "shard",
    "scalar": "shard",
    "compressed": "shard",
    "shared layers": "shard",
    "terms": "replicate",
}


def write_checkpoints(processes: ranks.Processes | None, folder: Path) -> None:
    count = processes.count if processes else 1
    for case, sharding in SAVED.items():
        trainer = open_trainer(case, processes, sharding)
        CASES[case][-1](trainer)
        trainer.optim_step(AdamParams(1e-2))
        for buffer in biases_of(trainer):
            buffer.fill_(0.1)
        trainer.save_state(load_tokenizer("micro", None), folder / f"{case} {count}", {"step": 1})


def biases_of(trainer: Trainer) -> list[torch.Tensor]:
    """Of routers: saved, and no weights."""
    return [buffer for name, buffer in trainer.base.named_buffers() if name.endswith("correction_bias")]


def read_checkpoints(processes: ranks.Processes | None, folder: Path) -> None:
    """Reads those of every number of ranks, and writes each again."""
    count = processes.count if processes else 1
    for case in SAVED:
        trainer = open_trainer(case, processes)
        for wrote in (1, 2, 3):
            trainer.load_state(folder / f"{case} {wrote}", with_optimizer=True)
            assert all(torch.equal(buffer, torch.full_like(buffer, 0.1)) for buffer in biases_of(trainer))
            trainer.save_state(load_tokenizer("micro", None), folder / f"{case} {wrote} {count}", {"step": 1})


PHASES = [(2, compute_gradients), (3, compute_gradients), (2, compute_in_bf16), (3, publish_weights), (2, write_checkpoints),
          (3, write_checkpoints), (2, read_checkpoints), (3, read_checkpoints)]  # fmt: skip


def one_of_several(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    use_models_of(folder)
    for phase, (count, work) in enumerate(PHASES):
        if rank < count:
            processes = ranks.join(rank, count, FileStore(str(folder / f"store{phase}"), count))
            work(processes, folder)
            dist.destroy_process_group()
        while rank >= count and not (folder / f"done{phase}").exists():
            time.sleep(0.1)
        if rank == 0:
            (folder / f"done{phase}").touch()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := too_few_gpus(3):
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("ranks")
    use_models_of(folder)
    for kind, model_folder in FOLDERS.items():
        save(random_model(kind), Path(model_folder))
    write_checkpoints(None, folder)
    multiprocessing.start_processes(one_of_several, (folder,), 3, start_method=CONTEXT.get_start_method())  # type: ignore[attr-defined]
    read_checkpoints(None, folder)
    return folder


@pytest.fixture(scope="module", params=[2, 3])
def several(request: pytest.FixtureRequest, folder: Path) -> dict[str, Any]:
    return torch.load(folder / f"found{request.param}.pt", weights_only=False)


def test_every_row_is_of_one_rank_and_ranks_have_as_much_to_do() -> None:
    data = policy_data(23, seed=9)
    lengths_D = [datum.model_input.length for datum in data]
    cut = partial(micro_batches, data, range(len(data)), 60, torch.device("cpu"), share=False)
    for count in (1, 2, 3, 30):
        batches_R = [[*cut(rank=rank, ranks=count)] for rank in range(count)]
        assert len({len(batches) for batches in batches_R}) == 1
        parts_R = [[part for batch in batches for part in (batch.loss, batch.others)] for batches in batches_R]
        assert all(len(part.rows_M) == len(part.targets_MK) == len(part.datum_N) for parts in parts_R for part in parts)
        found_R = [[x for p in parts for x in zip(p.datum_N, p.position_N, strict=True)] for parts in parts_R]
        assert sorted(sum(found_R, [])) == [(d, t) for d, length in enumerate(lengths_D) for t in range(length)]
        tokens_R = [len(found) for found in found_R]
        assert max(tokens_R) - min(tokens_R) <= max(lengths_D)


@pytest.mark.slow
def test_gradients_are_those_of_one_process(several: dict[str, Any]) -> None:
    for case, (*_, passes) in CASES.items():
        alone = open_trainer(case)
        passes(alone)
        expected = gradients(alone)
        for sharding in ("shard", "replicate"):
            for name, gradient in several[f"{case}, {sharding}"].items():
                gap = (gradient - expected[name]).norm()
                # 0, up to rounding, where a router's weights do not matter
                assert gap <= rounded(ROUNDED.get(case, 1e-5)) * expected[name].norm().clamp(min=1.0), (
                    case,
                    sharding,
                    name,
                )
            assert several[f"{case}, {sharding}"].keys() == expected.keys()


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["shard", "replicate"])
def test_ranks_fail_together_and_change_nothing(several: dict[str, Any], sharding: str) -> None:
    first, *others = several[f"errors, {sharding}"]
    assert all(errors == first for errors in others)
    assert first[0].startswith("ValueError: datum 3 is bad")
    assert first[1].startswith("NonFiniteError") and first[1].endswith("[3]")
    steps = several[f"steps, {sharding}"]
    assert all(text == steps[0] and text.startswith(NonFiniteError.__name__) for text in steps)
    assert several[f"unchanged, {sharding}"]
    alone = open_trainer("ppo")
    before = torch.cat([tensor.flatten() for _, tensor in sorted(alone.sampled.sampler_weights())])
    (norms, after), (expected, alike) = several[f"step, {sharding}"], two_steps(alone)
    assert norms == pytest.approx(expected, rel=rounded(1e-5)) and norms[1] > norms[0] / 2
    assert (after - alike).norm() < rounded(1e-2) * (alike - before).norm()


@pytest.mark.slow
def test_published_weights_are_those_of_the_trainer(folder: Path) -> None:
    same = torch.load(folder / "published.pt")
    assert len(same) == 6 and all(same.values()), same


@pytest.mark.slow
def test_passes_in_bf16(folder: Path) -> None:
    found = torch.load(folder / "bf16.pt", weights_only=False)
    assert found["as sent"] and found["dtypes"] == {torch.bfloat16}
    assert found["units"] == found["layers"] + 1  # each, and what is outside them
    for case in BF16:
        norm, outputs = step_in_bf16(case, open_trainer(case, config=HALF))
        assert found[case][0] == pytest.approx(norm, rel=1e-2), case
        assert np.abs(found[case][1] - outputs).mean() < 0.02 * np.abs(outputs).mean(), case


@pytest.mark.slow
@pytest.mark.parametrize("case", SAVED)
def test_checkpoints_are_bitwise_the_same_at_any_number_of_ranks(case: str, folder: Path) -> None:
    def tensors(path: Path) -> dict[str, torch.Tensor]:
        files = sorted(path.rglob("*.safetensors"))
        return {f"{file.relative_to(path)} {name}": t for file in files for name, t in load_file(file).items()}

    def files(path: Path) -> list[str]:
        return sorted(str(file.relative_to(path)) for file in path.rglob("*"))

    for wrote in (1, 2, 3):
        saved = tensors(folder / f"{case} {wrote}")
        assert any("exp_avg_sq:" in name for name in saved)
        assert files(folder / f"{case} {wrote}") == files(folder / f"{case} 1")
        for read in (1, 2, 3):
            again = tensors(folder / f"{case} {wrote} {read}")
            assert again.keys() == saved.keys() == tensors(folder / f"{case} 1").keys()
            assert all(torch.equal(again[name], tensor) for name, tensor in saved.items()), (wrote, read)
