"""Training processes as the driver sees them: TrainerRanks starts and watches them and sends every call
to all, TrainerGroup is one of their trainers, with what TrainingClient uses of Trainer.
"""

import itertools
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from posttrain.backend.adapters import absolute
from posttrain.backend.cluster import Cluster, ProcessLost, answer, answers, future_of
from posttrain.backend.config import BackendConfig
from posttrain.backend.custom_loss import CustomLoss, run_in_two_passes
from posttrain.backend.errors import ConfigError, SnapshotMemoryError, TrainerLostError
from posttrain.backend.futures import SAY_AFTER_SECONDS
from posttrain.backend.loss_terms import LossTerm
from posttrain.backend.losses import LossFn
from posttrain.backend.spans import Spans
from posttrain.backend.trainer_rank import Position, TrainerRank
from posttrain.backend.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    LoraConfig,
    OptimStepResponse,
)
from posttrain.backend.weight_files import FileWeights
from posttrain.backend.weight_versions import WeightCopy

# Seconds in which all ranks follow one that raised. Longer, and they wait for it in a collective call.
FOLLOW_SECONDS = 60.0
LOOK_SECONDS = 15.0  # between questions whether the ranks of a long call are there
COMPUTES = 0.1  # least share of a processor that a rank takes which does not stand still
# Kinds of the calls that are no pass or step.
SPANS = {"publish": "publish", "save_state": "save", "save_policy": "save", "load_state": "save"}


