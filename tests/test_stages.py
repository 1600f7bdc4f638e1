"""Stages of a recipe: made once, in order, with the settings that are asked for; a killed one goes
on.
"""

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from posttrain.backend.errors import ConfigError, DataError
from posttrain.tracking.stages import Stage, chosen, run_stages


def three(folder: Path, size: int = 3, words: str = "a", fail: bool = False) -> list[Stage]:
    """A file, a folder that needs it, and a file, made bit by bit, that needs both."""
    (folder / "log.txt").touch()

    def note(name: str) -> None:
        with (folder / "log.txt").open("a") as log:
            log.write(name)

    def make_model() -> None:
        note("m")
        (folder / "model").mkdir(exist_ok=True)
        if fail:
            (folder / "model" / "half").touch()
            raise KeyboardInterrupt
        (folder / "model" / "whole").touch()

    def make_lines() -> None:
        note("l")
        with lines.unfinished.open("a") as file:
            file.write("line\n")
        if fail:
            raise KeyboardInterrupt
        lines.unfinished.rename(lines.path)

    async def make_data() -> None:
        note("d")
        (folder / "data").write_text("data")

    data = Stage("data", folder / "data", {"size": size}, make_data)
    model = Stage("model", folder / "model", {"start": str(folder / "data")}, make_model, [data], "whole")
    lines = Stage("lines", folder / "lines.txt", {"words": words}, make_lines, [model, data])
    return [data, model, lines]


def log(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def test_what_is_missing_is_made_once_after_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(run_stages(three(tmp_path)[2:]))
    assert log(tmp_path) == "dml"
    capsys.readouterr()
    asyncio.run(run_stages(three(tmp_path)))
    assert log(tmp_path) == "dml" and capsys.readouterr().out.count(" is there: ") == 3
    (tmp_path / "data").unlink()  # nothing that is asked for needs it
    asyncio.run(run_stages(three(tmp_path)[1:]))
    assert log(tmp_path) == "dml"
    record = json.loads((tmp_path / "lines.txt.made_with.json").read_text())
    assert record == {"data": {"size": 3}, "model": {"start": "data"}, "lines": {"words": "a"}}
    tmp_path.rename(moved := tmp_path.with_name("moved"))
    asyncio.run(run_stages(three(moved)[1:]))
    assert log(moved) == "dml"


def test_other_settings_are_refused_downstream_before_anything_is_made(tmp_path: Path) -> None:
    asyncio.run(run_stages(three(tmp_path)))
    (tmp_path / "data").unlink()
    changes: list[tuple[dict[str, Any], str]] = [
        ({"size": 4}, r"data.size=3 \(now 4\)"),
        ({"words": "b"}, r"lines.words=a \(now b\)"),
    ]
    for changed, text in changes:
        with pytest.raises(
            ConfigError, match=f"lines.txt was made with {text}: delete it to make it anew, or choose another"
        ):
            asyncio.run(run_stages([three(tmp_path, **changed)[0], three(tmp_path, **changed)[2]]))
    assert log(tmp_path) == "dml"
    (tmp_path / "lines.txt.made_with.json").unlink()
    with pytest.raises(ConfigError, match=r"lines.txt is there, but not .*lines.txt.made_with.json"):
        asyncio.run(run_stages(three(tmp_path)[2:]))
    (tmp_path / "lines.txt.made_with.json").write_text("[]")
    with pytest.raises(DataError, match="made_with.json: a list, where an object"):
        asyncio.run(run_stages(three(tmp_path)[2:]))


@pytest.mark.parametrize(("index", "before", "after"), [(1, "dm", "dmm"), (2, "dml", "dmll")])
def test_a_killed_stage_goes_on_with_its_settings_only(index: int, before: str, after: str, tmp_path: Path) -> None:
    asyncio.run(run_stages(three(tmp_path)[:index]))
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(run_stages(three(tmp_path, fail=True)[index : index + 1]))
    assert log(tmp_path) == before
    with pytest.raises(ConfigError, match=r"data.size=3 \(now 9\)"):
        three(tmp_path, size=9)[index].is_finished()
    asyncio.run(run_stages(three(tmp_path)[index : index + 1]))
    assert log(tmp_path) == after and three(tmp_path)[index].is_finished()


def test_what_makes_no_result_and_what_is_always_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the stage nothing has ended without making"):
        asyncio.run(run_stages([Stage("nothing", tmp_path / "nothing", {}, lambda: None)]))
    for text in "ab":
        always = Stage(
            "always", tmp_path / "file", {"text": text}, partial((tmp_path / "file").write_text, text), always=True
        )
        asyncio.run(run_stages([always]))
        assert always.path.read_text() == text and json.loads(always.record.read_text()) == {"always": {"text": text}}
    with pytest.raises(ConfigError, match="stages=lime: the stages are data, model, lines"):
        chosen(three(tmp_path), ["lime", "data"])
