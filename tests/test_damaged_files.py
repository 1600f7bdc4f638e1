"""Every file of a run is met truncated, empty, full of garbage, of another kind, unreadable: one
line says which file, and what to do. Files of data are in test_damaged_data.py.
"""

# Trap: a damaged file that ends in a traceback, or is passed over.

import errno
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import chz
import pytest

from posttrain.backend.errors import ConfigError, CookbookError, DataError
from posttrain.tracking.jsonl import append_jsonl, parse_json, write_atomically
from posttrain.tracking.metrics_log import MetricsLog, read_metrics
from posttrain.tracking.one_line_errors import one_line_errors
from posttrain.tracking.run_folder import RunFolder, open_run_folder
from posttrain.tracking.stages import Stage
from posttrain.tracking.transcript_index import IndexEntry, update_index
from preference.reference import read_reference
from recipes.bstar.records import read_candidates, read_choice, read_selection, read_summaries


@chz.chz
class RunConfig:
    model_name: str = "tiny"
    learning_rate: float = 1e-3


PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x01\x00\n"
CANDIDATE = {
    "query": "q",
    "sample": 0,
    "temperature": "1",
    "text": "a",
    "tokens": [5],
    "answer": "a",
    "correct": True,
    "stop": "stop",
}
REFERENCE = {"model_name": "tiny"}


@dataclass(frozen=True)
class Read:
    """A file that is read: its whole content, its reader, and the damages that it may survive (a
    torn line of records, for one).
    """

    name: str
    content: str
    reader: Callable[[Path], Any]
    survives: tuple[str, ...] = ()


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def resumed(path: Path) -> RunFolder:
    return open_run_folder(path.parent, "resume", RunConfig())


def finished_stage(path: Path) -> bool:
    (path.parent / "data").touch()
    return Stage("data", path.parent / "data", {"seed": 0}, print).is_finished()


