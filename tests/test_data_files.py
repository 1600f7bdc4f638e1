"""Files of data in all their forms, found by their fields."""

import gzip
import json
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from posttrain.backend.errors import DataError
from posttrain.backend.tokenizers import character_tokenizer
from posttrain.renderers import get_renderer
from posttrain.renderers.turns import decode
from posttrain.renderers.types import TrainOnWhat
from posttrain.tracking.command_line import parse
from preference.config import Config as DPOConfig
from preference.forms import FileBuilder as PreferenceFile
from preference.forms import form_of
from preference.names import DATASETS as PAIR_SETS
from supervised.data import ConversationFileBuilder, FileBuilder, PromptCompletionFileBuilder
from supervised.names import DATASETS as SETS
from supervised.train_cli import CLIConfig as SFTConfig
from tests.jsonl_files import write

TOKENIZER = character_tokenizer(512)
PLAIN = get_renderer("plain", TOKENIZER)
COLON = get_renderer("role_colon", TOKENIZER)
USER, ASSISTANT = {"role": "user", "content": "2+3="}, {"role": "assistant", "content": "5"}


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
            {"messages": [USER, {**ASSISTANT, "training": False}, USER, ASSISTANT]},
            "user 2+3=; assistant 5; user 2+3=; assistant [5;]",
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
        # LLaMA-Factory's
        (
            {
                "conversations": [
                    SHAREGPT[0],
                    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 3}}'},
                    {"from": "observation", "value": "5"},
                    SHAREGPT[1],
                ],
            },
            'user 2+3=; assistant [<tool_call> {"name": "add", "arguments": {"a": 2, "b": 3}} </tool_call>;] '
            "tool 5; assistant [5;]",
        ),
        (
            {"messages": [{"role": "human", "content": "2+3="}, {"from": "bing", "value": "5", "weight": 1}]},
            "user 2+3=; assistant [5;]",
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
        ({"messages": [USER, {**ASSISTANT, "tool_plan": "Add."}]}, "all_assistant_messages", "as 'reasoning_content'"),
        ({"messages": [USER, {**ASSISTANT, "train_detail": [{}]}]}, "all_assistant_messages", "mark them with 'train'"),
        ({"messages": [USER, ASSISTANT], "image": "a.png"}, "all_assistant_messages", "leave rows with images out"),
        # of LLaMA-Factory and TRL: a bad answer is an answer, too
        (
            {"conversations": SHAREGPT, "label": False},
            "all_assistant_messages",
            "'label' marks answers as good and bad",
        ),
        ({"instruction": "a", "output": "b", "kto_tag": False}, "all_assistant_messages", "'kto_tag' marks answers"),
        *(
            (
                {first: "a", second: "b", name: "c"},
                "all_assistant_messages",
                f"{name!r} would .* write it into {first!r}",
            )
            for first, second in (("prompt", "completion"), ("question", "answer"), ("instruction", "output"))
            for name in ("context", "choices", "options", "input")
            if (first, name) != ("instruction", "input")
        ),
    ],
)
def test_fields_that_change_what_is_trained_on_and_cannot_be_read_are_refused(
    row: dict[str, Any], what: str, complaint: str
):
    with pytest.raises(DataError, match=complaint):
        trained_on(row, TrainOnWhat(what))


def test_fields_of_those_names_that_change_nothing_are_passed_over():
    for fields in ({"label": 3}, {"context": "from a forum"}, {"input": ""}, {"image": None}):
        assert trained_on({"messages": [USER, ASSISTANT], **fields}) == "user 2+3=; assistant [5;]"


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
        ({"prompt": "a", "completion": None}, "the field 'completion' is null"),
        ({"messages": None, "instruction": "a", "output": None}, "the field 'output' is null"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "are preferences, which preference/train_cli.py"),
        ({"prompt": "a", "completion": "b", "label": True}, "KTO"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "the role 'robot'"),
        ({"conversations": "a"}, "'conversations' is a str, not a text or a list of messages"),
        ({"conversations": ["a"]}, "conversations[0] needs a 'role'"),
        ({"conversations": [{"from": "function_call", "value": "add"}]}, "conversations[0], a function_call: not JSON"),
        ({"messages": [{"role": "system", "content": "a", "tools": [{}]}]}, "as the field 'tools' of the row"),
        ({"conversations": SHAREGPT[:1], "chosen": {}, "rejected": {}}, "are preferences"),
        ({"input": {}, "preferred_output": [], "non_preferred_output": []}, "are preferences"),
        ({"comparison": {}, "label": "A"}, "are preferences"),
        ({"text": ""}, "is empty"),
        ({"instruction": 1, "output": "a"}, "must be texts"),
    ],
)
def test_rows_of_no_form_say_what_they_are(tmp_path: Path, row: dict[str, Any], complaint: str):
    with pytest.raises(DataError, match=r"data\.jsonl:1: ") as error:
        FileBuilder(path=write(tmp_path / "data.jsonl", row), batch_size=1)(PLAIN)
    assert complaint in str(error.value)


