"""Files of data in all their forms, found by their fields; and damaged in every way: one line that
names the file, never a traceback.
"""

import asyncio
import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from envs.arc_challenge import ArcChallenge
from envs.code import CodeBuilder
from envs.completion_env import ComparisonPrompts
from envs.math_word import Gsm8kBuilder, MathWordBuilder
from envs.star_graph import StarGraph, sample_graphs
from envs.star_graph_files import format_line, read_rows
from posttrain.backend.errors import CookbookError, DataError
from posttrain.backend.tokenizers import character_tokenizer
from posttrain.renderers import get_renderer
from posttrain.renderers.turns import decode
from posttrain.renderers.types import TrainOnWhat
from preference.forms import FileBuilder as PreferenceFile
from preference.forms import form_of
from preference.prm_labels import read_records
from recipes.belief_state.judge_votes import read_contests
from recipes.belief_state.text_data import TextData
from recipes.latro.tasks import Gsm8kBuilder as LatroGsm8k
from recipes.latro.tasks import JsonlBuilder, MathBuilder
from supervised.data import ConversationFileBuilder, FileBuilder, PromptCompletionFileBuilder

TOKENIZER = character_tokenizer(512)
PLAIN = get_renderer("plain", TOKENIZER)
COLON = get_renderer("role_colon", TOKENIZER)
USER, ASSISTANT = {"role": "user", "content": "2+3="}, {"role": "assistant", "content": "5"}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- forms --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": [USER, ASSISTANT]}, "messages"),
        # UltraFeedback
        ({"messages": [USER, ASSISTANT], "prompt": "2+3=", "chosen": [USER], "rejected": [USER]}, "messages"),
        ({"conversations": [{"from": "human", "value": "2+3="}, {"from": "gpt", "value": "5"}]}, "ShareGPT"),
        ({"prompt": "2+3=", "completion": "5"}, "prompt and completion"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt and completion"),
        ({"question": "2+3=", "answer": "5"}, "question and answer"),
        ({"instruction": "2+3=", "input": "", "output": "5", "text": "Below is an instruction ..."}, "Alpaca"),
    ],
)
def test_conversations_are_found_by_their_fields(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, Any], name: str
):
    path = write(tmp_path / "data.jsonl", row)
    train, _ = FileBuilder(path=path, batch_size=1)(PLAIN)
    datum = train.get_batch(0)[0]
    assert decode(TOKENIZER, datum.model_input.to_ints()) == "2+3=5"
    assert datum.loss_fn_inputs["weights"].tolist() == [0, 0, 0, 0.5, 0.5]  # the answer and its end
    assert f"data.jsonl: read as {name} (" in capsys.readouterr().out


def test_texts_are_trained_on_whole_and_only_the_completion_of_messages(tmp_path: Path):
    text = write(tmp_path / "text.jsonl", {"text": "abc"})
    datum = FileBuilder(path=text, batch_size=1, reduction="sum")(PLAIN)[0].get_batch(0)[0]
    targets = decode(TOKENIZER, datum.loss_fn_inputs["target_tokens"].tolist())
    assert targets.startswith("bc<") and datum.loss_fn_inputs["weights"].tolist() == [1, 1, 1]
    turns = write(tmp_path / "turns.jsonl", {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]})
    for what, runs in ((TrainOnWhat.ALL_ASSISTANT_MESSAGES, 1), (TrainOnWhat.ALL_USER_AND_SYSTEM_MESSAGES, 2)):
        datum = FileBuilder(path=turns, batch_size=1, train_on_what=what)(COLON)[0].get_batch(0)[0]
        trained = datum.loss_fn_inputs["weights"].to_numpy() > 0
        assert np.count_nonzero(np.diff(trained.astype(int), prepend=0) == 1) == runs
    given = write(tmp_path / "alpaca.jsonl", {"instruction": "Add.", "input": "2, 3", "output": "5"})
    datum = FileBuilder(path=given, batch_size=1)(PLAIN)[0].get_batch(0)[0]
    assert decode(TOKENIZER, datum.model_input.to_ints()) == "Add.\n\n2, 35"


