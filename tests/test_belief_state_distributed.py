"""Two processes on the CPU train what one trains: the same gradients, curves and checkpoints, with
whole weights and with sharded ones.
"""

# Trap: more processes changing a gradient; FSDP weights in place of the parameters the optimizer
# knows.

import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import multiprocessing
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from posttrain.backend.errors import ConfigError
from posttrain.backend.ranks import Processes, joined_processes
from posttrain.backend.types import AdamParams
from posttrain.tracking.metrics_log import read_metrics
from recipes.belief_state import train as recipe
from recipes.belief_state.star_graph import StarGraphBuilder
from recipes.libraries.belief_state.distributed import ParallelTrainer
from recipes.libraries.belief_state.files import Model
from recipes.libraries.belief_state.model import BeliefState, BeliefStateConfig, NextToken
from recipes.libraries.belief_state.pairs import PairObjective
from recipes.libraries.belief_state.trainer import BeliefStateTrainer, PassConfig, TokenBatch
from tests.commands import CONTEXT
from tests.conftest import ROUNDING, too_few_gpus

EOS, STEPS = 1, 4
CONFIG = BeliefStateConfig(vocab_size=17, eos_id=EOS, num_layers=2, num_heads=2, hidden=32)
OBJECTIVE = PairObjective(subsample=0.5)
# two passes for each process, and another number of chunks in each
PASSES = PassConfig(rows_per_pass=2, pairs_per_chunk=11)
ADAM = AdamParams(1e-2, grad_clip_norm=0.5, weight_decay=0.1)
KINDS = {"bst": BeliefState, "gpt": NextToken}
OF_A_GRADIENT, OF_A_CURVE = ROUNDING / 3, ROUNDING * 20 / 3


def batch(step: int) -> TokenBatch:
    """Packed rows: those of the first process hold many short documents, the others few pairs
    less.
    """
    rng = np.random.default_rng(step)
    tokens_B_T = rng.integers(2, 17, (8, 14))
    tokens_B_T[:3, ::4] = EOS
    mask_B_T = rng.random((8, 14)) < np.linspace(0.2, 0.9, 8)[:, None]
    return TokenBatch(tokens_B_T, packed=True, loss_mask_B_T=mask_B_T)


def train(trainer: BeliefStateTrainer, first: int, steps: int) -> list[dict[str, float]]:
    return [
        trainer.forward_backward(batch(step), (5, step)) | trainer.optim_step(ADAM).metrics
        for step in range(first, first + steps)
    ]


def gradients(trainer: BeliefStateTrainer) -> dict[str, torch.Tensor]:
    """Of one step, as `optim_step` sees them."""
    trainer.forward_backward(batch(0), (5, 0))
    if isinstance(trainer, ParallelTrainer):
        trainer._sum_gradients()
    found = {name: _whole(parameter.grad) for name, parameter in trainer.model.named_parameters()}
    trainer.zero_grad()
    return found


def _whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def model(kind: str) -> Model:
    return KINDS[kind](CONFIG, seed=3)


