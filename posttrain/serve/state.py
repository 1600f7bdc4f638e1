"""What clients of the server share: sessions, models in training, samplers, checkpoints. All methods
run in the event loop; torch and vLLM work in the clients' own threads, or in a thread of asyncio's.
"""

import asyncio
import logging
import time
import uuid
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.backend.errors import ConfigError, CookbookError
from posttrain.backend.sampling_client import SamplingClient, check_prompt_fits
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, LoraConfig, ModelInput, SamplingParams
from posttrain.serve.age import check_replaces, save_encrypted
from posttrain.serve.bases import BaseModel
from posttrain.serve.order import GAP_SECONDS, NumberedQueue
from posttrain.serve.requests import PROTOBUF, Answer, Request, Requests, json_answer
from posttrain.serve.sessions import Model, Sampler, Session
from posttrain.serve.store import Checkpoint, Run, Store, check_name, now
from posttrain.serve.wire import PassRequest, Targets, write_pass_output, write_sample_response

log = logging.getLogger("posttrain.serve")

STEP_SECONDS = 10.0  # between sweeps of sessions and checkpoints
MOST_SAMPLES = 4096
MOST_TOPK = 1024
Start = Callable[[TrainingClient], Awaitable[Answer]]


class UnknownError(CookbookError):
    """A session, model or sampler that the server does not have."""


class BusyError(CookbookError):
    """More requests than the server keeps: ask again."""


@dataclass(frozen=True)
class Limits:
    outstanding: int = 20_000  # requests without an answer
    pending_bytes: int = 2**30  # bodies of training requests without an answer
    session_seconds: float = 600.0  # without a heartbeat
    gap_seconds: float = GAP_SECONDS


