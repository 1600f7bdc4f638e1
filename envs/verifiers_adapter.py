"""Tasksets of the verifiers library (0.4.x) as environments: a text prompt and one scored answer.

Covered: `@reward` and `@metric` functions of the trace, judges, and the taskset's configuration.
Left out, and refused when the taskset is loaded: harnesses with a runtime (tools, containers,
setup, finalize, rewards that need `runtime`) and multi-agent environments.

    python -m venv ~/verifiers && ~/verifiers/bin/pip install "verifiers>=0.4,<0.5" my-taskset
    python -m rl.train_cli env=envs.verifiers_adapter:VerifiersBuilder env.python=~/verifiers/bin/python env.taskset=my-taskset
"""

import asyncio
import atexit
import json
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import chz
import numpy as np

from envs.problem import GraderError
from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, POSITIVE, SEED, WHOLE
from posttrain.renderers.types import Message, Renderer
from posttrain.tracking.datasets import ListDataset
from rl.message_env import MessageEnv, MessageEnvGroupBuilder, MessageStep, ParsePolicy
from rl.types import RLDataset, RLDatasetBuilder

WORKER = Path(__file__).with_name("verifiers_worker.py")


@dataclass(frozen=True)
class TasksetSource:
    """The source of tasks, which environments keep in place of a process so that they pickle."""

    python: str
    taskset: str
    config: str  # JSON
    limit: int
    seconds: float


class Worker:
    """A process with one taskset, in its own virtual environment: verifiers and this project both
    have a package `renderers`. Thread-safe; one answer at a time.
    """

    def __init__(self, source: TasksetSource):
        self._source, self._lock = source, threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self.tasks: list[list[Message]] = []

    def score(self, task: int, answer: str) -> dict[str, Any]:
        """Raises GraderError if the scoring fails, dies or takes too long; the process then
        restarts.
        """
        with self._lock:
            self._start()
            reply = self._ask({"task": task, "answer": answer})
        if "failed" in reply:
            raise GraderError(f"{self._source.taskset}, task {task}: {reply['failed']}")
        return reply

    def load(self) -> list[list[Message]]:
        """The prompts. Raises ConfigError if the taskset cannot be loaded."""
        with self._lock:
            self._start()
        return self.tasks

    def _start(self) -> None:
        if self._process:
            return
        source, pipe = self._source, subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                [source.python, "-I", str(WORKER)], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
            )
            reply = self._ask({"taskset": source.taskset, "config": json.loads(source.config), "limit": source.limit})
        except (OSError, GraderError) as error:
            raise ConfigError(
                f"python={source.python} has no verifiers ({error}): make a virtual environment with "
                "verifiers>=0.4,<0.5 in it"
            ) from error
        if "failed" in reply:
            self.stop()
            raise ConfigError(f"the taskset {source.taskset} cannot be used: {reply['failed']}")
        self.tasks = reply["tasks"]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process and process.stdin and process.stdout
        timer = threading.Timer(self._source.seconds, process.kill)
        timer.start()
        try:
            print(json.dumps(request), file=process.stdin, flush=True)
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        except BaseException:  # Ctrl-C: the next question must not read this reply
            self.stop()
            raise
        finally:
            timer.cancel()
        if not line:
            code = process.wait()
            self.stop()
            raise GraderError(f"the process died, or took more than {self._source.seconds:g} s (exit status {code})")
        return json.loads(line)

    def stop(self) -> None:
        process, self._process = self._process, None
        if process:
            process.kill()
            process.communicate()


_WORKERS: dict[TasksetSource, Worker] = {}
_THREADS = ThreadPoolExecutor(4, thread_name_prefix="verifiers")


def worker(source: TasksetSource) -> Worker:
    """The process of this source."""
    return _WORKERS.setdefault(source, Worker(source))


@atexit.register
def _stop_workers() -> None:
    for running in _WORKERS.values():
        running.stop()


class VerifiersEnv(MessageEnv):
    """One task. Metrics: those of the taskset, and each weighted reward as reward/NAME."""

    def __init__(self, source: TasksetSource, task: int, messages: Sequence[Message]):
        self.source, self.task, self.messages = source, task, messages

    async def initial_messages(self) -> list[Message]:
        return list(self.messages)

    async def step(self, message: Message) -> MessageStep:
        answer = message["content"]
        loop = asyncio.get_running_loop()
        reply = await loop.run_in_executor(_THREADS, worker(self.source).score, self.task, answer)
        rewards = {f"reward/{name}": value for name, value in reply["rewards"].items()}
        return MessageStep(reply["reward"], True, metrics=reply["metrics"] | rewards, logs={"answer": answer})


@chz.chz
class VerifiersBuilder(RLDatasetBuilder):
    """A taskset of the verifiers library."""

    taskset: str = chz.field(doc="id of an installed taskset")
    python: str = chz.field(
        munger=lambda _, path: str(Path(path).expanduser()),
        doc="interpreter of the virtual environment in which verifiers and the taskset are installed",
    )
    taskset_config: str = chz.field(default="{}", doc="the taskset's configuration, as JSON")
    num_tasks: int = chz.field(default=1000, validator=COUNT, doc="number of tasks, the first ones")
    num_test: int = chz.field(default=0, validator=WHOLE, doc="held-out tasks, drawn by split_seed")
    split_seed: int = chz.field(default=0, validator=SEED, doc="seed of the choice of held-out tasks")
    scoring_seconds: float = chz.field(
        default=60.0, validator=POSITIVE, doc="most seconds for loading the tasks, or for scoring an answer"
    )
    parse: ParsePolicy = chz.field(default_factory=ParsePolicy, doc="treatment of a truncated answer")

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        try:
            json.loads(self.taskset_config)
        except ValueError as error:
            raise ConfigError(f"taskset_config={self.taskset_config!r} is not JSON: {error}") from error
        source = TasksetSource(self.python, self.taskset, self.taskset_config, self.num_tasks, self.scoring_seconds)
        count = len(worker(source).load())
        if not 0 <= self.num_test < count:
            raise ConfigError(
                f"num_test={self.num_test}: the taskset {self.taskset} has {count} tasks; set it to 0 to {count - 1}"
            )
        order_D = np.random.default_rng(self.split_seed).permutation(count)
        test_D, train_D = np.sort(order_D[: self.num_test]), np.sort(order_D[self.num_test :])

        def groups(tasks_D: np.ndarray, num_envs: int) -> list[MessageEnvGroupBuilder]:
            messages_D, tags = worker(source).tasks, [self.taskset]
            thunks = [partial(VerifiersEnv, source, int(task), messages_D[task]) for task in tasks_D]
            return [MessageEnvGroupBuilder(thunk, num_envs, renderer, self.parse, tags) for thunk in thunks]

        train = ListDataset(groups(train_D, self.group_size), self.batch_size, self.seed)
        return train, ListDataset(groups(test_D, 1), self.batch_size, shuffle=False) if self.num_test else None