def one_of_two(rank: int, folder: Path) -> None:
    """What each of the two processes does; the first writes down what came out."""
    ports = (folder / "ports").read_text().split()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": ports[0],
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with joined_processes() as processes:
        for kind in KINDS:
            for shard in (False, True):
                name = f"{kind}-{'shard' if shard else 'replicate'}"
                trainer = ParallelTrainer(model(kind), OBJECTIVE, PASSES, processes, shard)
                found[name] = {"gradients": gradients(trainer), "curve": train(trainer, 0, STEPS // 2)}
                found[name]["uneven"] = trainer.evaluate(TokenBatch(batch(9).tokens_B_T[:3]), (1,))
                with pytest.raises(ConfigError, match="3 rows does not divide by 2 processes"):
                    trainer.forward_backward(TokenBatch(batch(9).tokens_B_T[:3]))
                trainer.save_state(folder / name, {"next_step": 2})
                again = ParallelTrainer(KINDS[kind](CONFIG, seed=77), OBJECTIVE, PASSES, processes, shard)
                again.load_state(folder / name, with_optimizer=True)
                found[name]["curve"] += train(again, STEPS // 2, STEPS - STEPS // 2)
        found["stop"] = processes.any(rank == 1)
        if processes.is_first:
            torch.save(found, folder / "found.pt")
    os.environ["MASTER_PORT"] = ports[1]
    asyncio.run(recipe.main(recipe_config(folder / "run")))


def recipe_config(log_path: Path) -> recipe.Config:
    """Of recipes/belief_state/train.py on star graphs."""
    return recipe.Config(
        data=StarGraphBuilder(num_test=16),
        num_layers=1,
        num_heads=2,
        hidden=16,
        batch_size=4,
        num_steps=3,
        warmup_steps=0,
        eval_every=2,
        parallel="shard",
        log_path=str(log_path),
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    if reason := too_few_gpus(2):
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("two")
    # The processes meet in a store of this one, as in torchrun's: a port that is chosen, and free, may be taken later.
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(2)]
    (folder / "ports").write_text(" ".join(str(store.port) for store in stores))
    multiprocessing.start_processes(one_of_two, (folder,), 2, start_method=CONTEXT.get_start_method())  # type: ignore[attr-defined]
    return torch.load(folder / "found.pt"), folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["replicate", "shard"])
def test_two_processes_train_what_one_trains(two, kind, mode):
    found, folder = two
    alone = BeliefStateTrainer(model(kind), OBJECTIVE, PASSES)
    for name, gradient in gradients(alone).items():
        torch.testing.assert_close(found[f"{kind}-{mode}"]["gradients"][name], gradient, rtol=0, atol=OF_A_GRADIENT)
    curve, theirs = train(alone, 0, STEPS), found[f"{kind}-{mode}"]["curve"]
    assert (
        len({round(metrics["loss"], 3) for metrics in curve}) == STEPS and curve[0]["grad_norm"] > ADAM.grad_clip_norm
    )
    for mine, metrics in zip(curve, theirs, strict=True):
        assert metrics == pytest.approx(mine, abs=OF_A_CURVE)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_are_those_of_one_process(two, kind):
    """Its shards are whole in the file: one process goes on from it, and ends where it would have
    ended.
    """
    found, folder = two
    alone = BeliefStateTrainer(model(kind), OBJECTIVE, PASSES)
    curve = train(alone, 0, STEPS)
    for mode in ("replicate", "shard"):
        resumed = BeliefStateTrainer(KINDS[kind](CONFIG, seed=77), OBJECTIVE, PASSES)
        resumed.load_state(folder / f"{kind}-{mode}", with_optimizer=True)
        for mine, metrics in zip(curve[STEPS // 2 :], train(resumed, STEPS // 2, STEPS // 2), strict=True):
            assert metrics == pytest.approx(mine, abs=OF_A_CURVE)
        files = sorted(str(path.relative_to(folder)) for path in (folder / f"{kind}-{mode}").rglob("*.*"))
        names = [
            "belief_state.json",
            "model.safetensors",
            "training_state/optimizer.safetensors",
            "training_state/training_state.json",
        ]
        assert files == [f"{kind}-{mode}/{name}" for name in names]


def test_the_recipe_in_two_processes_is_that_of_one(two, tmp_path):
    _, folder = two
    asyncio.run(recipe.main(recipe_config(tmp_path / "run")))
    alone, theirs = (read_metrics(path / "run") for path in (tmp_path, folder))
    assert [record["step"] for record in theirs] == [record["step"] for record in alone] == [0, 1, 2, 3]
    for mine, record in zip(alone, theirs, strict=True):
        names = [name for name in mine if not name.startswith(("time/", "progress"))]
        assert [record[name] for name in names] == pytest.approx([mine[name] for name in names], abs=OF_A_CURVE)


def test_what_does_not_divide_is_evaluated_whole_and_a_stop_reaches_everyone(two):
    found, _ = two
    alone = BeliefStateTrainer(model("bst"), OBJECTIVE, PASSES)
    train(alone, 0, STEPS // 2)
    expected = alone.evaluate(TokenBatch(batch(9).tokens_B_T[:3]), (1,))
    for mode in ("replicate", "shard"):
        assert found[f"bst-{mode}"]["uneven"] == pytest.approx(expected, abs=OF_A_CURVE)
    assert found["stop"] is True


def test_one_process_needs_no_group_and_shares_cover_the_batch():
    with joined_processes() as processes:
        assert processes == Processes(0, 1) and processes.is_first and processes.any(True) and not processes.any([])
    shares = [Processes(rank, 3).share(12) for rank in range(3)]
    assert [row for share in shares for row in share] == list(range(12))
