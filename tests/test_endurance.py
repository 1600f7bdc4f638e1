"""What may not grow with the steps of a run, the requests of a server or the rows of a data set, where a short run
shows nothing of it.
"""

import asyncio
import gc
import json
import os
import resource
import tracemalloc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from posttrain.backend.config import BackendConfig
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.types import ModelInput, SamplingParams
from posttrain.renderers import get_renderer
from posttrain.renderers.types import Message
from posttrain.serve import requests as requests_module
from posttrain.serve.app import create_app
from posttrain.serve.bases import open_bases
from posttrain.serve.requests import Answer, Requests
from posttrain.serve.state import State
from posttrain.serve.store import Run, Store
from posttrain.tracking import transcript_index
from posttrain.tracking.jsonl import drop_torn_line, read_jsonl, read_last_records
from posttrain.tracking.metrics_log import last_metrics, read_last_metrics, read_metrics
from posttrain.tracking.open_files import MOST, allow_open_files, most_connections
from posttrain.tracking.transcript_index import IndexEntry, update_index
from preference.step_data import StepExamplesBuilder
from rl.agent_endpoint import Call, Conversation, Rollout
from tests.test_serve import Http, until
from tests.tinker_messages import TOKENS, datum, pass_body

PROMPT = {"chunks": [{"type": "encoded_text", "tokens": TOKENS}]}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    config = BackendConfig(engine="torch", share_engines=True)
    with ServiceClient(config, tmp_path_factory.mktemp("unused")) as opened:
        yield opened


@pytest.fixture
def state(service: ServiceClient, tmp_path: Path) -> State:
    return State(service, open_bases(["m=micro"], None), Store(tmp_path))


class Trained:
    """A model in training on the server, as the SDK trains it."""

    def __init__(self, http: Http, model_id: str):
        self.http, self.model_id, self._number, self._samples = http, model_id, 0, 0

    async def _call(self, path: str, **body: Any) -> dict[str, Any]:
        self._number += 1
        accepted = await self.http.call(path, model_id=self.model_id, seq_id=self._number, **body)
        return (await self.http.result(accepted)).json()

    async def step(self) -> str:
        """The sampler of the weights after a step."""
        self._number += 1
        await self.http.send(pass_body(self.model_id, self._number, [datum()]))
        await self._call("optim_step", adam_params={"learning_rate": 0.01})
        return (await self._call("save_weights_for_sampler", sampling_session_seq_id=self._number))[
            "sampling_session_id"
        ]

    async def submit(self, sampler: str, **params: Any) -> httpx.Response:
        self._samples += 1
        asked = {"sampling_session_id": sampler, "seq_id": self._samples, "sampling_params": {"seed": 0} | params}
        return await self.http.call("asample", prompt=PROMPT, **asked)

    async def sample(self, sampler: str) -> bytes:
        return (await self.http.result(await self.submit(sampler, max_tokens=2, stop=["\n"]))).content


async def trained_model(state: State) -> Trained:
    http = Http(create_app(state))
    return Trained(http, await http.model(rank=4))


def test_a_script_that_takes_a_sampler_at_each_step_does_not_run_out_of_snapshots(state: State) -> None:
    # Trap: the SDK never says that a sampler is no longer needed, so all of them were kept until none found room
    async def body() -> None:
        memory, trained = state.service._engines.memory, await trained_model(state)
        limit = memory.limit
        samplers = [await trained.step()]
        memory.limit = int(3.5 * state.models[trained.model_id].opened.result()._trainer.sampled.copied_bytes())
        first = await trained.sample(samplers[0])
        for _ in range(6):
            samplers.append(await trained.step())
            assert await trained.sample(samplers[0]) == first  # in use: it is not the one to go
        assert memory.used() <= memory.limit
        answers = [await trained.sample(sampler) for sampler in samplers[1:]]
        memory.limit = limit
        kept = [b"error" not in answer for answer in answers]
        assert kept == [False] * 4 + [True] * 2
        assert b"save weights that are needed later under a name" in answers[0]

    asyncio.run(body())


