"""Supervised sets of millions of examples: what a token costs, several processes, a look at a few rows."""

import json
import os
import signal
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from posttrain.backend.errors import DataError
from posttrain.backend.tokenizers import character_tokenizer
from posttrain.renderers import get_renderer
from posttrain.renderers.types import Message
from posttrain.tracking.datasets import ListDataset
from posttrain.tracking.jsonl import read_jsonl
from preference.bradley_terry import PreferencePairsBuilder
from preference.comparisons import ChosenRejectedBuilder
from preference.label_model import LabelExamplesBuilder
from preference.pairs import render_pairs
from preference.step_data import StepExamplesBuilder
from preference.types import Comparison, LabeledComparison
from supervised import examples
from supervised.data import FileBuilder, HuggingFaceBuilder, MixtureBuilder, conversation_to_datum
from supervised.examples import Examples, by_processes, datum_from_tokens_weights
from supervised.types import SupervisedDatasetBuilder
from supervised.viz_sft_dataset import examples as shown

RENDERER = get_renderer("chat_template", character_tokenizer(512))


def chats(path: Path, n: int) -> str:
    rows = [
        [{"role": "user", "content": f"{i}+{i}"}, {"role": "assistant", "content": "9" * (i % 50)}] for i in range(n)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return str(path)


def in_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SERIAL_ROWS": 10, "CHUNK_ROWS": 7, "AHEAD": 2, "_cores": lambda: 2}.items():
        monkeypatch.setattr(examples, name, value)


two_processes = pytest.fixture(in_two_processes)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_packed_examples_are_the_same_data(reduction: str) -> None:
    packed, whole = Examples(reduction), []
    for n in range(2, 40):
        tokens, weights = [*range(1000, 1000 + n)], [0.0] + [0.1 * (t % 7) for t in range(n - 2)] + [1.0]
        packed.append(tokens, weights, 30)
        whole.append((tokens, weights))
    data = [datum_from_tokens_weights(tokens, weights, 30, reduction) for tokens, weights in whole[:29]]
    assert len(packed) == 38 and [*packed][:29] == data and packed[-1] == packed[37]
    with pytest.raises(DataError, match="no weight"):
        packed.append([1, 2], [1.0, 0.0])
    assert len(packed) == 38


def test_a_token_costs_8_bytes() -> None:
    tokens, weights, packed = [*range(1000, 1500)], [1.0] * 500, Examples()
    packed.append(tokens, weights)
    tracemalloc.start()
    for _ in range(400):
        packed.append(tokens, weights)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size < 10 * 400 * 500


# Trap: with a batch order, a seed or a dropped row of its own, a run on another machine is another run.
def test_several_processes_make_the_same_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    builder = FileBuilder(path=chats(tmp_path / "chats.jsonl", 100), max_length=60, batch_size=9, test_size=20)
    check_two_processes(builder, 1, monkeypatch, capsys)


def check_two_processes(
    builder: SupervisedDatasetBuilder, pools: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They make the sets of one process and print the same, in `pools` of them at least."""
    one = builder(RENDERER)
    printed = capsys.readouterr().out
    in_two_processes(monkeypatch)
    used: list[int] = []
    monkeypatch.setattr(examples, "ProcessPoolExecutor", _counting(examples.ProcessPoolExecutor, used))
    two = builder(RENDERER)
    assert len(used) >= pools and capsys.readouterr().out == printed and "dropped" in printed
    for a, b in zip(one, two, strict=True):
        assert a is not None and b is not None
        assert [a.get_batch(i) for i in range(len(a))] == [b.get_batch(i) for i in range(len(b))]


def _counting(pool: type, used: list[int]):  # type: ignore[no-untyped-def]
    def opened(processes: int, *args: object) -> object:
        used.append(processes)
        return pool(processes, *args)

    return opened


@pytest.mark.usefixtures("two_processes")
def test_the_first_bad_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    lines = Path(chats(path, 60)).read_text().splitlines()
    for bad in (33, 40):
        lines[bad] = json.dumps({"messages": [{"role": "user", "content": f"alone {bad}"}]})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"chats.jsonl:34: no message to train on"):
        FileBuilder(path=str(path))(RENDERER)


@pytest.mark.usefixtures("two_processes")
def test_a_killed_process_is_an_error() -> None:
    def work(rows: Sequence[int]) -> int:
        if 40 in rows:
            os.kill(os.getpid(), signal.SIGKILL)
        return len(rows)

    with pytest.raises(DataError, match="a process was killed"):
        list(by_processes(work, range(50), "counting"))


def test_a_look_at_a_few_examples_tokenizes_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = FileBuilder(path=chats(tmp_path / "chats.jsonl", 100), test_size=10, batch_size=4)
    whole = builder(RENDERER)[0]
    tokenized = []
    example = FileBuilder.example
    monkeypatch.setattr(FileBuilder, "example", lambda self, *row: tokenized.append(row) or example(self, *row))
    assert shown(builder, RENDERER, 6) == [*whole.get_batch(0), *whole.get_batch(1)][:6]
    assert len(tokenized) == 6
    assert len(shown(builder, RENDERER, 1000)) == 90


def test_rows_of_a_table_are_read_by_blocks(tmp_path: Path) -> None:
    import datasets

    path = chats(tmp_path / "chats.jsonl", 30)
    builder = HuggingFaceBuilder(name=path, test_size=10, batch_size=4)
    rows, _ = builder.rows()
    assert not isinstance(rows, list) and len(rows) == 30
    assert [*rows] == [rows[i] for i in range(30)] == [(f"{path}[train]:{i}", row) for i, row in enumerate(_rows(path))]
    train, test = builder(RENDERER)
    same = FileBuilder(path=path, test_size=10, batch_size=4)(RENDERER)
    assert test is not None and same[1] is not None
    assert [train.get_batch(0), test.get_batch(0)] == [same[0].get_batch(0), same[1].get_batch(0)]
    assert isinstance(rows._table, datasets.Dataset)  # type: ignore[attr-defined]


def _rows(path: str) -> list[dict[str, object]]:
    return read_jsonl(path)


def test_a_mixture_holds_no_copies(tmp_path: Path) -> None:
    builders = [FileBuilder(path=chats(tmp_path / f"{n}.jsonl", n)) for n in (5, 12)]
    mixture, _ = MixtureBuilder(builders=builders, batch_size=4)(RENDERER)  # type: ignore[arg-type]
    assert isinstance(mixture, ListDataset) and not isinstance(mixture.items, list)
    messages = [{"role": "user", "content": "0+0"}, {"role": "assistant", "content": ""}]
    first = conversation_to_datum(messages, RENDERER)  # type: ignore[arg-type]
    assert sum(datum == first for datum in mixture.items) == 2 and len(mixture.items) == 17


def test_preferences_by_several_processes_are_the_same_pairs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    comparisons = [
        LabeledComparison(
            Comparison([{"role": "user", "content": f"{i}?"}], _said("9" * (i % 40 + 1)), _said("8" * 9)),
            "Tie" if i % 9 == 0 else "B" if i % 2 else "A",
            where=f"row {i}",
        )
        for i in range(60)
    ]
    one = [*render_pairs(comparisons, RENDERER, max_length=60)]
    printed = capsys.readouterr().out
    in_two_processes(monkeypatch)
    two = render_pairs(comparisons, RENDERER, max_length=60)
    assert capsys.readouterr().out == printed and "ties" in printed and "longer" in printed
    assert [(pair.chosen, pair.rejected) for pair in one] == [(pair.chosen, pair.rejected) for pair in two]
    with pytest.raises(DataError, match="row 0: a tie"):
        render_pairs(comparisons, RENDERER, ties="raise")


@pytest.mark.parametrize("kind", ["scalar", "label", "steps"])
def test_sets_of_reward_models_by_several_processes_are_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    pairs = [{"prompt": f"{i}?", "chosen": "9" * (i % 40 + 1), "rejected": "8"} for i in range(60)]
    solutions = [{"input": f"{i}?", "output": ["9" * (i % 40 + 1), "#1"], "label": [1, i % 2]} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in (solutions if kind == "steps" else pairs)))
    made = {"scalar": PreferencePairsBuilder, "label": LabelExamplesBuilder}
    common: Any = {"max_length": 60, "batch_size": 8}
    if kind == "steps":
        builder: SupervisedDatasetBuilder = StepExamplesBuilder(path=str(path), test_size=20, **common)
    else:
        builder = made[kind](comparisons=ChosenRejectedBuilder(path=str(path), test_size=20), **common)
    check_two_processes(builder, 2, monkeypatch, capsys)


def _said(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]
