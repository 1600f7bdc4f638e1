"""What is said when training processes fail, alike or not; where they find each other, and no room for
their weights. Without Ray.
"""

import itertools
import pickle
import re
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from posttrain.backend import cluster, ranks, trainer_group, trainer_rank, weight_files
from posttrain.backend.cluster import ProcessLost
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError, DataError, EngineError, OutOfMemoryError, TrainerLostError
from posttrain.backend.ranks import ALONE, Processes, joined_processes
from posttrain.backend.trainer_group import TrainerRanks, _GroupWeights
from posttrain.backend.trainer_rank import Position, TrainerRank, interface_of
from posttrain.backend.types import GetInfoResponse
from posttrain.backend.weight_files import write_shard
from posttrain.tracking.run_folder import open_run_folder
from tests.processes import wait_until

SILENT = object()


@pytest.mark.parametrize(
    ("outcomes", "error", "says"),
    [
        ([DataError("bad"), DataError("bad")], DataError, "^bad$"),
        (
            [OutOfMemoryError("no room"), SILENT],
            TrainerLostError,
            r"1 of 2 .* failed \(OutOfMemoryError: no room\) while 1 was at work; all",
        ),
        ([1, OutOfMemoryError("no room")], TrainerLostError, r"1 of 2 .* failed \(OutOfMemoryError: no room\)"),
        ([ValueError("a"), ValueError("b")], TrainerLostError, r"2 of 2 .* failed \(ValueError: a; ValueError: b\)"),
        ([RuntimeError("gloo"), ProcessLost("SIGKILL")], TrainerLostError, r"training process 1 has died \(SIGKILL\)"),
    ],
)
def test_what_is_said(outcomes: list[Any], error: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_group, "FOLLOW_SECONDS", 0.05)
    ranks: Any = object.__new__(TrainerRanks)
    ranks._lock, ranks._lost, ranks._handles = threading.Lock(), None, []
    futures: list[Future[Any]] = [Future() for _ in outcomes]
    for future, outcome in zip(futures, outcomes, strict=True):
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        elif outcome is not SILENT:
            future.set_result(outcome)
    with pytest.raises(error, match=says):
        ranks._outcome(futures)


def test_a_process_that_dies_while_others_wait_for_it_is_heard_of_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ranks that join, the first waits for the others, and was the one that was asked."""
    monkeypatch.setattr(cluster, "future_of", lambda future: future)
    waits, dies = Future[Any](), Future[Any]()
    dies.set_exception(ProcessLost("SIGKILL"))
    with pytest.raises(ProcessLost):
        cluster.answers([waits, dies], "the training processes", 600)
    with pytest.raises(EngineError, match="the training processes did not answer within 0.01 seconds"):
        cluster.answers([waits], "the training processes", 0.01)


def looked_at(monkeypatch: pytest.MonkeyPatch, position: Callable[[int, int], Position | None]) -> str:
    """What is raised for two ranks that do not end, with `position(rank, seconds)`, None = no answer."""
    clock = itertools.count(step=25)
    monkeypatch.setattr(trainer_group, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(trainer_group, "time", SimpleNamespace(monotonic=clock.__next__))
    waiting = [Future[Any](), Future[Any]()]

    def ask(rank: int) -> Future[Position]:
        answered = Future[Position]()
        if (at := position(rank, next(clock))) is not None:
            answered.set_result(at)
        return answered

    def kill(rank: int) -> None:
        if not waiting[rank].done():
            waiting[rank].set_exception(ProcessLost())

    ranks: Any = object.__new__(TrainerRanks)
    ranks.cluster = SimpleNamespace(config=BackendConfig(call_seconds=250), position=ask, kill=kill)
    ranks._lock, ranks._looking, ranks._lost, ranks._watches = threading.Lock(), threading.Lock(), None, {}
    ranks._handles = [0, 1]
    with pytest.raises(TrainerLostError) as error:
        ranks._outcome(waiting)
    return str(error.value)


def test_a_rank_that_does_not_answer_is_named_and_then_ends_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others wait for it in a collective call; torch would end that after half an hour, without a word before."""
    says = looked_at(monkeypatch, lambda rank, at: None if rank else Position(1, "run", None, at, at))
    assert re.match(r"training process 1 has not answered for \d+ s.*\(backend.call_seconds=250\)", says)
    said = capsys.readouterr().out.splitlines()
    assert 2 <= len(said) <= 4 and all(line.startswith("WARNING training process 1 has not ans") for line in said)