def test_a_server_keeps_nothing_of_sessions_that_have_ended(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        clients = []
        for _ in range(2):
            trained = await trained_model(state)
            sampler = await trained.step()
            clients.append(weakref.ref(state.models[trained.model_id].opened.result()))
            await trained.sample(sampler)
            for _ in range(3):  # are sampled when the session ends
                await trained.submit(sampler, max_tokens=400, stop=[])
            state.end_session(trained.model_id.split(":")[0])
        await until(lambda: not len(state.requests) and not state._closing)
        assert state._pending_bytes == 0
        gc.collect()  # Trap: the error of an answer that nobody fetches kept the model for an hour
        assert [client() for client in clients] == [None, None]
        monkeypatch.setattr("posttrain.serve.requests.time.monotonic", lambda: 1e9)  # all answers are old by now
        state.requests._sweep()
        gc.collect()
        holders = (state, state.requests, state.requests.completions)
        found = {name: value for holder in holders for name, value in vars(holder).items() if _is_kept(name, value)}
        assert not found

    asyncio.run(body())


def _is_kept(name: str, value: object) -> bool:
    """Whether it is a container that is not empty, apart from the server's own models."""
    return name != "bases" and not isinstance(value, Requests) and hasattr(value, "__len__") and len(value) > 0  # type: ignore[arg-type]


def test_a_page_of_runs_does_not_look_through_all_checkpoints_for_each(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, looked = state.store, []
    for number in range(9):
        store.add_run(Run(f"r{number}", "m", False, None, True, True, f"{number}"))
        for name in "ab"[: number % 3]:
            with store.writing(f"r{number}", "weights", name, None, None, overwrite=False) as folder:
                folder.mkdir(parents=True)
    all_of_them = Store.all
    monkeypatch.setattr(Store, "all", lambda store: looked.append(1) or all_of_them(store))
    runs = asyncio.run(Http(create_app(state)).call("training_runs", "GET")).json()["training_runs"]
    last = [run.get("last_checkpoint", {}).get("checkpoint_id") for run in runs]
    assert last == ["weights/b", "weights/a", None] * 3 and len(looked) == 1


def test_answers_beyond_the_bytes_are_not_sorted_again_for_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    sorts: list[int] = []
    counted = lambda *args, **how: sorts.append(1) or sorted(*args, **how)  # noqa: E731
    monkeypatch.setattr(requests_module, "sorted", counted, raising=False)

    async def answer() -> Answer:
        return Answer(b"x" * 100)

    async def body() -> None:
        requests = Requests(most_bytes=10_000)
        for number in range(300):
            requests.accept(number, answer())
            await asyncio.sleep(0)
        assert requests._bytes <= 10_100
        await requests.close()

    asyncio.run(body())
    assert len(sorts) < 30


def test_a_sampler_remembers_few_of_the_stops_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.backend.torch_sampler.MOST_STOPS", 4)
    with ServiceClient(BackendConfig(engine="torch"), tmp_path) as service:
        sampler = service.create_sampling_client(base_model="micro")
        for number in range(6):
            params = SamplingParams(max_tokens=2, seed=0, stop=[f"stop {number}"])
            sampler.sample(ModelInput.from_ints(TOKENS), 1, params).result()
        engine: Any = sampler._engine
        assert engine._engine._known_stop.cache_info().currsize == 4


def test_an_engine_keeps_no_event_loop_that_has_ended(tmp_path: Path) -> None:
    # Trap: of settling, which an engine on a GPU does not, it noted each loop that asked it, and never looked
    loops = []
    with ServiceClient(BackendConfig(engine="torch", reproducible=False), tmp_path) as service:
        sampler = service.create_sampling_client(base_model="micro")

        async def ask() -> None:
            loops.append(weakref.ref(asyncio.get_running_loop()))
            await sampler.sample_async(ModelInput.from_ints(TOKENS), 1, SamplingParams(max_tokens=1, seed=0))

        for _ in range(3):
            asyncio.run(ask())
        gc.collect()
        assert [loop() for loop in loops[:-1]] == [None, None]


def test_a_process_may_open_as_many_files_as_the_machine_lets_it() -> None:
    # Trap: 1024 is a usual limit, a thousand connections take it up, and then no checkpoint can be written
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, MOST), hard)
        # a server's connections leave some for files where the machine lets it open few
        for limit, connections in ((100, 50), (1024, 768)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            assert most_connections() == connections
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_last_records_of_a_file_are_those_of_the_whole(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for lengths in ([], [1], [5, 200_000, 3], [70_000] * 9, [10] * 9000):
        text = "".join(json.dumps({"step": i, "x": "a" * length}) + "\n" for i, length in enumerate(lengths))
        for torn in ("", '{"step": 9'):
            file.write_text(text + torn)
            for count in (1, 2, 4, 100):
                assert read_last_records(file, count, {"step": int}) == read_jsonl(file, {"step": int})[-count:]
            assert read_last_metrics(tmp_path) == last_metrics(read_metrics(tmp_path))
            drop_torn_line(file)
            assert file.read_text() == text


def test_a_page_of_iterations_ends_after_the_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcript_index, "ROWS", 3)
    monkeypatch.setattr(transcript_index, "read_dataclasses", None)  # a step does not read all entries
    for listing in ("listdir", "scandir"):  # nor list the pages
        monkeypatch.setattr(os, listing, None)
    for step in range(9):
        update_index(tmp_path, IndexEntry(step, 0.5, 1, 0, 1.0))
    page = (tmp_path / "index.html").read_text()
    assert "the last 3 iterations" in page and "000008.html" in page and "000005.html" not in page
    assert [record["iteration"] for record in read_jsonl(tmp_path / "index.jsonl")] == [*range(9)]


def test_a_long_question_takes_its_own_room_alone(tmp_path: Path) -> None:
    # Trap: an array of texts has the longest one's room for each
    questions = [*map(str, range(400)), "1" * 50_000]
    rows = ({"input": question, "output": ["2"], "label": [1]} for question in questions)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    builder = StepExamplesBuilder(path=str(tmp_path / "a.jsonl"), test_size=200, max_length=200)
    tracemalloc.start()
    train, test = builder(get_renderer("plain", load_tokenizer("micro")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6  # 401 x 50,000 x 4 bytes are 80e6
    assert test is not None and len(train) + len(test) == 2 * -(-200 // builder.batch_size)


def test_a_turn_of_a_long_agent_is_not_compared_with_all_turns_before(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    is_start_of = Conversation.is_start_of
    monkeypatch.setattr(Conversation, "is_start_of", lambda *args: compared.append(1) or is_start_of(*args))
    renderer = get_renderer("role_colon", load_tokenizer("micro"))

    async def body() -> None:
        rollout, messages = Rollout(renderer), [Message(role="user", content="a question")]
        for turn in range(30):
            prompt = rollout.prompt(renderer, messages)
            known = rollout._prompts[tuple(prompt)]
            call = Call(Conversation([*known.messages], [*known.told], renderer, prompt), None)
            rollout.reply(call, [*renderer.tokenizer.encode(f"answer {turn}", add_special_tokens=False)], "length")
            messages = [*call.conversation.told, Message(role="user", content=f"and {turn}?")]
        assert [conversation.continued for conversation in rollout.conversations] == [True] * 29 + [False]
        rollout.close()

    asyncio.run(body())
    assert len(compared) < 3 * 30