class TrainerRanks:
    """The training processes of a ServiceClient, shared by all its training clients. Once one is
    lost, all are killed, and every call raises TrainerLostError."""

    def __init__(self, config: BackendConfig, cluster: Cluster, spans: Spans | None = None):
        self.cluster, self._spans = cluster, spans or Spans()
        self._numbers = itertools.count()
        self._dropped: list[int] = []  # trainers that nobody holds
        self._lost: TrainerLostError | None = None
        # Calls reach all ranks in the same order. Not reentrant: what the garbage collector calls
        # may not come between.
        self._lock = threading.Lock()
        self._submitting: int | None = None  # the thread that holds the lock
        self._looking = threading.Lock()
        self._watches: dict[int, _Watch] = {}  # of each rank
        count = config.trainer_processes
        self._handles = [
            cluster.start(TrainerRank, rank, count, config, bundle=rank, concurrency=1) for rank in range(count)
        ]
        try:
            seconds = config.call_seconds
            store = answer(self._handles[0].serve_store.remote(), "the first training process", seconds)
            answers([handle.join.remote(*store) for handle in self._handles], "the training processes", seconds)
        except ProcessLost as error:
            self.kill()
            raise TrainerLostError(f"a training process did not start: {error}") from error
        except BaseException:
            self.kill()
            raise

    def open(self, kind: str, model_name: str, seed: int, lora: LoraConfig | None) -> "TrainerGroup":
        number, model_name = next(self._numbers), absolute(model_name)
        self.check_seen(Path(model_name))
        return TrainerGroup(self, number, kind, model_name, seed, lora)

    def check_seen(self, folder: Path) -> None:
        """ConfigError for a node that does not see a folder that is here: it would not know why it is missing."""
        if self.cluster.config.cluster is not None and folder.is_absolute() and folder.is_dir():
            self.every("check_seen", str(folder))

    def call(self, number: int, method: str, *args: Any, **kwargs: Any) -> Any:
        """The result of a trainer's method."""
        if self._lost is not None:
            raise self._lost
        try:
            arguments = self.cluster.put((args, kwargs))
        except TypeError as error:
            raise ConfigError(f"the loss cannot be sent to the training processes: {error}") from error
        return pickle.loads(self.every("call", number, method, arguments))

    def every(self, method: str, *args: Any) -> Any:
        """The first rank's answer, once all have answered."""
        if self._submitting == threading.get_ident():
            raise TrainerLostError("the garbage collector cannot wait for training processes")
        with self._lock:
            self._submitting = threading.get_ident()
            try:
                if self._lost is not None:
                    raise self._lost
                while self._dropped:
                    self._submit("drop", self._dropped.pop())
                futures = self._submit(method, *args)
            finally:
                self._submitting = None
        return self._outcome(futures)

    def _submit(self, method: str, *args: Any) -> list["Future[Any]"]:
        kind, futures = SPANS.get(args[1] if method == "call" else method, "train"), []
        for rank, handle in enumerate(self._handles):
            span = self._spans.begin(kind, f"rank {rank}")
            futures.append(future_of(getattr(handle, method).remote(*args)))
            futures[-1].add_done_callback(lambda _, span=span: self._spans.end(span))
        return futures

    def _outcome(self, futures: Sequence["Future[Any]"]) -> Any:
        if pending := self._pending_after_first_error(futures):
            wait(pending, timeout=FOLLOW_SECONDS)
        errors = {rank: error for rank, future in enumerate(futures) if future.done() and (error := future.exception())}
        if not errors:
            return futures[0].result()
        for rank, error in errors.items():
            if isinstance(error, ProcessLost):  # it died, or was ended with the others: the reason is known then
                raise self._lose(f"training process {rank} has died ({error})")
        told = dict.fromkeys(f"{type(error).__name__}: {error}" for error in errors.values())
        if len(errors) < len(futures) or len(told) > 1:
            at_work = ", ".join(str(rank) for rank, future in enumerate(futures) if not future.done())
            others = f" while {at_work} was at work" if at_work else ""
            raise self._lose(f"{len(errors)} of {len(futures)} training processes failed ({'; '.join(told)}){others}")
        raise errors[0]

    def _pending_after_first_error(self, futures: Sequence["Future[Any]"]) -> "set[Future[Any]]":
        while True:
            done, pending = wait(futures, LOOK_SECONDS, FIRST_EXCEPTION)
            if not pending or any(future.exception() for future in done):
                return pending
            if self._looking.acquire(blocking=False):  # else another waiting call looks
                try:
                    self._look()
                finally:
                    self._looking.release()

    def _look(self) -> None:
        """Names a rank that does not even say where it is, as one that was stopped or is on a node that cannot be
        reached, and one that stands at a line of a loss, or of a file's writing: the others wait for it, which torch
        ends after half an hour. All are ended after `call_seconds`, unless it writes or reads."""
        standing: list[tuple[int, _Watch]] = []
        for rank, handle in enumerate(self._handles):
            watch, now = self._watches.setdefault(rank, _Watch()), time.monotonic()
            if watch.asked is None or watch.asked.done():
                watch.heard()
                watch.asked, watch.since = self.cluster.position(handle), now
                if watch.stood:
                    standing.append((rank, watch))
            elif (seconds := now - watch.since) >= SAY_AFTER_SECONDS:
                what = f"has not answered for {seconds:.0f} s: it stands still, or its node cannot be reached"
                self._warn_or_end(rank, what, seconds, watch, True)
        for rank, watch in standing if len(standing) < len(self._handles) else []:
            position = watch.position
            assert position and position.method
            what = f"has stood at {position.line} for {watch.stood:.0f} s ({position.method}), and the others wait"
            self._warn_or_end(rank, what, watch.stood, watch, position.method.startswith("run"))

    def _warn_or_end(self, rank: int, what: str, seconds: float, watch: "_Watch", ends: bool) -> None:
        limit = self.cluster.config.call_seconds
        if ends and seconds >= limit:
            self._lose(f"training process {rank} {what} (backend.call_seconds={limit:g})")
        elif seconds >= SAY_AFTER_SECONDS * (watch.said + 1):
            watch.said += 1
            then = f". All are ended after {limit:g} s (backend.call_seconds)" if ends else ""
            print(f"WARNING training process {rank} {what}{then}", flush=True)

    def _lose(self, reason: str) -> TrainerLostError:
        with self._lock:
            if self._lost is None:
                self._lost = TrainerLostError(
                    f"{reason}; all of them were ended. The last checkpoint stands: resume the run from it"
                )
        self.kill()
        return self._lost

    def forget(self, number: int) -> None:
        """The trainer is not needed any more; takes no lock and waits for nobody."""
        self._dropped.append(number)

    def kill(self) -> None:
        if self._lost is None:
            self._lost = TrainerLostError("the training processes were ended")
        for handle in self._handles:
            self.cluster.kill(handle)


@dataclass
class _Watch:
    """A rank, as its answers show it."""

    asked: "Future[Position] | None" = None
    since: float = 0.0  # when it was asked
    position: Position | None = None  # its last answer
    stood: float = 0.0  # seconds at this line
    said: int = 0  # times

    def heard(self) -> None:
        """Takes the answer in. A rank stands that is at the same line of the same call, without computing."""
        before, self.position = self.position, None
        if self.asked is not None and not self.asked.exception():
            self.position = self.asked.result()
        if (seconds := _stood(before, self.position)) is None:
            self.stood, self.said = 0.0, 0
        else:
            self.stood += seconds


