"""A sampling engine in a process of its own: an EngineThread in an actor, and the replica that a
SamplerPool knows it by. Settling does not reach across processes: seeds make tokens the same, the
last digits of logprobs depend on what is decoded together.
"""

import asyncio
import secrets
import time
import weakref
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from posttrain.backend.cluster import Cluster, ProcessLost, future_of
from posttrain.backend.config import BackendConfig
from posttrain.backend.engine import Engine, EngineThread, SequenceRequest
from posttrain.backend.errors import EngineError
from posttrain.backend.left_behind import note_semaphores, note_shared_memory, note_temporary_folder
from posttrain.backend.new_engine import new_engine
from posttrain.backend.types import SampleResponse
from posttrain.backend.weight_files import FileWeights
from posttrain.backend.weight_versions import Policy, SnapshotMemory, Weights, WeightVersion


class SamplerActor:
    """Runs in a process that Ray started; its methods are called from the driver."""

    async def open(
        self,
        config: BackendConfig,
        hf_config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        note: Path,
    ) -> None:
        self._policy = Policy(SnapshotMemory(None), False)
        self._steps, self._paused = 0, 0.0  # decoded steps and loads; seconds of all loads
        self._versions: weakref.WeakValueDictionary[int, WeightVersion] = weakref.WeakValueDictionary()

        def make() -> Engine:
            engine = new_engine(config, hf_config, tokenizer, max_length)
            step, load = engine.step, engine.load_weights

            def counted() -> Any:
                finished = step()
                self._steps += 1
                return finished

            def timed(weights: Weights) -> None:
                began = time.monotonic()
                load(weights)
                self._paused += time.monotonic() - began

            engine.step, engine.load_weights = counted, timed  # type: ignore[method-assign]
            return engine

        note_temporary_folder(note)
        if config.tensor_parallel > 1:
            note_semaphores(note)
        self._engine = await asyncio.to_thread(EngineThread, make, False)
        if config.tensor_parallel > 1:
            note_shared_memory(note)

    async def sample(
        self, requests: list[SequenceRequest], number: int | None, weights: FileWeights | None, keep: bool
    ) -> SampleResponse:
        if self._policy.newest is None:
            raise EngineError("this replica has no weights yet")
        version, let_go = None if number is None else self._version(number, weights), None
        if version is not None and weights is not None:
            let_go = version.hold(self)
            version.lives_in(weights)  # again: a sync may have dropped them
        try:
            return await self._engine.submit(self, requests, self._policy, version, keep, lambda response: response)
        except EngineError as error:
            raise self._lost(error) from error
        finally:
            if let_go is not None:
                let_go()

    async def sync(self, number: int, weights: FileWeights) -> float:
        """Seconds of loading, in which nothing is decoded."""
        before = self._paused
        try:
            await asyncio.to_thread(self._engine.sync, self._policy, self._version(number, weights))
        except Exception as error:
            raise self._lost(error) from error
        self._steps += 1
        return self._paused - before

    async def progress(self) -> int:
        return self._steps

    def _version(self, number: int, weights: FileWeights | None) -> WeightVersion:
        version = self._versions.get(number)
        if version is None:
            version = self._versions[number] = WeightVersion(number, lambda: weights or ())
            if weights is None:
                version.drop()
        elif weights is not None:
            version.lives_in(weights)
        return version

    def _lost(self, error: Exception) -> Exception:
        """An engine that has stopped is a dead replica."""
        return ProcessLost(str(error)) if self._engine.has_stopped else error


class RayReplica:
    """A SamplerActor, started."""

    def __init__(
        self,
        cluster: Cluster,
        bundle: int | None,
        hf_config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
    ):
        config = cluster.config
        self._cluster, self._actor = cluster, cluster.start(SamplerActor, bundle=bundle, gpus=config.tensor_parallel)
        note = cluster.folder / f"{secrets.token_hex(4)}.segments"
        self._opened = future_of(self._actor.open.remote(config, hf_config, tokenizer, max_length, note))
        self._references: weakref.WeakKeyDictionary[Future[Any], Any] = weakref.WeakKeyDictionary()

    def opened(self) -> "Future[None]":
        return self._opened

    def sample(
        self, requests: list[SequenceRequest], number: int | None, weights: FileWeights | None, keep: bool
    ) -> "Future[SampleResponse]":
        reference = self._actor.sample.remote(requests, number, weights, keep)
        answer = future_of(reference)
        self._references[answer] = reference
        return answer

    def withdraw(self, answer: "Future[SampleResponse]") -> None:
        self._cluster.cancel(self._references.get(answer))

    def sync(self, number: int, weights: FileWeights) -> "Future[float]":
        return future_of(self._actor.sync.remote(number, weights))

    def progress(self) -> "Future[int]":
        return future_of(self._actor.progress.remote())

    def kill(self) -> None:
        self._cluster.kill(self._actor)