def test_a_rank_that_stands_at_a_line_is_named_and_then_ends_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It answers, from another thread: a lock in a loss that is never free."""
    says = looked_at(monkeypatch, lambda rank, at: Position(1, "run", "loss.py:3 in waits" if rank else None, at, 0))
    assert re.match(r"training process 1 has stood at loss.py:3 in waits for \d+ s \(run\), and the others wait", says)
    said = capsys.readouterr().out.splitlines()
    assert 2 <= len(said) <= 4 and all(line.startswith("WARNING training process 1 has stood at loss") for line in said)


@pytest.mark.parametrize(
    "position",
    [
        lambda rank, at: Position(1, "run", "loss.py:3 in waits" if rank else None, at, at / 2),  # it computes
        lambda rank, at: Position(at, "run", "loss.py:3 in waits" if rank else None, at, 0),  # short calls
        lambda rank, at: Position(1, "run", f"loss.py:{at} in waits" if rank else None, at, 0),
        lambda rank, at: Position(1, "run", "loss.py:3 in waits", at, 0),  # all do: for what is not a rank
        lambda rank, at: Position(1, "save_state", None if rank else "files.py:3 in save", at, 0),  # a slow disk
    ],
    ids=["computes", "short calls", "another line", "all", "writes"],
)
def test_a_slow_rank_is_not_ended(
    position: Callable[[int, int], Position], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says = looked_at(monkeypatch, lambda rank, at: position(rank, at) if at < 2000 else None)
    assert "has not answered" in says  # from then on
    names = [line for line in capsys.readouterr().out.splitlines() if "has stood" in line]
    of_save = position(0, 0).method == "save_state"
    assert bool(names) == of_save and all("are ended" not in line for line in names)


@pytest.mark.parametrize(
    ("file", "line"), [("loss.py", "loss.py:1 in <module>"), (f"{trainer_rank.TORCH}/distributed/c10d.py", None)]
)
def test_a_rank_says_where_it_is(file: str, line: str | None) -> None:
    """The line that calls Python's library; none within torch, where it waits for other ranks."""
    rank, comes = TrainerRank(0, 1, BackendConfig()), threading.Event()
    waits = partial(exec, compile("comes.wait()", file, "exec"), {"comes": comes})
    rank._trainers[7] = SimpleNamespace(run=waits)  # type: ignore[assignment]
    before = rank.position()
    thread = threading.Thread(target=rank.call, args=(7, "run", ((), {})))
    thread.start()
    wait_until(lambda: comes._cond._waiters)  # type: ignore[attr-defined]
    at = rank.position()
    comes.set()
    thread.join()
    assert (before.method, before.line, at.call, at.method, at.line) == (None, None, 1, "run", line)
    assert rank.position().method is None


def test_copies_that_torchrun_has_started_are_no_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    # vLLM, which another test may have started in this process, has a group of its own
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    with pytest.raises(ConfigError, match="torchrun has started this command 2 times.*backend.trainer_processes=2"):
        open_run_folder(tmp_path / "run", "raise", BackendConfig())
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert open_run_folder(tmp_path / "run", "raise", BackendConfig()).config_file.exists()


class WithTwoArguments(Exception):
    def __init__(self, what: str, where: int):
        super().__init__(f"{what} in row {where}")


def of_a_script() -> Exception:
    class Local(Exception):
        pass

    return Local("a bad row")


