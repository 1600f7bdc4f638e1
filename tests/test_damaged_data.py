"""Files of data damaged in every way: one line that names the file, never a traceback."""

import asyncio
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs.arc_challenge import ArcChallenge
from envs.code import CodeBuilder
from envs.completion_env import ComparisonPrompts
from envs.math_word import Gsm8kBuilder, MathWordBuilder
from envs.star_graph import StarGraph, sample_graphs
from envs.star_graph_files import format_line, read_rows
from posttrain.backend.errors import CookbookError, DataError
from preference.comparisons import LabeledBuilder
from preference.forms import FileBuilder as PreferenceFile
from preference.prm_labels import read_records
from recipes.belief_state.judge_votes import read_contests
from recipes.belief_state.text_data import TextData
from recipes.latro.tasks import Gsm8kBuilder as LatroGsm8k
from recipes.latro.tasks import JsonlBuilder, MathBuilder
from supervised.data import FileBuilder
from tests.jsonl_files import write
from tests.test_data_files import ASSISTANT, PLAIN, USER

PROBLEM = {"question": "2+3=", "answer": "It is 5.\n#### 5"}
ARC = {"question": "Why?", "choices": {"label": ["A", "B"], "text": ["so", "not so"]}, "answerKey": "A"}
Reader = Callable[[str], object]
READERS: dict[str, tuple[dict[str, Any], Reader]] = {
    "supervised": ({"messages": [USER, ASSISTANT]}, lambda path: FileBuilder(path=path, batch_size=1)(PLAIN)),
    "preference": ({"prompt": "2+3=", "chosen": "5", "rejected": "6"}, lambda path: PreferenceFile(path=path)()),
    "labeled": (
        {"prompt": "hi", "completion_A": "hello", "completion_B": "go", "label": "A"},
        lambda path: LabeledBuilder(path=path)(),
    ),
    "prompts of pairwise": (
        {"prompt": "2+3=", "chosen": "5", "rejected": "6"},
        lambda path: ComparisonPrompts(comparisons=PreferenceFile(path=path))(),
    ),
    "step labels": ({"input": "2+3=", "output": ["5"], "label": [1]}, read_records),
    "code": ({"question": "?", "tests": [{"assert": "pass"}]}, lambda path: CodeBuilder(train_path=path).splits()),
    "math": (
        {"problem": "2+3", "solution": r"\boxed{5}"},
        lambda path: asyncio.run(MathWordBuilder(train_path=path, batch_size=1)(PLAIN)),
    ),
    "gsm8k": (PROBLEM, lambda path: asyncio.run(Gsm8kBuilder(data_dir=str(Path(path).parent), batch_size=1)(PLAIN))),
    "arc": (ARC, lambda path: ArcChallenge(data_dir=str(Path(path).parent)).read("train", None)),
    "LaTRO jsonl": (
        {"queries": "2+3=", "responses": "5", "groundtruth": "5"},
        lambda path: JsonlBuilder(train_path=path).tasks("train", None),
    ),
    "LaTRO gsm8k": (PROBLEM, lambda path: LatroGsm8k(data_dir=str(Path(path).parent)).tasks("train", None)),
    "LaTRO math": (
        {"problem": "2+3", "solution": r"\boxed{5}"},
        lambda path: MathBuilder(train_path=path).tasks("train", None),
    ),
    "stories to judge": (
        {"prompt": "a", "goal": "c", "original": "b", "generated": "b"},
        lambda path: read_contests(path, path),
    ),
    "documents": ({"text": "abc"}, lambda path: TextData(source=path)._read(path, "train")),
}
DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "blank": b"\n \n",
    "binary": b"\x00\x01PAR1\x00\xff" * 20,
    "UTF-16": '{"a": 1}\n'.encode("utf-16"),
    "Latin-1": b'GOOD\n{"messages": "\xff"}\n',
    "torn": b'GOOD\n{"messages": [{"role": "us',
    "no JSON": b"GOOD\nhello\n",
    "deep": b"GOOD\n" + b"[" * 200_000 + b"]" * 200_000 + b"\n",
    "half a surrogate pair": b'GOOD\n{"a": "\\ud800"}\n',
    "lists": b"[GOOD]\n[GOOD]\n",
    "a list of numbers": b"[7]\n",
    "a torn list": b"[GOOD, ",
    "an object of several lines": b'{\n"a": 1}\n',
    "torn gzip": gzip.compress(b"GOOD\n" * 99)[:-20],
    "a number": b"GOOD\n7\n",
    "null": b"GOOD\nnull\n",
    "no fields": b"GOOD\n{}\n",
    "other fields": b'GOOD\n{"x": 1}\n',
    "nulls": b"NULLS\n",
    "numbers": b"NUMBERS\n",
}


