"""Parts of the server of the Tinker protocol: records on disk, the guard, order, answers kept, the command line."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette

from posttrain.backend.errors import CheckpointError, ConfigError, DataError
from posttrain.serve import guard
from posttrain.serve.bases import open_bases
from posttrain.serve.command import ServeConfig, _joined_models, api_key, main, substitutes
from posttrain.serve.local_server import LocalServer
from posttrain.serve.order import NumberedQueue
from posttrain.serve.requests import Answer, Requests, json_answer
from posttrain.serve.sdk_versions import check_version
from posttrain.serve.store import Run, Store


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"training_run_id": "r", "colour": 1}'])
def test_a_damaged_record_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_text(content)
    with pytest.raises(DataError, match="run.json"):
        Store(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"time": "", "size_bytes": 0, "colour": 1}'])
def test_a_damaged_record_of_a_checkpoint_is_named(content: str, tmp_path: Path) -> None:
    run = asdict(Run("r", "m", False, None, True, True, ""))
    (tmp_path / "r" / "weights" / "a").mkdir(parents=True)
    (tmp_path / "r" / "run.json").write_text(json.dumps(run))
    (tmp_path / "r" / "weights" / "a.json").write_text(content)
    with pytest.raises(DataError, match="a.json"):
        Store(tmp_path)


@pytest.mark.parametrize("name", ["..", "a/b", "a\\b", "a\0b", "", "x" * 4000, ".hidden", 7])
def test_checkpoint_names_that_are_refused(name: Any) -> None:
    from posttrain.serve.store import check_name

    with pytest.raises(CheckpointError, match="checkpoint name"):
        check_name(name)


def test_a_checkpoint_whose_record_finds_no_room_leaves_no_files(tmp_path: Path) -> None:
    # Trap: no client sees a checkpoint without a record, so none could delete its files
    store = Store(tmp_path)
    store.add_run(Run("r", "m", False, None, True, True, ""))

    def save() -> None:
        with store.writing("r", "weights", "a", None, None, overwrite=True) as folder:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "weights").write_text("w")

    record = tmp_path / "r" / "weights" / "a.json"
    record.mkdir(parents=True)  # in the place of the record, which then cannot be written
    with pytest.raises(OSError):
        save()
    assert not (tmp_path / "r" / "weights" / "a").exists()
    record.rmdir()
    save()
    record.unlink()
    record.mkdir()
    with pytest.raises(OSError):
        save()
    assert (store.find("tinker://r/weights/a").folder / "weights").exists()  # the one before was whole


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "localhost:8000"}, 200),
        ({"x-api-key": "tml-wrong"}, 401),
        ({"content-type": "text/plain"}, 415),
        ({"content-length": "1000000000000"}, 413),
        ({"authorization": "Bearer tml-secret", "x-api-key": ""}, 200),
    ],
)
def test_the_guard(headers: dict[str, str], status: int) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await guard._answer(200, "in", scope, receive, send)

    async def body() -> int:
        transport = httpx.ASGITransport(guard.Guard(app, "127.0.0.1", "tml-secret"))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            usual = {"x-api-key": "tml-secret", "content-type": "application/json"}
            return (await client.post("/api/v1/x", content=b"{}", headers={**usual, **headers})).status_code

    assert asyncio.run(body()) == status


def test_a_body_without_a_length_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MOST_BODY_BYTES", 1000)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 100

    async def body() -> int:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(guard.Guard(app)), base_url="http://127.0.0.1"
        ) as client:
            headers = {"content-type": "application/json"}
            return (await client.post("/api/v1/x", content=parts(), headers=headers)).status_code

    assert asyncio.run(body()) == 413


def test_a_long_poll_of_a_stopping_server_is_answered() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise asyncio.CancelledError

    async def body() -> int:
        transport = httpx.ASGITransport(guard.Guard(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return (await client.post("/api/v1/x")).status_code

    assert asyncio.run(body()) == 503


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def test_requests_in_order_whatever_order_they_arrive_in() -> None:
    async def body() -> list[int]:
        order: list[int] = []
        opened: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        queue = NumberedQueue(opened)

        def start(number: int) -> Callable[[str], Awaitable[Answer]]:
            async def started(client: str) -> Answer:
                order.append(number)
                await asyncio.sleep(0.01 / number)
                return json_answer(number)

            return started

        futures = [queue.put(number, start(number)) for number in (3, 1)]
        opened.set_result("client")
        await asyncio.sleep(0.01)
        futures += [queue.put(number, start(number)) for number in (4, 2)]
        await asyncio.gather(*futures)
        with pytest.raises(DataError, match="used before"):
            await queue.put(2, start(2))
        queue.close()
        return order

    assert run(body()) == [1, 2, 3, 4]


def test_answers_are_dropped_beyond_the_number_of_bytes() -> None:
    async def body() -> None:
        requests = Requests(most_bytes=250)
        ids = [requests.accept(i, _answer(b"x" * 100)).id for i in range(4)]
        await asyncio.sleep(0.01)
        assert (await requests.wait(ids[3], 1)) is not None  # fetched: the first to go
        requests.accept("next", _answer(b""))
        with pytest.raises(KeyError):
            await requests.wait(ids[3], 1)
        assert len([i for i in ids if i in requests._by_id]) == 2

    async def _answer(content: bytes) -> Answer:
        return Answer(content)

    run(body())


def test_versions_of_the_sdk() -> None:
    assert check_version("0.38.0") == check_version("0.30.4") == check_version("") == []
    assert "newer than 0.38" in check_version("0.40.1")[0]
    with pytest.raises(ConfigError, match="older protocol"):
        check_version("0.18.2")


def test_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    assert _joined_models(["--model", "a", "port=1", "--model=b=tiny"]) == ["port=1", "model=a,b=tiny"]
    assert _joined_models(["model=", "port=1"]) == ["port=1", "model="]  # no other option is the model's name
    assert [*open_bases(["a=micro", "org/b=tiny"], None)] == ["a", "org/b"]
    for names in (["a=micro", "a=tiny"], ["../x=tiny"], ["=tiny"]):
        with pytest.raises(ConfigError):
            open_bases(names, None)
    assert substitutes("stable_reinforce=ppo") == {"stable_reinforce": "ppo"}
    for text in ("stable_reinforce=nothing", "ppo=cispo"):
        with pytest.raises(ConfigError, match="substitute"):
            substitutes(text)
    assert api_key(ServeConfig(model="tiny")) is None
    with pytest.raises(ConfigError, match="api_key"):
        api_key(ServeConfig(model="tiny", host="0.0.0.0"))
    with pytest.raises(ConfigError, match="tml-"):
        api_key(ServeConfig(model="tiny", api_key="secret"))


def test_a_client_that_comes_as_soon_as_the_address_is_told_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses: list[tuple[str, int]] = []

    def run(server: uvicorn.Server, sockets: list[socket.socket]) -> None:  # before the server itself listens
        addresses.append(sockets[0].getsockname())
        socket.create_connection(addresses[0], timeout=10).close()
        sockets[0].close()

    monkeypatch.setattr(uvicorn.Server, "run", run)
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    main(["--model", "m=micro", "port=0", "backend.engine=torch", f"checkpoint_dir={tmp_path}"])
    assert addresses


# Trap: a server closes an idle connection at the moment when a client, whose limit is the same, sends on it.
def test_a_client_gives_up_an_idle_connection_before_the_server_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[float] = []

    def run(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        kept.append(server.config.timeout_keep_alive)
        server.started = True
        sockets[0].close()

    monkeypatch.setattr(uvicorn.Server, "run", run)
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    main(["--model", "m=micro", "port=0", "backend.engine=torch", f"checkpoint_dir={tmp_path}"])
    LocalServer(Starlette()).close()
    limit = httpx.Limits().keepalive_expiry
    assert limit and len(kept) == 2 and min(kept) > limit


def test_a_port_in_use_is_named_before_a_model_is_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit):
        main(["--model", "no_such_model", f"port={taken.getsockname()[1]}", f"checkpoint_dir={tmp_path}"])
    assert "Address already in use; give another port, or port=0" in capsys.readouterr().err