def with_a_lock() -> Exception:
    error = ValueError("a bad row")
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (of_a_script, "RuntimeError: Local: a bad row"),
        (with_a_lock, "RuntimeError: ValueError: a bad row"),
        (lambda: WithTwoArguments("a zero", 3), "RuntimeError: WithTwoArguments: a zero in row 3"),
        (lambda: KeyError("labels"), "KeyError: 'labels'"),
        (lambda: DataError("row 3 is bad"), "DataError: row 3 is bad"),
    ],
)
def test_an_error_of_one_process_reaches_the_others_whatever_its_class(
    made: Callable[[], Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What pickle cannot send would end in the sending process alone, which the others wait for."""
    sent: list[bytes] = []

    def gathered(processes: Processes, item: Any) -> list[Any]:
        if processes.count == 1:
            return [item]
        if processes.rank == 1:
            sent.append(pickle.dumps(item))
        return [None, pickle.loads(sent[0])]

    monkeypatch.setattr(Processes, "gathered", gathered)
    for rank in (1, 0):
        with pytest.raises(Exception) as raised, Processes(rank, 2).same_outcome():
            if rank == 1:
                raise made()
        assert f"{type(raised.value).__name__}: {raised.value}" == says
        notes = getattr(raised.value, "__notes__", [])
        assert ["raise made()" in note for note in notes] == ([] if says.startswith("DataError") else [True])
    error = made()
    with pytest.raises(type(error)) as alone, Processes().same_outcome():
        raise error
    assert alone.value is error


def test_processes_of_torchrun_that_do_not_come_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "MEET", timedelta(seconds=1))
    variables = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE=2 is set, and MASTER_PORT is not"), joined_processes():
        pass
    with socket.socket() as kept:  # from all that do not ask to share the port
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        port = str(kept.getsockname()[1])
        monkeypatch.setenv("MASTER_PORT", port)
        taken = pytest.raises(ConfigError, match=f"127.0.0.1:{port} .*address already in use")
        with socket.create_server(("127.0.0.1", int(port))), taken, joined_processes():
            pass
        for rank in ("0", "1"):  # the first waits for the other, and the other for the first
            monkeypatch.setenv("RANK", rank)
            said = f"process {rank} of WORLD_SIZE=2 did not meet.*:{port}.* within 1 s: "
            with pytest.raises(ConfigError, match=said), joined_processes():
                pass


def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo" and interface_of("192.0.2.77") is None


@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_a_folder_that_a_node_does_not_see_is_refused_by_its_name(
    address: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`elsewhere` is a rank on a node with another file system: of a folder here, it finds none."""
    monkeypatch.setattr(trainer_rank, "node_address", lambda: "10.0.0.2")
    elsewhere: Any = SimpleNamespace(_processes=ALONE)
    asked: list[str] = []

    def every(method: str, folder: str) -> None:
        asked.append(folder)
        getattr(TrainerRank, method)(elsewhere, folder + "/elsewhere")

    ranks: Any = SimpleNamespace(cluster=SimpleNamespace(config=BackendConfig(cluster=address)), every=every)
    TrainerRanks.check_seen(ranks, Path("Qwen/Qwen2.5-0.5B"))  # a name
    TrainerRanks.check_seen(ranks, tmp_path / "gone")  # nor here
    assert not asked
    if address:
        with pytest.raises(ConfigError, match=f"node 10.0.0.2 does not see {tmp_path}.* that all nodes share"):
            TrainerRanks.check_seen(ranks, tmp_path)
    else:
        TrainerRanks.check_seen(ranks, tmp_path)
        assert not asked  # one machine


def test_weights_without_room_name_the_folder_and_leave_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(weight_files, "save_file", full)

    def publish(_: str, number: int, folder: Path) -> None:
        write_shard(folder, 0, 1, [("w", torch.ones(2**20))])

    ranks: Any = SimpleNamespace(cluster=SimpleNamespace(folder=tmp_path), every=publish)
    source = _GroupWeights(ranks, 0, torch.float32, GetInfoResponse("m", 0, 1, 1, 512, "cpu", "float32"))
    with pytest.raises(EngineError, match=rf"0.00391 GiB cannot be written to {tmp_path}, which .* backend.sync_dir"):
        source.sampler_weights()
    assert not list(tmp_path.iterdir())
