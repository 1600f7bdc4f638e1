"""Comparisons from every shape of row: what they say, what is dropped and counted, what is refused,
and what is held out.
"""

from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.renderers import get_renderer, with_tools
from posttrain.renderers.types import Message, TrainOnWhat
from preference.bradley_terry import PreferencePairsBuilder
from preference.comparisons import (
    ChosenRejectedBuilder,
    LabeledBuilder,
    PreferenceRowsBuilder,
    RatedPairBuilder,
    ScoredSamplesBuilder,
    TranscriptBuilder,
    in_both_orders,
    prompt_hash,
    randomly_swapped,
    split_by_prompt,
)
from preference.forms import FileBuilder
from preference.label_model import question
from preference.pairs import render_pairs
from preference.types import Comparison, LabeledComparison
from supervised.rows import conversation
from tests.jsonl_files import write
from tests.test_message_parts import CALCULATOR, RENDERERS


def say(role: str, content: str) -> Message:
    return Message(role=role, content=content)


def pair(prompt: str, a: str, b: str, label: Any = "A") -> LabeledComparison:
    return LabeledComparison(Comparison([say("user", prompt)], [say("assistant", a)], [say("assistant", b)]), label)


USER, GOOD, BAD = say("user", "2+2?"), say("assistant", "4"), say("assistant", "5")
SHAPES: list[tuple[type[PreferenceRowsBuilder], dict[str, Any], dict[str, Any]]] = [
    (LabeledBuilder, {"prompt": "2+2?", "completion_A": "5", "completion_B": [GOOD], "label": "B"}, {}),
    (ChosenRejectedBuilder, {"prompt": "2+2?", "chosen": "4", "rejected": "5"}, {}),
    (ChosenRejectedBuilder, {"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score": 3}, {}),
    (ChosenRejectedBuilder, {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, {}),
    (ChosenRejectedBuilder, {"q": "2+2?", "right": "4", "wrong": "5"},
     {"prompt_field": "q", "chosen_field": "right", "rejected_field": "wrong"}),
    (TranscriptBuilder, {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"}, {}),
    (RatedPairBuilder, {"context": [USER], "response1": "5", "response2": "4", "overall_preference": 2}, {}),
    (RatedPairBuilder, {"context": [USER], "response1": "4", "response2": "5", "overall_preference": -2}, {}),
    (ScoredSamplesBuilder, {"prompt": "2+2?", "samples": [{"completion": "5", "score": 1.5}, {"completion": "4", "score": 4}]}, {}),
    (ScoredSamplesBuilder, {"question": "2+2?", "small": {"solution": "5", "ok": False}, "large": {"solution": "4", "ok": True}},
     {"prompt_field": "question", "completion_field": "solution", "score_field": "ok"}),
]  # fmt: skip


@pytest.mark.parametrize(("builder", "row", "options"), SHAPES)
def test_every_shape_says_which_answer_is_better(builder, row, options, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", row, row | {"system": "Be brief."})
    (one, with_system), held_out = builder(path=path, **options)()
    chosen, rejected = one.chosen_and_rejected()
    assert (list(one.comparison.prompt_conversation), list(chosen), list(rejected)) == ([USER], [GOOD], [BAD])
    assert list(with_system.comparison.prompt_conversation) == [say("system", "Be brief."), USER]
    assert held_out == [] and one.where == f"{tmp_path / 'a.jsonl'}:1"


def test_a_folder_of_the_hub_s_form_reads_like_a_file(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", {"chosen": [USER, GOOD], "rejected": [USER, BAD]})
    (one,), _ = ChosenRejectedBuilder(path=str(tmp_path))()
    assert list(one.comparison.completion_A) == [GOOD] and one.where.endswith("[train]:0")


def test_conversations_are_cut_where_they_part(tmp_path: Path) -> None:
    start = [USER, BAD, say("user", "sure?")]
    row = {"chosen": [*start, GOOD], "rejected": [*start, BAD, say("user", "really?"), BAD]}
    (one,), _ = ChosenRejectedBuilder(path=write(tmp_path / "a.jsonl", row))()
    assert list(one.comparison.prompt_conversation) == start and len(one.comparison.completion_B) == 3


# Trap: a tie turned into a preference.
def test_sides_swap_with_their_label_and_ties_have_no_better_side() -> None:
    assert pair("p", "x", "y", "B").swap() == pair("p", "y", "x", "A")
    tie = pair("p", "x", "y", "Tie")
    assert tie.swap().label == "Tie"
    with pytest.raises(DataError, match="tie has no better"):
        tie.chosen_and_rejected()


def test_swaps_follow_the_example_and_the_seed_and_not_the_order() -> None:
    many = [pair(f"p{i}", "x", "y") for i in range(200)]
    swapped = randomly_swapped(many, seed=3)
    assert list(reversed(randomly_swapped(list(reversed(many)), seed=3))) == swapped
    assert 70 < sum(one.label == "B" for one in swapped) < 130 and swapped != randomly_swapped(many, seed=4)
    assert [one.label for one in in_both_orders(many[:2])] == ["A", "B", "A", "B"]


def test_what_is_dropped_is_counted_and_disagreement_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(a: str, b: str, label: str) -> dict[str, str]:
        return {"prompt": "p", "completion_A": a, "completion_B": b, "label": label}

    rows = [row("x", "y", "A"), row("x", "y", "A"), row("y", "x", "B"), row("x", "y", "B"), row("x", "x", "Tie")]
    rows += [row("x", "y", "Tie"), row("y", "x", "Tie"), row("x", " ", "A")]
    path = write(tmp_path / "a.jsonl", *rows)
    train, _ = LabeledBuilder(path=path, empty="drop")()
    assert [one.label for one in train] == ["A", "B", "Tie"]
    printed = capsys.readouterr().out
    assert "3 comparisons" in printed and "1 of them ties" in printed
    assert all(
        part in printed for part in ("3 duplicates dropped", "1 identical answers dropped", "1 empty answers dropped")
    )
    with pytest.raises(DataError, match=r"a\.jsonl:5: identical answers; identical=drop"):
        LabeledBuilder(path=path, empty="drop", identical="raise")()
    with pytest.raises(DataError, match=r"a\.jsonl:8: empty answers; empty=drop"):
        LabeledBuilder(path=path)()


GOOD_ROW = {"prompt": "p", "completion_A": "x", "completion_B": "y", "label": "A"}
SCORED = {"prompt": "p", "completion": "x"}


@pytest.mark.parametrize(
    ("builder", "row", "message"),
    [
        (LabeledBuilder, {**GOOD_ROW, "label": "C"}, "'label' is 'C'"),
        (LabeledBuilder, {**GOOD_ROW, "label": 1}, "'label' is 1"),
        (LabeledBuilder, {k: v for k, v in GOOD_ROW.items() if k != "completion_B"}, "no field 'completion_B'"),
        (LabeledBuilder, {**GOOD_ROW, "completion_A": 7}, "'completion_A' is a int"),
        (LabeledBuilder, {**GOOD_ROW, "completion_A": [{"role": "robot", "content": "x"}]}, "role 'robot'"),
        (LabeledBuilder, {**GOOD_ROW, "completion_A": [USER]}, "does not begin with an assistant"),
        (ChosenRejectedBuilder, {"chosen": "x", "rejected": "y"}, "no field 'prompt'"),
        (
            ChosenRejectedBuilder,
            {"chosen": [USER, GOOD], "rejected": [say("user", "3+3?"), BAD]},
            "no prompt in common",
        ),
        (TranscriptBuilder, {"chosen": "hello", "rejected": "hi"}, "not a transcript"),
        (
            RatedPairBuilder,
            {"context": "p", "response1": "x", "response2": "y", "overall_preference": "a"},
            "not a number",
        ),
        (ScoredSamplesBuilder, {**SCORED}, "no field 'score'"),
        (ScoredSamplesBuilder, {"prompt": "p", "answer": "x"}, "no field 'completion'"),
    ],
)
def test_malformed_rows_are_refused_with_file_and_line(builder, row, message: str, tmp_path: Path) -> None:
    fine = {LabeledBuilder: {**GOOD_ROW, "prompt": "q"}, ScoredSamplesBuilder: {**SCORED, "score": 1}}.get(builder, row)
    path = write(tmp_path / "bad.jsonl", fine, row)
    with pytest.raises(DataError) as error:
        builder(path=path)()
    assert message in str(error.value) and f"bad.jsonl:{1 if fine is row else 2}: " in str(error.value)


def test_malformed_rows_are_dropped_and_counted_where_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", {**GOOD_ROW, "label": "C"}, GOOD_ROW)
    assert len(LabeledBuilder(path=path, malformed="drop")()[0]) == 1
    assert "1 malformed rows dropped" in capsys.readouterr().out


def test_scored_samples_pair_better_with_worse_and_never_equals(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": f"a{i}", "score": score} for i, score in enumerate([1, 1, 0, 0.4])]
    path = write(tmp_path / "a.jsonl", *rows, {"prompt": "q", "completion": "b", "score": 0})
    found, _ = ScoredSamplesBuilder(path=path)()
    texts = [(one.comparison.completion_A[0]["content"], one.comparison.completion_B[0]["content"]) for one in found]
    assert texts == [("a0", "a2"), ("a0", "a3"), ("a1", "a2"), ("a1", "a3"), ("a3", "a2")]
    assert [one.margin for one in found] == pytest.approx([1, 0.6, 1, 0.6, 0.4])
    few, _ = ScoredSamplesBuilder(path=path, min_gap=0.5, max_pairs=2)()
    assert len(few) == 2 and all(one in found and one.margin and one.margin > 0.5 for one in few)


# Trap: one prompt on both sides of a split.
def test_whole_prompts_are_held_out_whatever_the_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = [pair(f"p{i // 3}", "x", f"y{i}") for i in range(30)]
    train, test = split_by_prompt(many, 5, seed=0)
    assert len(test) == 6 and len(train) == 24  # two prompts of three comparisons
    assert not {prompt_hash(one) for one in train} & {prompt_hash(one) for one in test}
    again = split_by_prompt(list(reversed(many)), 5, seed=0)[1]
    assert {prompt_hash(one) for one in again} == {prompt_hash(one) for one in test}
    with pytest.raises(DataError, match="leave some to train on"):
        split_by_prompt(many, 30, seed=0)
    rows = [{"prompt": p, "chosen": "x", "rejected": "y"} for p in ("p", "q")]
    path, held_out = write(tmp_path / "a.jsonl", *rows), write(tmp_path / "b.jsonl", rows[1])
    train, test = ChosenRejectedBuilder(path=path, test_path=held_out)()
    assert (len(train), len(test)) == (
        1,
        1,
    ) and "1 training pairs on held-out prompts dropped" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="give one of them"):
        ChosenRejectedBuilder(path=path, test_path=held_out, test_size=1)()


# Trap: a held-out file beside a Parquet file, passed over in silence.
def test_a_held_out_file_is_read_beside_any_form_of_the_training_data(tmp_path: Path) -> None:
    rows = [{"prompt": p, "chosen": "x", "rejected": "y"} for p in ("p", "q", "r")]
    paths = [write(tmp_path / "a.jsonl", *rows[:2]), str(tmp_path / "a.parquet")]
    held_out = [write(tmp_path / "b.jsonl", rows[2]), str(tmp_path / "b.parquet")]
    for path, kept in ((paths[1], rows[:2]), (held_out[1], rows[2:])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(kept), path)
    for path in paths:
        for test_path in held_out:
            train, test = ChosenRejectedBuilder(path=path, test_path=test_path, test_split="train")()
            assert [len(train), [one.comparison.prompt_conversation[0]["content"] for one in test]] == [2, ["r"]]


def test_pairs_in_tokens_share_the_prompt_and_weigh_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    renderer = get_renderer("plain", load_tokenizer("tiny"))
    found = [pair("12>", "34", "5"), pair("1>", "2", "3", "Tie"), pair("1>", "2", "3" * 30, "B")]
    (one,) = render_pairs(found, renderer, max_length=20)
    assert "1 ties dropped" in (printed := capsys.readouterr().out) and "1 longer than 20 tokens dropped" in printed
    assert one.chosen.model_input.to_ints()[:3] == one.rejected.model_input.to_ints()[:3]
    assert one.chosen.loss_fn_inputs["weights"].tolist() == [0, 0, 1, 1, 1] and one.length == 5
    both = render_pairs(found[:2], renderer, ties="both")
    assert len(both) == 3 and both[1].chosen == both[2].rejected and both[1].rejected == both[2].chosen
    with pytest.raises(DataError, match="a tie; ties=drop"):
        render_pairs(found, renderer, ties="raise")
    with pytest.raises(DataError, match="overlong=drop"):
        render_pairs(found, renderer, max_length=20, overlong="raise")


CALL = {"id": "a", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "2+2"}'}}
ASKED = [
    USER,
    {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "name": "calculator", "tool_call_id": "a"},
]
THOUGHT, CALLED = {**GOOD, "reasoning_content": "2 and 2"}, {"role": "assistant", "tool_calls": [CALL]}
TOOLS = [{"type": "function", "function": CALCULATOR}]


# Trap: messages cut down to role and text, whose calls, thinking and tools are then in no prompt or answer.
@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"), [(ASKED, THOUGHT, BAD), ([USER], CALLED, BAD), ([USER], GOOD, CALLED)]
)
@pytest.mark.parametrize("whole", [False, True])
def test_pairs_are_written_with_calls_thinking_and_tools(
    prompt: Any, chosen: Any, rejected: Any, whole: bool, tmp_path: Path
) -> None:
    conversations = {"chosen": [*prompt, chosen], "rejected": [*prompt, rejected]}
    row = conversations if whole else {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}
    path = write(tmp_path / "a.jsonl", row | {"tools": TOOLS})
    (one,) = render_pairs(FileBuilder(path=path)()[0], RENDERERS["qwen3"])
    renderer = with_tools(RENDERERS["qwen3"], [CALCULATOR])
    for datum, name in ((one.chosen, "chosen"), (one.rejected, "rejected")):
        read = conversation(conversations, name)
        tokens, weights = renderer.build_supervised_example(read, TrainOnWhat.LAST_ASSISTANT_MESSAGE)
        end = len(weights) - weights[::-1].index(1.0)
        found = [*datum.model_input.to_ints(), int(datum.loss_fn_inputs["target_tokens"].array[-1])]
        assert found[:end] == tokens[:end]


def test_what_judges_of_texts_and_scalar_models_cannot_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "2+2?", "chosen": "4", "rejected": "5", "tools": TOOLS})
    with pytest.raises(DataError, match="a.jsonl:1: a field 'tools', which reward models do not read"):
        PreferencePairsBuilder(comparisons=FileBuilder(path=path))(RENDERERS["qwen3"])
    path = write(tmp_path / "b.jsonl", {"prompt": "2+2?", "completion": "4", "score": 1, "tools": TOOLS})
    with pytest.raises(DataError, match="b.jsonl:1: scored answers with a field 'tools'"):
        FileBuilder(path=path)()
    path = write(tmp_path / "c.jsonl", {"prompt": "2+2?", "chosen": [CALLED], "rejected": "5"})
    (labeled,), _ = FileBuilder(path=path)()
    with pytest.raises(DataError, match="a judge of texts cannot read"):
        question(labeled.comparison)