def trained_on(row: dict[str, Any], what: TrainOnWhat = TrainOnWhat.ALL_ASSISTANT_MESSAGES) -> str:
    """The text of a row in ChatML, with what is trained on in brackets."""
    renderer = get_renderer("chat_template", character_tokenizer(2048))
    tokens, weights = FileBuilder(path="", train_on_what=what).example(row, renderer)
    runs = groupby(zip(tokens, weights, strict=True), key=lambda pair: pair[1] > 0)
    texts = [(weighs, decode(renderer.tokenizer, [token for token, _ in run])) for weighs, run in runs]
    text = "".join(f"[{text}]" if weighs else text for weighs, text in texts)
    return text.replace("<|im_start|>", "").replace("<|im_end|>", ";").replace("\n", " ").strip()


SHAREGPT = [{"from": "human", "value": "2+3="}, {"from": "gpt", "value": "5"}]


# Trap: a field that changes the prompt, or what is trained on, is passed over in silence.
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": SHAREGPT, "system": "Add."}, "system Add.; user 2+3=; assistant [5;]"),
        ({"messages": [USER, ASSISTANT], "system_prompt": "Add."}, "system Add.; user 2+3=; assistant [5;]"),
        (
            {"messages": [{"role": "system", "content": "Add."}, USER, ASSISTANT], "system": "Add."},
            "system Add.; user 2+3=; assistant [5;]",
        ),
        (
            {"instruction": "2+3=", "output": "5", "system": "Add.", "history": [["1+1=", "2"]]},
            "system Add.; user 1+1=; assistant [2;] user 2+3=; assistant [5;]",
        ),
        (
            {"messages": [USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "weight": 1}], "system": "Add."},
            "system Add.; user 2+3=; assistant 5; user 2+3=; assistant [5;]",
        ),
        (
            {"conversations": [SHAREGPT[0], {**SHAREGPT[1], "loss": False}, *SHAREGPT]},
            "user 2+3=; assistant 5; user 2+3=; assistant [5;]",
        ),
        (
            {"prompt": "2+3=", "completion": [{**ASSISTANT, "train": False}, USER, ASSISTANT]},
            "user 2+3=; assistant 5; user 2+3=; assistant [5;]",
        ),
        (
            {
                "messages": [
                    USER,
                    {**ASSISTANT, "reasoning": "Hm.", "weight": 0},
                    USER,
                    {**ASSISTANT, "reasoning": "So"},
                ]
            },
            "user 2+3=; assistant <think> Hm. </think>  5; user 2+3=; assistant [<think> So </think>  5;]",
        ),
    ],
)
def test_fields_that_change_what_is_trained_on_are_read(row: dict[str, Any], expected: str):
    assert trained_on(row) == expected


@pytest.mark.parametrize(
    ("row", "what", "complaint"),
    [
        ({"messages": [USER, ASSISTANT], "history": [["a", "b"]]}, "all_assistant_messages", "'history' would change"),
        ({"prompt": "a", "completion": "b", "images": ["a.png"]}, "all_assistant_messages", "leave rows with images"),
        ({"instruction": "a", "output": "b", "history": "c"}, "all_assistant_messages", "must be a list of pairs"),
        ({"messages": [USER, ASSISTANT], "system": 3}, "all_assistant_messages", "'system' is a int, not a text"),
        (
            {"messages": [{"role": "system", "content": "Add."}, USER, ASSISTANT], "system": "Divide."},
            "all_assistant_messages",
            "a system message of another text",
        ),
        ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "all_assistant_messages", r"'weight' is '0.5'; it is 0"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, "last_assistant_message", "marked as not trained on"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0}, USER, ASSISTANT]}, "all_tokens", "marked as not trained on"),
        ({"messages": [USER, {**ASSISTANT, "function_call": {"name": "f"}}]}, "all_assistant_messages", "tool_calls"),
    ],
)
def test_fields_that_change_what_is_trained_on_and_cannot_be_read_are_refused(
    row: dict[str, Any], what: str, complaint: str
):
    with pytest.raises(DataError, match=complaint):
        trained_on(row, TrainOnWhat(what))