class State:
    def __init__(
        self,
        service: ServiceClient,
        bases: Mapping[str, BaseModel],
        store: Store,
        seed: int = 0,
        substitutes: Mapping[str, str] | None = None,
        limits: Limits | None = None,
        tokenizers: Path | None = None,
    ):
        """`seed` makes the weights of presets, for the trainer and all samplers. `substitutes`:
        losses to compute in place of those that clients name. `tokenizers`: a folder with one
        folder for each model, which clients on this machine may read."""
        self.service, self.bases, self.store, self.seed = service, bases, store, seed
        self.substitutes, self.limits = dict(substitutes or {}), limits or Limits()
        self.requests = Requests(self.without_folders)
        self.sessions: dict[str, Session] = {}
        self.models: dict[str, Model] = {}
        self.samplers: dict[str, Sampler] = {}
        # addresses of checkpoints that need no key, and when they expire
        self.offered: dict[str, tuple[Checkpoint, float]] = {}
        self._sessions_by_key: dict[str, Session] = {}
        self._tokenizers = tokenizers
        self._pending_bytes = 0
        self._clients: weakref.WeakValueDictionary[tuple[str, str], SamplingClient] = weakref.WeakValueDictionary()
        self._opening: dict[tuple[str, str], asyncio.Task[SamplingClient]] = {}
        self._recent: deque[SamplingClient] = deque(maxlen=4)
        self._closing: set[asyncio.Task[None]] = set()
        service.on_full_snapshots(self._let_oldest_go)

    def without_folders(self, text: str) -> str:
        """An error as a client may see it: this machine's folders under their public names."""
        for base in self.bases.values():
            text = text.replace(base.local, base.name) if base.local.startswith("/") else text
        return text.replace(str(self.store.root), "the checkpoint folder")

    # --- sessions --------------------------------------------------------------------------------

    def create_session(self, user_metadata: dict[str, str], display_name: str | None, key: str | None) -> Session:
        """`key` is the same when a client repeats the call after a lost answer."""
        if key and key in self._sessions_by_key:
            return self._sessions_by_key[key]
        session = Session(uuid.uuid4().hex, user_metadata, display_name)
        self.sessions[session.id] = session
        if key:
            self._sessions_by_key[key] = session
        return session

    def greeting(self) -> str:
        names = [name if name == base.local else f"{name} (here: {base.local})" for name, base in self.bases.items()]
        return f"a local server with {', '.join(map(self.without_folders, names))}"

    def session(self, session_id: str) -> Session:
        if session_id not in self.sessions:
            raise UnknownError(
                f"there is no session {session_id[:80]!r}: it has ended, or the server was restarted; make a new "
                "ServiceClient, and go on from a tinker:// path"
            )
        return self.sessions[session_id]

    def end_session(self, session_id: str) -> None:
        """Frees its models and snapshots, and what samples for it. Checkpoints stay."""
        session = self.sessions.pop(session_id, None)
        if session is None:
            return
        self._sessions_by_key = {key: kept for key, kept in self._sessions_by_key.items() if kept is not session}
        self.requests.end(session.samplers)
        for sampler in session.samplers.values():
            del self.samplers[sampler.id]
            sampler.opened.cancel()
        for model in session.models.values():
            del self.models[model.run.training_run_id]
            model.queue.close()
            task = asyncio.create_task(_close_model(model))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(STEP_SECONDS)
            self.sweep()

    def sweep(self) -> None:
        """Ends sessions whose client is gone; deletes expired checkpoints."""
        for session in [*self.sessions.values()]:
            if time.monotonic() - session.last_seen > self.limits.session_seconds:
                log.info("session %s ended: no heartbeat", session.id)
                self.end_session(session.id)
        self.store.sweep()
        self.offered = {key: offer for key, offer in self.offered.items() if offer[1] > time.monotonic()}

    # --- models ----------------------------------------------------------------------------------

    def base(self, name: str) -> BaseModel:
        if name not in self.bases:
            raise ConfigError(f"base_model {name[:80]!r} is not served here; the server has {', '.join(self.bases)}")
        return self.bases[name]

    def tokenizer_folder(self, base: BaseModel) -> str | None:
        return str(self._tokenizers / base.name) if self._tokenizers else None

    def created(self, session: Session, number: int) -> Request | None:
        """The request that made a model of this number, if there was one. ConfigError if it is no longer kept."""
        run_id = f"{session.id}:train:{number}"
        request = self.requests.repeated(("model", run_id, 0))
        if request is None and run_id in self.models:
            raise ConfigError(f"model_seq_id={number} is in use: this session has the model {run_id}")
        return request

    def model(self, model_id: str) -> Model:
        if model_id not in self.models:
            raise UnknownError(
                f"there is no model {model_id[:80]!r}: a model lives as long as its session and the server; create one "
                "from a tinker:// path to continue"
            )
        model = self.models[model_id]
        model.run.last_request_time = now()
        return model

    def create_model(
        self,
        session: Session,
        number: int,
        base_model: str,
        lora: LoraConfig | None,
        user_metadata: dict[str, str] | None,
    ) -> Request:
        base = self.base(base_model)
        run = _run(session, number, base_model, lora, user_metadata)
        opened = partial(self.service.create_training_client, base.local, lora, self.seed)
        return self._open_model(session, run, lambda: asyncio.to_thread(opened), {"type": "create_model"})

    def create_model_from(
        self, session: Session, number: int, path: str, with_optimizer: bool, user_metadata: dict[str, str] | None
    ) -> Request:
        checkpoint = self.store.find(path, ("weights",))
        saved = checkpoint.run
        self.base(saved.base_model)
        lora = None
        if saved.is_lora:
            lora = LoraConfig(saved.lora_rank or 1, None, None, saved.train_mlp, saved.train_attn)
        metadata = user_metadata if user_metadata is not None else saved.user_metadata
        run = _run(session, number, saved.base_model, lora, metadata)
        create = self.service.create_training_client_from_state
        if with_optimizer:
            create = self.service.create_training_client_from_state_with_optimizer

        async def opened() -> TrainingClient:
            with self.store.reading(checkpoint) as folder:
                return await asyncio.to_thread(create, str(folder))

        return self._open_model(session, run, opened, {"path": path})

    def _open_model(
        self,
        session: Session,
        run: Run,
        opened: Callable[[], Coroutine[Any, Any, TrainingClient]],
        answer: dict[str, str],
    ) -> Request:
        task = asyncio.create_task(opened())
        queue = NumberedQueue(asyncio.shield(task), _refuse_gradient, self.limits.gap_seconds)
        model = Model(run, session, task, queue)
        self.models[run.training_run_id] = session.models[run.training_run_id] = model
        self.store.add_run(run)

        async def work() -> Answer:
            await asyncio.shield(task)
            return json_answer({**answer, "model_id": run.training_run_id})

        return self.requests.accept(("model", run.training_run_id, 0), work())

    def submit(self, model_id: str, seq_id: int, start: Start, num_bytes: int = 0) -> Request:
        """A request of a model under its number; the same number again is the same request."""
        model = self.model(model_id)
        key = ("model", model_id, seq_id)
        if request := self.requests.repeated(key):
            return request
        self._check_room(num_bytes)

        async def work() -> Answer:
            self._pending_bytes += num_bytes
            try:
                return await model.queue.put(seq_id, start)
            finally:
                self._pending_bytes -= num_bytes

        return self.requests.accept(key, work())

    def _check_room(self, num_bytes: int = 0) -> None:
        if len(self.requests) >= self.limits.outstanding or self._pending_bytes + num_bytes > self.limits.pending_bytes:
            raise BusyError("the server keeps no more requests at once; it will take this one later")

    def forward_backward(self, request: PassRequest, num_bytes: int) -> Request:
        model = self.model(request.model_id)

        async def start(client: TrainingClient) -> Answer:
            try:
                loss_fn = self._loss(model, request.loss_fn)
                if request.fault:
                    raise request.fault
            except CookbookError as error:
                if not request.forward_only:
                    client.refuse_pass(error)
                raise
            run = client.forward if request.forward_only else client.forward_backward
            return Answer(write_pass_output(await run(request.data_D, loss_fn, request.loss_fn_config)), PROTOBUF)

        return self.submit(request.model_id, request.seq_id, start, num_bytes)

    def _loss(self, model: Model, loss_fn: str) -> str:
        if loss_fn in self.substitutes:
            substitute = self.substitutes[loss_fn]
            if loss_fn not in model.substituted:
                model.substituted.add(loss_fn)
                log.warning("model %s: %s in place of %s", model.run.training_run_id, substitute, loss_fn)
            return substitute
        if loss_fn == "stable_reinforce":
            raise ConfigError(
                "loss_fn stable_reinforce has no published formula, so this server cannot compute it: set "
                "loss_fn=importance_sampling (cispo or ppo for asynchronous runs), or start the server with "
                "--substitute stable_reinforce=importance_sampling"
            )
        return loss_fn

    def optim_step(self, model_id: str, seq_id: int, adam: Callable[[], AdamParams]) -> Request:
        async def start(client: TrainingClient) -> Answer:
            try:
                params = adam()
            except CookbookError as error:
                # the step is refused with its own error, and its gradient dropped
                client.refuse_pass(error)
                params = AdamParams()
            return json_answer({"metrics": _finite((await client.optim_step(params)).metrics)})

        return self.submit(model_id, seq_id, start)

    # --- saving and loading ----------------------------------------------------------------------

    def save(
        self,
        model_id: str,
        seq_id: int,
        kind: str,
        name: str | None,
        ttl_seconds: int | None,
        overwrite: bool,
        user_metadata: dict[str, str] | None,
        recipients: Sequence[Any] = (),
    ) -> Request:
        """`recipients`: public keys that the files are encrypted to."""

        async def start(client: TrainingClient) -> Answer:
            write = client.save_state if kind == "weights" else client.save_weights_for_sampler
            saved = name if name is not None else f"{seq_id:06d}"
            path = f"tinker://{model_id}/{kind}/{check_name(saved)}"
            with self.store.writing(model_id, kind, saved, ttl_seconds, user_metadata, overwrite) as folder:
                check_replaces(path, folder, encrypted=bool(recipients))
                await (save_encrypted(write, folder, recipients) if recipients else write(str(folder)))
            return json_answer({"path": path})

        return self.submit(model_id, seq_id, start)

    def load(self, model_id: str, seq_id: int, path: str, with_optimizer: bool) -> Request:
        async def start(client: TrainingClient) -> Answer:
            checkpoint = self.store.find(path, ("weights",))
            with self.store.reading(checkpoint) as folder:
                await (client.load_state_with_optimizer if with_optimizer else client.load_state)(str(folder))
            return json_answer({"path": path, "model_id": model_id})

        return self.submit(model_id, seq_id, start)

    def snapshot(self, model_id: str, seq_id: int, sampling_number: int, follow: bool) -> Request:
        """A sampler of the model's weights now; with `follow`, of its latest."""
        model = self.model(model_id)
        sampler_id = f"{model.session.id}:sample:{sampling_number}"

        async def start(client: TrainingClient) -> Answer:
            self._check_unused(sampler_id)
            kind = "inflight" if follow else "snapshot"
            sampling = await client.save_weights_and_get_sampling_client_async(kind=kind)
            self._add_sampler(model.session, sampler_id, model.run.base_model, None, _ready(sampling))
            return json_answer({"sampling_session_id": sampler_id})

        return self.submit(model_id, seq_id, start)

    # --- sampling --------------------------------------------------------------------------------

    def create_sampler(self, session: Session, number: int, base_model: str | None, model_path: str | None) -> Sampler:
        """CheckpointError or ConfigError for a path or model that does not exist; opening goes on
        afterwards."""
        sampler_id = f"{session.id}:sample:{number}"
        if (old := self.samplers.get(sampler_id)) and (old.model_path or old.base_model) == (model_path or base_model):
            return old
        self._check_unused(sampler_id)
        name = str(base_model)
        if model_path:
            name = self.store.find(model_path, ("sampler_weights", "weights")).run.base_model
        self.base(name)
        opened = self.sampling_client(model_path or name)
        return self._add_sampler(session, sampler_id, name, model_path, opened)

    def _check_unused(self, sampler_id: str) -> None:
        if sampler_id in self.samplers:
            raise ConfigError(f"sampling_session_seq_id: {sampler_id} is another sampler of this session")

    def _add_sampler(
        self,
        session: Session,
        sampler_id: str,
        name: str,
        path: str | None,
        opened: Coroutine[Any, Any, SamplingClient],
    ) -> Sampler:
        task = asyncio.create_task(opened)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen by who samples
        sampler = Sampler(sampler_id, session, name, path, task)
        if session.id in self.sessions:
            self.samplers[sampler_id] = session.samplers[sampler_id] = sampler
        return sampler

    async def sampling_client(self, name: str) -> SamplingClient:
        """The sampler of a model by its public name, or of a tinker:// path. Callers of the same
        name share it while one holds it and its engine runs. UnknownPathError or ConfigError if there is none."""
        checkpoint = self.store.find(name) if name.startswith("tinker://") else None
        key = (name, checkpoint.time if checkpoint else "")
        if (client := self._clients.get(key)) and not client.has_stopped:
            return client
        if key not in self._opening:
            work = self._open_checkpoint(checkpoint) if checkpoint else self._open_base(self.base(name))
            self._opening[key] = asyncio.create_task(work)
            self._opening[key].add_done_callback(lambda _: self._opening.pop(key))
        self._clients[key] = client = await asyncio.shield(self._opening[key])
        self._recent.append(client)
        return client

    async def _open_base(self, base: BaseModel) -> SamplingClient:
        return await asyncio.to_thread(self.service.create_sampling_client, base_model=base.local, seed=self.seed)

    async def _open_checkpoint(self, checkpoint: Checkpoint) -> SamplingClient:
        with self.store.reading(checkpoint) as folder:
            return await asyncio.to_thread(self.service.create_sampling_client, str(folder), seed=self.seed)

    def sampler(self, sampler_id: str) -> Sampler:
        if sampler_id not in self.samplers:
            raise UnknownError(
                f"there is no sampler {sampler_id[:80]!r}: it ended with its session or the server; make a sampling "
                "client from a tinker:// path or a model's name"
            )
        return self.samplers[sampler_id]

    def sample(
        self, sampler_id: str, seq_id: int, prompt: Sequence[int], num_samples: int, options: "SampleOptions"
    ) -> Request:
        sampler = self.sampler(sampler_id)
        key = ("sample", sampler_id, seq_id)
        if request := self.requests.repeated(key):
            return request
        self._check_room()
        # refused at once, as the service does it: agents see that and shorten their history
        check_prompt_fits(len(prompt), self.base(sampler.base_model).max_length)

        async def work() -> Answer:
            params, topk = options.params(), options.topk_prompt_logprobs
            client = await asyncio.shield(sampler.opened)
            tokens, prompt_logprobs = ModelInput.from_ints(prompt), options.prompt_logprobs or topk > 0
            with sampler.in_use():
                response = await client.sample(tokens, num_samples, params, prompt_logprobs, topk, **options.others)
            topk_sample = options.others.get("topk_sample_logprobs", 0)
            written = write_sample_response(response, options.last_n, topk, topk_sample, options.targets)
            return Answer(written, PROTOBUF)

        return self.requests.accept(key, work(), owner=f"{sampler_id}#{seq_id // 10**9}")

    def _let_oldest_go(self) -> bool:
        """Snapshots have no room: closes the one that was sampled from longest ago, since the SDK does not say
        which it still needs. Called in a trainer's thread."""
        kept = [sampler for sampler in [*self.samplers.values()] if sampler.keeps_old_weights]
        if kept:
            min(kept, key=lambda sampler: sampler.last_used).let_weights_go()
        return bool(kept)

    async def close(self) -> None:
        for session_id in [*self.sessions]:
            self.end_session(session_id)
        await self.requests.close()
        await asyncio.gather(*self._closing, return_exceptions=True)
        await asyncio.to_thread(self.service.close)


@dataclass(frozen=True)
class SampleOptions:
    params: Callable[[], SamplingParams]
    prompt_logprobs: bool
    topk_prompt_logprobs: int
    last_n: int | None
    others: dict[str, Any]  # further options of SamplingClient.sample that were given
    targets: Targets | None  # as they came over the wire


def _run(
    session: Session, number: int, base_model: str, lora: LoraConfig | None, metadata: dict[str, str] | None
) -> Run:
    shape = (lora.rank, lora.train_mlp, lora.train_attn) if lora else (None, True, True)
    return Run(f"{session.id}:train:{number}", base_model, lora is not None, *shape, now(), metadata, session.id)


def _refuse_gradient(client: TrainingClient, error: CookbookError) -> None:
    """After a request was lost, the gradient is incomplete."""
    client.refuse_pass(error)
    client.optim_step(AdamParams())


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if value - value == 0}


async def _ready(client: SamplingClient) -> SamplingClient:
    return client


async def _close_model(model: Model) -> None:
    try:
        client = await model.opened
    except Exception:  # it never opened, and who asked for it was told
        return
    await asyncio.to_thread(client.close)