def _stood(before: Position | None, now: Position | None) -> float | None:
    """Seconds between two answers of a rank that stands."""
    if before is None or now is None or now.line is None or (before.call, before.line) != (now.call, now.line):
        return None
    seconds = now.seconds - before.seconds
    return seconds if now.processor_seconds - before.processor_seconds < seconds * COMPUTES else None


class TrainerGroup:
    """A model trained in several processes. Methods are those of Trainer."""

    def __init__(
        self, ranks: TrainerRanks, number: int, kind: str, model_name: str, seed: int, lora: LoraConfig | None
    ):
        self.model_name, self.seed, self.lora = model_name, seed, lora
        self._ranks, self._number = ranks, number
        opened = ranks.every("open", number, kind, model_name, seed, lora)
        weakref.finalize(self, ranks.forget, number).atexit = False
        self.hf_config: PretrainedConfig = opened["hf_config"]
        self.max_length: int = opened["max_length"]
        self.vocabulary: int = opened["vocabulary"]
        self.compute_dtype: torch.dtype = opened["compute_dtype"]
        self.output_name: str = opened["output_name"]
        self.scalar_head = "in the ranks" if kind == "scalar" else None
        self._call: Callable[..., Any] = partial(ranks.call, number)
        self.sampled = _GroupWeights(ranks, number, self.compute_dtype, self.info())

    def run(
        self,
        data_D: Sequence[Datum],
        loss_fn: str | LossFn,
        loss_fn_config: dict[str, Any] | None = None,
        backward: bool = True,
        all_logprobs: bool = True,
    ) -> ForwardBackwardOutput:
        return self._call("run", data_D, loss_fn, loss_fn_config, backward, all_logprobs)

    def run_without_adapter(
        self,
        data_D: Sequence[Datum],
        loss_fn: str | LossFn,
        loss_fn_config: dict[str, Any] | None = None,
        all_logprobs: bool = True,
    ) -> ForwardBackwardOutput:
        return self._call("run_without_adapter", data_D, loss_fn, loss_fn_config, all_logprobs)

    def run_terms(
        self, terms: Sequence[LossTerm], backward: bool = True, keep: bool = False
    ) -> list[ForwardBackwardOutput]:
        return self._call("run_terms", terms, backward, keep)

    def run_custom(self, data_D: Sequence[Datum], fn: CustomLoss) -> ForwardBackwardOutput:
        """`fn` runs in this process."""
        return run_in_two_passes(self.run_terms, data_D, fn, self.output_name)

    def optim_step(self, adam: AdamParams) -> OptimStepResponse:
        return self._call("optim_step", adam)

    def zero_grad(self) -> None:
        self._call("zero_grad")

    def info(self) -> GetInfoResponse:
        return self._call("info")

    def check_finite(self, moments: bool = True) -> None:
        self._call("check_finite", moments)

    def checkpoint_bytes(self) -> int:
        return self._call("checkpoint_bytes")

    def save_state(self, tokenizer: PreTrainedTokenizerBase, path: Path, extra: dict[str, Any]) -> None:
        self._call("save_state", tokenizer, path.absolute(), extra)

    def save_policy(self, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
        self._call("save_policy", tokenizer, path.absolute())

    def load_state(self, path: Path, with_optimizer: bool) -> None:
        self._ranks.check_seen(path.absolute())
        self._call("load_state", path.absolute(), with_optimizer)


class _GroupWeights:
    """The source of versions: the ranks write their rows of the weights into the cluster's folder."""

    def __init__(self, ranks: TrainerRanks, number: int, dtype: torch.dtype, info: GetInfoResponse):
        self._ranks, self._number = ranks, number
        self._bytes = info.num_parameters * dtype.itemsize
        self._published = itertools.count()

    def sampler_weights(self) -> FileWeights:
        files = FileWeights(self._ranks.cluster.folder / f"{self._number}-{next(self._published)}")
        self._ranks.every("publish", self._number, files.folder)
        return files

    def copied_bytes(self) -> int:
        return self._bytes

    def copied_weights(self) -> WeightCopy:
        """Files, as of a sync."""
        try:
            weights = self.sampler_weights()
        except TrainerLostError as error:
            raise SnapshotMemoryError(f"the weights are gone: {error}") from error
        return WeightCopy(lambda: weights, self._bytes)