# what a kill may leave of a file of records; a command goes on from what is whole
TORN = ("empty", "truncated")
STEPS = lines({"step": 0}, {"step": 1})
ENTRY = IndexEntry(0, 1.0, 1, 0, 1.0)
READS = [
    Read("config.json", json.dumps({"model_name": "tiny", "learning_rate": 1e-3}, indent=2) + "\n", resumed),
    Read("metrics.jsonl", STEPS, lambda path: resumed(path).truncate_metrics(1), TORN),
    Read("metrics.jsonl", STEPS, lambda path: read_metrics(path.parent), TORN),
    Read(
        "checkpoints.jsonl",
        lines(*({"name": f"00000{n}", "step": n, "path": f"checkpoints/{n}"} for n in (1, 2))),
        lambda path: resumed(path).last_checkpoint(),
        ("truncated",),
    ),
    Read(
        "reference_logprobs.jsonl",
        lines({"reference": REFERENCE}, {"key": "a", "logprob": -1.0}),
        lambda path: read_reference(path, REFERENCE),
        TORN,
    ),
    Read("index.jsonl", lines(asdict(ENTRY)), lambda path: update_index(path.parent, ENTRY), TORN),
    Read("data.made_with.json", json.dumps({"data": {"seed": 0}}, indent=2) + "\n", finished_stage),
    Read("samples.jsonl", lines(CANDIDATE, CANDIDATE), read_candidates, TORN),
    Read(
        "selection.jsonl",
        lines({"query": "q", "sample": 0, "reward": 1.0, "correct": True, "text": "a"}),
        read_selection,
        TORN,
    ),
    Read("choice.json", json.dumps({"temperature": "1", "threshold": "0", "score": None, "surface": []}), read_choice),
    Read(
        "summary.json", json.dumps({"round": 1}), lambda path: read_summaries(path.parent.parent), ("a loop of links",)
    ),
]


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path, bytes], object]] = {
    "empty": lambda path, whole: _write(path, b""),
    "truncated": lambda path, whole: _write(path, whole[: len(whole) - 5]),
    "garbage": lambda path, whole: _write(path, bytes(range(1, 256)) + b"\n" + whole),
    "another kind": lambda path, whole: _write(path, PNG + whole),
    "a list": lambda path, whole: _write(
        path, b"[1, 2]\n" + whole.partition(b"\n")[2] if b"\n{" in whole else b"[1, 2]\n"
    ),
    "other fields": lambda path, whole: _write(path, b'{"unknown": 1}\n'),
    "too deep": lambda path, whole: _write(path, b"[" * 200_000 + b"\n"),
    "half a surrogate": lambda path, whole: _write(path, b'{"step": 0, "text": "\\ud800"}\n' + whole),
    "a folder": lambda path, whole: path.mkdir(),
    # opens, but reading fails, for root too
    "unreadable": lambda path, whole: path.symlink_to("/proc/self/mem"),
    "a loop of links": lambda path, whole: path.symlink_to(path.name),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("read", READS, ids=lambda read: read.name)
def test_a_damaged_file_is_one_line_with_its_name(read: Read, damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "round_01"
    for name in ("1", "2"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    (folder / "metrics.jsonl").touch()
    file = folder / read.name
    file.unlink(missing_ok=True)
    file.write_text(read.content)
    read.reader(file)  # whole, it is read
    file.unlink()
    DAMAGES[damage](file, read.content.encode())
    if damage in read.survives:
        read.reader(file)
        return
    with pytest.raises(CookbookError) as error:
        read.reader(file)
    text = str(error.value)
    assert "\n" not in text and len(text) < 500, text
    # settings, but other ones
    assert read.name in text or "unknown=1 (now None)" in text or "model_name=None" in text, text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"a": "\xff"}', "not JSON"),
        (b'{"a": ', "not JSON"),
        (b'{"a": "\\udfff"}', "surrogate"),
        (b'{"\\ud800": 1}', "surrogate"),
        (b'[{"a":' * 100_000, "nested too deep"),
        (b"NaN1", "not JSON"),
    ],
)
def test_what_is_no_json_is_said_with_its_place(text: bytes, says: str) -> None:
    with pytest.raises(DataError, match=f"^here:3: .*{says}"):
        parse_json(text, "here:3")
    # a whole pair is text
    assert parse_json(b'{"a": "\\ud83d\\ude00"}', "here") == {"a": "\U0001f600"}


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path, capsys, monkeypatch) -> None:
    def leaves(action: Callable[[], object]) -> str:
        with pytest.raises(SystemExit) as left, one_line_errors():
            action()
        assert left.value.code == 2
        return capsys.readouterr().err

    said = leaves(lambda: append_jsonl(Path("/dev/full"), {"step": 0}))
    assert said.startswith("error: ") and "No space left" in said and "behavior_if_log_dir_exists=resume" in said

    def too_large() -> None:
        raise OSError(errno.EFBIG, "File too large")  # ulimit -f

    assert leaves(too_large).startswith("error: File too large; what was saved before is whole")
    file = tmp_path / "config.json"
    file.write_text("old")
    monkeypatch.setattr("os.fsync", lambda descriptor: Path("/dev/full").write_bytes(b"x"))
    assert "No space left" in leaves(lambda: write_atomically(file, "new"))
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    said = leaves(lambda: (tmp_path / "nowhere" / "x").read_text())
    assert "nowhere/x: No such file or directory; check the path" in said and said.count("\n") == 1


@pytest.mark.parametrize("name", ["step", "non_finite"])
def test_a_metric_cannot_damage_the_file_of_metrics(name: str, tmp_path: Path) -> None:
    """Trap: a user's metric `step` in the place of the step, and a run that does not resume."""
    log = MetricsLog(RunFolder(tmp_path))
    log.log({"mine/step": 2.0}, 0)
    with pytest.raises(ConfigError, match=f"a metric is called '{name}'"):
        log.log({name: 2.0}, 1)
    assert read_metrics(tmp_path) == [{"step": 0, "mine/step": 2.0}]


def test_the_notes_of_an_error_are_in_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    error = ConfigError("no number\nin the answer")
    error.add_note("9 of 9 rollouts failed\n(limits.max_failed_fraction)")
    with pytest.raises(SystemExit), one_line_errors():
        raise error
    said = "error: no number in the answer (9 of 9 rollouts failed (limits.max_failed_fraction))\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("path", ["/etc/hostname/run", "/proc/run", "/sys/run", "a\0b", "x" * 300], ids=str.__repr__)
def test_a_path_that_can_be_no_run_folder_is_said_at_once(path: str) -> None:
    with pytest.raises(CookbookError, match="choose another"):
        open_run_folder(path, "resume", RunConfig())


def test_lost_records_of_checkpoints_do_not_start_the_run_anew(tmp_path: Path) -> None:
    run = open_run_folder(tmp_path / "run", "raise", RunConfig())
    (run.checkpoints / "000010").mkdir()
    assert run.last_checkpoint() is None  # killed before the first record
    (run.checkpoints / "000020").mkdir()
    with pytest.raises(CookbookError, match=r"checkpoints.jsonl.*000010.*000020"):
        run.last_checkpoint()