def test_builders_with_named_fields_read_the_system_field_and_the_marks(tmp_path: Path):
    muted = [USER, {**ASSISTANT, "weight": 0}, USER, ASSISTANT]
    chats = write(tmp_path / "chats.jsonl", {"messages": muted, "system": "Add."})
    datum = ConversationFileBuilder(path=chats, batch_size=1)(PLAIN)[0].get_batch(0)[0]
    assert decode(TOKENIZER, datum.model_input.to_ints()).startswith("Add.2+3=5")
    assert np.count_nonzero(datum.loss_fn_inputs["weights"].to_numpy()) == 2  # the last answer and its end
    pairs = write(tmp_path / "pairs.jsonl", {"prompt": "2+3=", "completion": "5", "system": "Add."})
    datum = PromptCompletionFileBuilder(path=pairs, batch_size=1)(PLAIN)[0].get_batch(0)[0]
    assert decode(TOKENIZER, datum.model_input.to_ints()) == "Add.2+3=5"


def test_fields_that_are_not_read_are_listed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [{"messages": [USER, ASSISTANT], "id": 1, "system": "Add."}, {"messages": [USER, ASSISTANT], "source": "a"}]
    FileBuilder(path=write(tmp_path / "data.jsonl", *rows), batch_size=1)(PLAIN)
    PreferenceFile(path=write(tmp_path / "pairs.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c", "id": 1}))()
    out = capsys.readouterr().out
    assert "data.jsonl: read as messages (messages); not read: id, source\n" in out
    assert "pairs.jsonl: read as chosen and rejected (prompt, chosen, rejected); not read: id\n" in out


def test_texts_with_their_bos_and_eos_get_no_second_ones():
    tokenizer = character_tokenizer(512)
    tokenizer.bos_token = "<|im_start|>"
    single = "<|im_start|> $A"
    post = TemplateProcessing(single=single, special_tokens=[("<|im_start|>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = post  # type: ignore[attr-defined]
    renderer = get_renderer("plain", tokenizer)
    examples = [
        FileBuilder(path="").example({"text": text}, renderer)
        for text in ("abc", "<|im_start|>abc", "abc<|endoftext|>", "<|im_start|>abc<|endoftext|>")
    ]
    assert examples == [examples[0]] * 4
    tokens, weights = examples[0]
    assert decode(tokenizer, tokens) == "<|im_start|>abc<|endoftext|>" and weights == [0, 1, 1, 1, 1]


def test_tool_calls_and_tools_of_files_are_trained_on(tmp_path: Path):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    chat = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "1"},
        {"role": "assistant", "content": "one"},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    renderer = get_renderer("chat_template", character_tokenizer(2048))
    expected = '<think>\nHm.\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>one<|im_end|>'
    for row in (
        {"messages": chat, "tools": tools},
        {"messages": chat, "tools": json.dumps(tools)},
        {"prompt": chat[:1], "completion": chat[1:], "tools": tools},
    ):
        tokens, weights = FileBuilder(path="").example(row, renderer)
        trained = [token for token, weight in zip(tokens, weights, strict=True) if weight]
        assert decode(renderer.tokenizer, trained) == expected
        assert "To call: <tool_call>" in decode(renderer.tokenizer, tokens)
    for row, complaint in (
        ({"messages": chat, "tools": 3}, "the field 'tools' is a int, not a list of tools"),
        ({"messages": chat, "tools": [{}]}, "a tool needs a 'name'"),
        ({"messages": [{"role": "assistant", "tool_calls": [3]}]}, r"messages\[0\]: tool_calls\[0\] needs"),
    ):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row))
        with pytest.raises(DataError, match=f"rows.jsonl:1: {complaint}"):
            FileBuilder(path=str(path))(renderer)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (
            {"messages": [USER, ASSISTANT], "prompt": "a", "completion": "b"},
            "two forms, messages and prompt and completion",
        ),
        (
            {"query": "a", "reply": "b"},
            "fields 'query', 'reply' are of no known form. Known are messages: messages; ShareGPT",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "are preferences, which preference/train_cli.py"),
        ({"prompt": "a", "completion": "b", "label": True}, "KTO"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "the role 'robot'"),
        ({"conversations": "a"}, "no list of objects"),
        ({"text": ""}, "is empty"),
        ({"instruction": 1, "output": "a"}, "must be texts"),
    ],
)
def test_rows_of_no_form_say_what_they_are(tmp_path: Path, row: dict[str, Any], complaint: str):
    with pytest.raises(DataError, match=r"data\.jsonl:1: ") as error:
        FileBuilder(path=write(tmp_path / "data.jsonl", row), batch_size=1)(PLAIN)
    assert complaint in str(error.value)