# Trap: a form is read from lines, and refused from the files in which its sets are published.
@pytest.mark.parametrize(
    "name", ["rows.jsonl.gz", "rows.json", "rows.json.gz", "rows.parquet", "ROWS.JSON", "Rows.PARQUET"]
)
def test_lists_gzip_and_tables_are_read_as_lines_are(tmp_path: Path, name: str):
    sets: list[tuple[Any, list[dict[str, Any]]]] = [
        (FileBuilder, [{"conversations": SHAREGPT, "system": "Add."}, {"conversations": SHAREGPT}]),
        (PreferenceFile, [{"prompt": [USER], "chosen": [ASSISTANT], "rejected": PAIR[2]}]),
    ]
    for config, names in ((SFTConfig, SETS), (DPOConfig, PAIR_SETS)):  # as dataset=FILE, too
        chosen: Any = parse(config, [f"dataset={tmp_path / name}"], {"dataset": names})
        assert chosen.dataset.path == str(tmp_path / name)
    for builder, rows in sets:
        text = (
            json.dumps(rows, indent=1)
            if ".json." in f"{name.lower()}."
            else "".join(map("{}\n".format, map(json.dumps, rows)))
        )
        content = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
        (tmp_path / name).write_bytes(content)
        if name.lower().endswith(".parquet"):
            datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / name))
        found, lines = (builder(path=path) for path in (str(tmp_path / name), write(tmp_path / "lines.jsonl", *rows)))
        if builder is FileBuilder:
            examples = [[found.example(row, PLAIN) for _, row in one.rows()[0]] for one in (found, lines)]
            assert examples[0] == examples[1]
        else:
            assert [replace(pair, where="") for pair in found()[0]] == [replace(pair, where="") for pair in lines()[0]]


def test_rows_of_another_form_than_the_first_are_named(tmp_path: Path):
    path = write(tmp_path / "data.jsonl", {"messages": [USER, ASSISTANT]}, {"prompt": "a", "completion": "b"})
    with pytest.raises(
        DataError,
        match=r"data\.jsonl:2: a row of the form prompt and completion, where the first row has the form messages",
    ):
        FileBuilder(path=path, batch_size=1)(PLAIN)


HH = "\n\nHuman: 2+3=\n\nAssistant:"
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
        *(
            (
                [{"prompt": prompt, "chosen": f"{begun} 5", "rejected": f"{begun} 6"}],
                "chosen and rejected",
                PAIR,
            )
            for prompt, begun in ((HH, ""), (HH, HH), ("Human: 2+3=", ""))
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
        # LLaMA-Factory's
        (
            [{"instruction": "2+3=", "input": "", "chosen": "5", "rejected": "6"}],
            "Alpaca's instruction, chosen and rejected",
            PAIR,
        ),
        (
            [{"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "6"}}],
            "ShareGPT conversation, chosen and rejected",
            PAIR,
        ),
        (
            [{"input": {"messages": [USER]}, "preferred_output": [ASSISTANT], "non_preferred_output": [PAIR[2][0]]}],
            "OpenAI's preferences",
            PAIR,
        ),
        (
            [
                {
                    "comparison": {"prompt_conversation": [USER], "completion_A": [ASSISTANT], "completion_B": PAIR[2]},
                    "label": "A",
                }
            ],
            "comparisons of tinker-cookbook",
            PAIR,
        ),
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
        *(
            (
                [{field: [first, answer], mark: good} for answer, good in zip(answers, (True, False), strict=True)],
                "conversations marked good and bad",
                PAIR,
            )
            for field, first, answers in (
                ("messages", USER, (ASSISTANT, PAIR[2][0])),
                ("conversations", SHAREGPT[0], (SHAREGPT[1], {"from": "gpt", "value": "6"})),
            )
            for mark in ("label", "kto_tag")
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
        ({"prompt": "a", "context": "d", "chosen": "b", "rejected": "c"}, "write it into 'prompt'"),
        ({"prompt": "a", "image": "d.png", "chosen": "b", "rejected": "c"}, "leave rows with images out"),
        (
            {
                "prompt": [{"role": "system", "content": "Add."}, USER],
                "chosen": [USER, ASSISTANT],
                "rejected": [USER, PAIR[2][0]],
            },
            "the messages in 'prompt' are not those that 'chosen' begins with",
        ),
        (
            {"exercise": "2+2?", "chosen": "The answer is 4.", "rejected": "The answer is 5."},
            "beside 'exercise': name the prompt 'prompt'",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "history": [["d", "e"]]}, "'history' would change"),
        ({"input": "a", "preferred_output": "b", "non_preferred_output": "c"}, "an object with 'messages'"),
        ({"input": {}, "preferred_output": "b", "non_preferred_output": "c"}, "no field 'prompt'"),
        ({"comparison": "a", "label": "A"}, "'comparison' must be an object with"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 2, "score_rejected": 3}, "exchange the two"),
        ({"chosen": "a b", "rejected": "a c", "chosen-rating": 1, "rejected-rating": 2}, "'chosen-rating' is 1 and"),
        ({"messages": [USER], "label": True}, "'messages' must end with the answer that 'label' marks"),
        ({"messages": [USER, ASSISTANT], "label": 1}, "must be a list of messages, and 'label' true or false"),
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