def damaged(path: Path, content: bytes, good: dict[str, Any]) -> str:
    for word, row in (("GOOD", good), ("NULLS", dict.fromkeys(good)), ("NUMBERS", dict.fromkeys(good, 7.5))):
        content = content.replace(word.encode(), json.dumps(row).encode())
    path.write_bytes(content)
    return str(path)


# Every reader has its rows from `supervised.rows`, which one of them shows whole; what a row holds is its own.
OWN = ("torn", "no fields", "other fields", "nulls", "numbers")


# Trap: a damaged data file that ends in a traceback.
@pytest.mark.parametrize(
    ("reader", "damage"), [(r, d) for r in READERS for d in DAMAGED if r == "supervised" or d in OWN]
)
def test_damaged_files_are_one_line_with_the_file_and_the_line(tmp_path: Path, reader: str, damage: str):
    good, read = READERS[reader]
    write(tmp_path / "test.jsonl", good)
    path = damaged(tmp_path / "train.jsonl", DAMAGED[damage], good)
    if reader == "LaTRO jsonl" and damage == "numbers":  # columns of numbers are taken
        assert read(path)
        return
    with pytest.raises(CookbookError) as error:
        read(path)
    message = str(error.value)
    assert "train.jsonl" in message and "\n" not in message and len(message) < 1200
    assert (
        damage in ("empty", "blank", "a torn list", "torn gzip")
        or "train.jsonl:1" in message
        or "train.jsonl:row 1" in message
        or "train.jsonl:2" in message
    )


@pytest.mark.parametrize("reader", READERS)
def test_files_that_are_not_there_or_are_folders(tmp_path: Path, reader: str):
    good, read = READERS[reader]
    path = tmp_path / "train.jsonl"
    with pytest.raises(DataError, match="no such file"):
        read(str(path))
    path.mkdir()
    with pytest.raises(DataError, match="is a folder"):
        read(str(path))
    path.rmdir()
    path.symlink_to("/proc/self/mem")  # opens, and cannot be read
    with pytest.raises(DataError, match="cannot be read|no such file"):
        read(str(path))
    path.unlink()
    path.symlink_to(path.name)  # a loop
    with pytest.raises(DataError, match=r"train\.jsonl"):
        read(str(path))


def test_marks_line_ends_and_blank_lines_do_no_harm(tmp_path: Path):
    good, read = READERS["supervised"]
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(good).encode() + b"\r\n\r\n\n \n")
    assert read(str(tmp_path / "train.jsonl"))


def test_a_long_example_is_announced_and_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write(
        tmp_path / "data.jsonl", {"prompt": "a" * 2_000_000, "completion": "b"}, {"prompt": "a", "completion": "b"}
    )
    FileBuilder(path=path, batch_size=1, max_length=100)(PLAIN)
    out = capsys.readouterr().out
    assert "data.jsonl:1: one example of 2 MB" in out and "1 longer than 100 tokens dropped" in out


GRAPH = StarGraph(2, 3, 12)
LINE = format_line(sample_graphs(GRAPH, 1, 0)[0], GRAPH).encode()
BROKEN_HEADER = (
    b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|u1', 'fortran_order': False, 'shape': (2, ".ljust(117) + b"\n" + bytes(80)
)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\x00\xff" * 50, LINE[:-3], "ä".encode(), BROKEN_HEADER])
@pytest.mark.parametrize("suffix", [".txt", ".npy"])
def test_damaged_star_graphs_are_named(tmp_path: Path, content: bytes, suffix: str):
    path = tmp_path / f"graph_2_3_sample_1{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match="graph_2_3_sample_1"):
        read_rows(path, GRAPH)


@pytest.mark.parametrize(
    "array",
    [np.zeros(3), np.zeros((2, 3), dtype=np.uint8), np.zeros((0, GRAPH.length), dtype=np.uint8), np.array(["a"])],
)
def test_arrays_of_another_kind_are_named(tmp_path: Path, array: np.ndarray):
    np.save(path := tmp_path / "graph_2_3_sample_1.npy", array)
    with pytest.raises(DataError, match="graph_2_3_sample_1"):
        read_rows(path, GRAPH)
