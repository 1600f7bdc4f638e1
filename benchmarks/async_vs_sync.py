"""The RL step when environments are slow: synchronous, streaming and asynchronous on the same work,
and where the time goes.

    python benchmarks/async_vs_sync.py [--rounds 2] [--steps 8] [--engine torch]

64 environments at once (8 groups of 8), two turns each, and every turn takes from 0.2 s to 2 s of
waiting, as a tool or a remote grader would; which environment waits how long is the same for all
sides. The loop is rl.train.main's own. `idle` is the part of the 64 places in which no environment
is under way (waiting for the slowest of a batch, or for training), `nothing` the part of the time
in which neither sampler, environment nor trainer works. Left out: several machines, episodes of
very different length.
"""

import argparse
import asyncio
import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:  # run as a file: the packages are one folder up
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import chz
import numpy as np

from benchmarks.report import alternate, over, wait_until_quiet, write_report
from posttrain.backend.config import BackendConfig
from posttrain.backend.ranges import COUNT
from posttrain.backend.types import ModelInput
from posttrain.renderers.types import Renderer
from posttrain.tracking.metrics_log import read_metrics
from rl import train
from rl.rollouts import RolloutLimits
from rl.types import Action, Env, EnvGroupBuilder, Observation, RLDataset, RLDatasetBuilder, StepResult, StopCondition

GROUPS, GROUP_SIZE, TURNS, MAX_TOKENS, PROMPT = 8, 8, 2, 16, 64
SLOWEST, FASTEST = 2.0, 0.2  # seconds of a turn
SIDES = {
    "synchronous": {},
    "streaming": {"num_minibatches": 4},
    "1 step off-policy": {"max_steps_off_policy": 1},
    "2 steps off-policy": {"max_steps_off_policy": 2},
    "4 steps off-policy": {"max_steps_off_policy": 4},
}
WARMUP = 3


class SlowEnv(Env):
    """Waits, then rewards tokens of the lower half; the second turn extends the first."""

    def __init__(self, prompt: list[int], seconds: Sequence[float]):
        self.tokens, self.seconds, self.turn = prompt, seconds, 0

    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        return ModelInput.from_ints(self.tokens), []

    async def step(self, action: Action) -> StepResult:
        await asyncio.sleep(self.seconds[self.turn])
        self.turn += 1
        self.tokens = [*self.tokens, *action, 10]
        reward = float(np.mean(np.array(action) < 130))
        return StepResult(reward, self.turn == TURNS, ModelInput.from_ints(self.tokens), [])


class SlowGroup(EnvGroupBuilder):
    def __init__(self, seed: tuple[int, ...]):
        self.seed = seed

    async def make_envs(self) -> Sequence[Env]:
        rng = np.random.default_rng(self.seed)
        prompt = rng.integers(4, 260, PROMPT).tolist()
        return [
            SlowEnv(list(prompt), seconds) for seconds in rng.uniform(FASTEST, SLOWEST, (GROUP_SIZE, TURNS)).tolist()
        ]


class SlowDataset(RLDataset):
    def __init__(self, n_batches: int):
        self.n_batches = n_batches

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        return [SlowGroup((index, p)) for p in range(GROUPS)]

    def __len__(self) -> int:
        return self.n_batches


@chz.chz
class SlowBuilder(RLDatasetBuilder):
    n_batches: int = chz.field(default=12, validator=COUNT, doc="batches")
    batch_size: int = chz.field(default=GROUPS, validator=COUNT, doc="groups per batch")

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, None]:
        return SlowDataset(self.n_batches), None


def run(steps: int, engine: str, model: str, settings: dict[str, Any]) -> dict[str, float]:
    """Means over the steps after the warm-up and before the last ones, in which no batch is left to
    be sampled ahead.
    """
    drained = settings.get("max_steps_off_policy", 0)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = train.Config(
            env=SlowBuilder(n_batches=WARMUP + steps + drained),
            model_name=model,
            max_tokens=MAX_TOKENS,
            learning_rate=1e-4,
            limits=RolloutLimits(env_seconds=60),
            concurrent_rollouts=GROUPS * GROUP_SIZE,
            save_every=0,
            transcript_every=0,
            log_path=f"{folder}/run",
            backend=BackendConfig(engine=engine),  # type: ignore[arg-type]
            **settings,
        )
        asyncio.run(train.main(config))
        records = read_metrics(Path(folder) / "run")[WARMUP : WARMUP + steps]
    seconds = [record["time/total"] for record in records]

    def mean(name: str) -> float:
        """Weighed by the steps' time."""
        return sum(record.get(f"time/share/{name}", 0.0) * s for record, s in zip(records, seconds, strict=True)) / sum(
            seconds
        )

    return {
        "seconds_per_step": sum(seconds) / len(seconds),
        **{f"share_{kind}": mean(kind) for kind in ("sampling", "env", "train", "sync")},
        "nothing": mean("idle"),
        "idle": max(0.0, 1 - mean("rollouts_in_flight") / (GROUPS * GROUP_SIZE)),
        "logprob_gap": float(np.mean([record["optim/logprob_gap_mean"] for record in records])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a round")
    parser.add_argument("--engine", default="torch", choices=("torch", "vllm"))
    parser.add_argument("--model", default="tiny")
    arguments = parser.parse_args()
    load = wait_until_quiet()
    sides = alternate(
        {
            name: partial(run, arguments.steps, arguments.engine, arguments.model, settings)
            for name, settings in SIDES.items()
        },
        arguments.rounds,
    )
    figures = {
        f"{name}: {key}": median(side[key] for side in rounds) for name, rounds in sides.items() for key in rounds[0]
    }
    seconds = {name: [side["seconds_per_step"] for side in rounds] for name, rounds in sides.items()}
    ratios = {
        f"{name}: steps per second against synchronous": over(seconds["synchronous"], of_side)
        for name, of_side in seconds.items()
    }
    settings = vars(arguments) | {
        "groups": GROUPS,
        "group_size": GROUP_SIZE,
        "turns": TURNS,
        "turn_seconds": [FASTEST, SLOWEST],
    }
    write_report("async_vs_sync", figures, settings, load, ratios)


if __name__ == "__main__":
    main()