def test_rows_of_another_form_than_the_first_are_named(tmp_path: Path):
    path = write(tmp_path / "data.jsonl", {"messages": [USER, ASSISTANT]}, {"prompt": "a", "completion": "b"})
    with pytest.raises(
        DataError,
        match=r"data\.jsonl:2: a row of the form prompt and completion, where the first row has the form messages",
    ):
        FileBuilder(path=path, batch_size=1)(PLAIN)


PAIR = ([USER], [ASSISTANT], [{"role": "assistant", "content": "6"}])


@pytest.mark.parametrize(
    ("rows", "name", "expected"),
    [
        ([{"prompt": "2+3=", "chosen": "5", "rejected": "6"}], "chosen and rejected", PAIR),
        ([{"prompt": [USER], "chosen": [ASSISTANT], "rejected": [PAIR[2][0]]}], "chosen and rejected", PAIR),
        ([{"chosen": [USER, ASSISTANT], "rejected": [USER, PAIR[2][0]]}], "chosen and rejected conversations", PAIR),
        (
            [
                {"chosen": f"\n\nHuman: 2+3=\n\nAssistant: {answer}", "rejected": "\n\nHuman: 2+3=\n\nAssistant: 6"}
                for answer in "5"
            ],
            "chosen and rejected transcripts",
            PAIR,
        ),
        (
            [{"chosen": "The sky is blue.", "rejected": "The sky is black."}],
            "chosen and rejected texts with the prompt in both",
            tuple(
                [{"role": role, "content": text}]
                for role, text in (("user", "The sky is"), ("assistant", " blue."), ("assistant", " black."))
            ),
        ),
        ([{"question": "2+3=", "chosen": "5", "rejected": "6"}], "question, chosen and rejected", PAIR),
        ([{"prompt": "2+3=", "completion_A": "5", "completion_B": "6", "label": "A"}], "labelled comparisons", PAIR),
        ([{"context": "2+3=", "response1": "5", "response2": "6", "overall_preference": -2}], "rated pairs", PAIR),
        (
            [{"prompt": "2+3=", "completion": "5", "score": 2}, {"prompt": "2+3=", "completion": "6", "score": 1}],
            "scored answers",
            PAIR,
        ),
        (
            [
                {"prompt": "2+3=", "completion": "5", "label": True},
                {"prompt": "2+3=", "completion": "6", "label": False},
            ],
            "answers marked good and bad",
            PAIR,
        ),
    ],
)
def test_preferences_are_found_by_their_fields(tmp_path: Path, rows: list[dict[str, Any]], name: str, expected: Any):
    (one,), held_out = PreferenceFile(path=write(tmp_path / "pairs.jsonl", *rows))()
    comparison = one.comparison
    assert (
        comparison.prompt_conversation,
        comparison.completion_A,
        comparison.completion_B,
    ) == expected and one.label == "A"
    assert form_of(rows[0]).name == name and held_out == []


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"messages": [USER, ASSISTANT]}, "of no known form"),
        (
            {"prompt": "a", "completion": "b", "score": 1, "label": True},
            "two forms, scored answers and answers marked good and bad",
        ),
        ({"prompt": "a", "completion": "b", "label": True}, "no prompt has both a good and a bad answer"),
        ({"chosen": "red", "rejected": "rot"}, "do not begin with the same words"),
        (
            {"instruction": "2+2?", "chosen": "The answer is 4.", "rejected": "The answer is 5."},
            "beside 'instruction': name the prompt 'prompt'",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "history": [["d", "e"]]}, "'history' would change"),
    ],
)
def test_preferences_of_no_form_say_what_they_are(tmp_path: Path, row: dict[str, Any], complaint: str):
    with pytest.raises(DataError, match=complaint):
        PreferenceFile(path=write(tmp_path / "pairs.jsonl", row))()


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+3=", "chosen": "5", "rejected": "6"},
        {"question": "2+3=", "chosen": "5", "rejected": "6"},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [PAIR[2][0]]},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, PAIR[2][0]]},
        {"prompt": "2+3=", "chosen": [USER, ASSISTANT], "rejected": [USER, PAIR[2][0]]},
        {"context": "2+3=", "response1": "5", "response2": "6", "overall_preference": -2},
    ],
)
def test_the_system_field_of_preferences_is_a_message(tmp_path: Path, row: dict[str, Any]):
    (one,), _ = PreferenceFile(path=write(tmp_path / "pairs.jsonl", {**row, "system": "Add.", "id": "a b"}))()
    assert one.comparison.prompt_conversation == [{"role": "system", "content": "Add."}, USER]
    assert (one.comparison.completion_A, one.comparison.completion_B) == PAIR[1:]


