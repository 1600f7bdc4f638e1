"""Rows of tables (Parquet), whose objects all have each other's fields, null where a row lacks one; and
messages with null fields, marks of some messages, and contents in pieces.
"""

import gzip
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import pytest

from posttrain.backend.errors import DataError
from posttrain.backend.tokenizers import character_tokenizer
from posttrain.renderers import get_renderer
from posttrain.renderers.turns import decode
from supervised.data import FileBuilder, HuggingFaceBuilder
from supervised.table_rows import table_rows

# writes tools and calls, as Qwen's
TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}{% for m in messages %}<|im_start|>"
    "{{ m['role'] }} {{ m['content'] }}{% if m.tool_calls %}{% for call in m.tool_calls %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
TOKENIZER = character_tokenizer(2048)
TOKENIZER.chat_template = TEMPLATE
RENDERER = get_renderer("chat_template", TOKENIZER)
USER, ASSISTANT = {"role": "user", "content": "2+3="}, {"role": "assistant", "content": "5"}
NULLS: dict[str, Any] = dict.fromkeys(
    ("name", "tool_calls", "tool_call_id", "reasoning_content", "weight", "trainable")
)


def trained(tokens: list[int], weights: list[float]) -> list[str]:
    runs = groupby(zip(tokens, weights, strict=True), key=lambda pair: pair[1] > 0)
    return [decode(TOKENIZER, [token for token, _ in run]) for weighs, run in runs if weighs]


def with_call(tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": tool, "arguments": arguments}}
    properties = {name: {"type": "integer"} for name in arguments}
    schema = {"name": tool, "parameters": {"type": "object", "properties": properties}}
    said = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "1"}]
    return {"messages": [*said, ASSISTANT], "tools": [schema]}


# Trap: arguments and parameters of other rows' tools are trained on as nulls.
def test_a_call_in_a_table_has_its_own_arguments(tmp_path: Path) -> None:
    rows = [with_call("add", {"a": 1, "b": 2}), with_call("sine", {"angle": 3})]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "train.parquet"))
    for name in (tmp_path, tmp_path / "train.parquet"):
        builder = HuggingFaceBuilder(name=str(name), batch_size=2)
        loaded = [fields for _, fields in builder.rows()[0]]
        for row, given in zip(loaded, rows, strict=True):
            assert row["tools"] == given["tools"]
            assert trained(*builder.example(row, RENDERER)) == trained(*FileBuilder(path="").example(given, RENDERER))
    assert '{"name": "sine", "arguments": {"angle": 3}}' in trained(*builder.example(loaded[1], RENDERER))[0]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER | NULLS, ASSISTANT | NULLS], ["5<|im_end|>"]),
        ([USER, ASSISTANT, USER, {"role": "assistant", "content": "6", "trainable": False}], ["5<|im_end|>"]),
        ([USER, ASSISTANT | NULLS, USER | NULLS, ASSISTANT | {"trainable": True}], ["5<|im_end|>", "5<|im_end|>"]),
        ([USER, {"role": "assistant", "content": [{"type": "text", "text": "5"}]}], ["5<|im_end|>"]),
        (
            [USER, {"role": "assistant", "content": [{"type": "image_url", "image_url": "a"}]}],
            "a piece of the type 'image_url'",
        ),
        ([ASSISTANT, USER, ASSISTANT], "the chat template needs a message before the assistant's"),
        ([USER, {"role": "assistant", "content": None}], "needs a 'role' and a 'content' of text"),
    ],
)
def test_marks_nulls_and_pieces_of_messages(messages: list[dict[str, Any]], expected: Any) -> None:
    row = json.loads(json.dumps({"messages": messages}))
    if isinstance(expected, list):
        assert trained(*FileBuilder(path="").example(row, RENDERER)) == expected
    else:
        with pytest.raises(DataError, match=expected):
            FileBuilder(path="").example(row, RENDERER)


# Trap: a country code, a surname or an answer that pandas reads as no value.
@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "TRAIN.CSV", "train.csv.gz", "folder"])
def test_a_cell_of_a_table_of_text_is_that_text(name: str, tmp_path: Path) -> None:
    answers, file = ["NA", "null", "None", "nan", "N/A", "#N/A", "-", "yes"], tmp_path / name
    if name == "folder":
        file.mkdir()
    text = "question,answer,input\n" + "".join(f"q{i},{answer},\n" for i, answer in enumerate(answers))
    text = text.replace(",", "\t") if ".tsv" in name else text
    to = file / "train.csv" if name == "folder" else file
    to.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    rows = [fields for _, fields in table_rows(str(file), None, "train")]
    assert [row["answer"] for row in rows] == answers and {row["input"] for row in rows} == {None}