# --- damage -------------------------------------------------------------------------------------

PROBLEM = {"question": "2+3=", "answer": "It is 5.\n#### 5"}
ARC = {"question": "Why?", "choices": {"label": ["A", "B"], "text": ["so", "not so"]}, "answerKey": "A"}
Reader = Callable[[str], object]
READERS: dict[str, tuple[dict[str, Any], Reader]] = {
    "supervised": ({"messages": [USER, ASSISTANT]}, lambda path: FileBuilder(path=path, batch_size=1)(PLAIN)),
    "preference": ({"prompt": "2+3=", "chosen": "5", "rejected": "6"}, lambda path: PreferenceFile(path=path)()),
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
    "a list": b"[GOOD]\n",
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


# Trap: a damaged data file that ends in a traceback.
@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("reader", READERS)
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
    assert damage in ("empty", "blank") or "train.jsonl:1" in message or "train.jsonl:2" in message


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


@pytest.mark.parametrize("reader", READERS)
def test_marks_line_ends_and_blank_lines_do_no_harm(tmp_path: Path, reader: str):
    good, read = READERS[reader]
    write(tmp_path / "test.jsonl", good | ({"question": "1+1="} if "question" in good else {}))
    line = json.dumps(good).encode()
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n\n \n")
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


@pytest.mark.parametrize(
    "content",
    [b"", b"\n\n", b"\x00\xff" * 50, LINE + b"\n7,7", LINE[:-3], "ä".encode(), LINE.replace(b",", b";"), BROKEN_HEADER],
)
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


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xff\xfe", b"a\x00b"])
def test_damaged_texts_are_named(tmp_path: Path, content: bytes):
    (path := tmp_path / "stories.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"stories\.txt"):
        TextData(source=str(path))._read(str(path), "train")
