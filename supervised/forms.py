"""The shapes of conversation files, recognised by field names. docs/data_formats.md has the table.
A row of no form or of two is a DataError that names the fields and the known forms; so is a field
that would change what is trained on, and that the form does not read. Left out: images, several
answers in a row.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from posttrain.backend.errors import DataError
from posttrain.renderers.types import Message, TrainOnWhat
from supervised.rows import (
    MARKS,
    SYSTEM,
    Fields,
    Row,
    after_system,
    conversation,
    exchange,
    is_trained,
    system_of,
    unmarked,
)


class Form(NamedTuple):
    """`read` gives the messages of a row, or a plain text. `also` are fields that it may have."""

    name: str
    fields: tuple[str, ...]
    read: Callable[[Fields], list[Message] | str]
    also: tuple[str, ...] = (*SYSTEM, "tools")


# Fields that change what a row means, and what to do where the form does not read them.
ELSEWISE = {
    "history": "write its turns as messages",
    "functions": "write them as 'tools'",
    "function_call": "write it as 'tool_calls' of a message",
    "chat_template_kwargs": "give its options to all rows, as renderer_name=chat_template:NAME=VALUE",
    **dict.fromkeys(("image", "images"), "leave rows with images out"),
    **dict.fromkeys(("video", "videos"), "leave rows with videos out"),
    **dict.fromkeys(("audio", "audios"), "leave rows with sound out"),
}
# Beside a question that is a text, a part of it.
QUESTIONS, PART_OF_QUESTION = ("prompt", "question", "instruction"), ("context", "input", "choices", "options")
# Where they are true or false: whether an answer is good (KTO; the second is LLaMA-Factory's).
IS_GOOD = ("label", "kto_tag")


def prompt_completion(fields: Fields) -> list[Message]:
    """{"prompt": ..., "completion": ...}, texts or lists of messages; loss on completions only."""
    if isinstance(fields["prompt"], str) and isinstance(fields["completion"], str):
        return exchange(fields, "prompt", "completion", "{prompt}")
    prompt, answered = (
        [Message(role=role, content=fields[name])] if isinstance(fields[name], str) else conversation(fields, name)
        for name, role in (("prompt", "user"), ("completion", "assistant"))
    )
    marked = [(message, False) for message in prompt] + [
        (message, message.get("trainable", message["role"] == "assistant")) for message in answered
    ]
    return [Message(**(unmarked(message, MARKS) | {"trainable": trained})) for message, trained in marked]  # type: ignore[typeddict-item]


def alpaca(fields: Fields) -> list[Message]:
    """{"instruction": ..., "input": ..., "output": ...}, perhaps after the pairs in "history"; an
    empty input is left out."""
    *earlier, asked = alpaca_prompt(fields)
    now = exchange({"prompt": asked["content"], "completion": fields["output"]}, "prompt", "completion", "{prompt}")
    return [*earlier, *now]


def alpaca_prompt(fields: Fields) -> list[Message]:
    """The messages before the answer."""
    given = fields.get("input") or ""
    if not isinstance(given, str) or not isinstance(fields["instruction"], str):
        raise DataError("'instruction' and 'input' must be texts")
    asked = Message(role="user", content=fields["instruction"] + (f"\n\n{given}" if given else ""))
    return [*_earlier(fields.get("history") or []), asked]


def _earlier(pairs: Any) -> list[Message]:
    are_pairs = isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
    if not are_pairs or not all(isinstance(text, str) for pair in pairs for text in pair):
        raise DataError("'history' must be a list of pairs of texts, an instruction and its answer")
    return [
        Message(role=role, content=text)
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def plain_text(fields: Fields) -> str:
    if not isinstance(fields["text"], str) or not fields["text"]:
        raise DataError("the field 'text' is empty or no text")
    return fields["text"]


FORMS = (
    Form("messages", ("messages",), lambda fields: conversation(fields, "messages")),
    Form("ShareGPT", ("conversations",), lambda fields: conversation(fields, "conversations")),
    Form("prompt and completion", ("prompt", "completion"), prompt_completion),
    Form(
        "question and answer", ("question", "answer"), lambda fields: exchange(fields, "question", "answer", "{prompt}")
    ),
    Form("Alpaca", ("instruction", "output"), alpaca, also=("input", "history", *SYSTEM, "tools")),
)
# often a rendered copy beside other fields, so only where there are no others
TEXT = Form("text", ("text",), plain_text, also=())
PREFERENCES = "preferences, which preference/train_cli.py trains on"
ELSEWHERE = {
    ("chosen", "rejected"): PREFERENCES,
    ("conversations", "chosen", "rejected"): PREFERENCES,
    ("completion_A", "completion_B", "label"): PREFERENCES,
    ("comparison", "label"): PREFERENCES,
    ("input", "preferred_output", "non_preferred_output"): PREFERENCES,
    (
        "prompt",
        "completion",
        "label",
    ): "answers marked good and bad (KTO): keep the good ones without 'label', or give the file to "
    "preference/train_cli.py, which pairs good with bad answers to the same prompt",
}


def form_of(fields: Fields) -> Form:
    """DataError where the fields match no form, or two."""
    forms = [form for form in FORMS if has(fields, form.fields)]
    for names, description in ELSEWHERE.items():
        if has(fields, names) and all(set(form.fields) <= set(names) for form in forms):
            raise DataError(f"the fields {names_of(fields)} are {description}")
    if len(forms) > 1:
        raise DataError(
            f"the fields {names_of(fields)} are those of two forms, {' and '.join(form.name for form in forms)}: say "
            "which with dataset=conversations (messages) or dataset=prompt_completion, and dataset.path=FILE"
        )
    if not forms and has(fields, TEXT.fields):
        return TEXT
    if not forms:
        raise unknown(
            fields,
            {form.name: form.fields for form in (*FORMS, TEXT)},
            "dataset.prompt_field=NAME dataset.completion_field=NAME",
        )
    return forms[0]


def read_row(fields: Fields) -> list[Message] | str:
    """The messages of a row, its system message first, or its text."""
    form = form_of(fields)
    found = form.read(fields)
    if isinstance(found, str):  # whole, whatever stands beside it
        return found
    check_meaning(fields, (*form.fields, *form.also), form.name)
    if marks := [name for name in IS_GOOD if isinstance(fields.get(name), bool)]:
        raise DataError(
            f"the field {marks[0]!r} marks answers as good and bad, and all are trained on here: keep the good ones, "
            "without the field"
        )
    return after_system(system_of(fields), found)


def check_meaning(fields: Fields, are_read: Sequence[str], form: str) -> None:
    """DataError for a field that is not read and changes what the row means."""
    asked = next((name for name in QUESTIONS if name in are_read and isinstance(fields.get(name), str)), None)
    part = f"write it into {asked!r}, or leave it out of the rows if it is no part of that"
    for name, remedy in (ELSEWISE | dict.fromkeys(PART_OF_QUESTION if asked else (), part)).items():
        if name not in are_read and fields.get(name):
            raise DataError(f"the field {name!r} would change what is trained on, and is not read in {form}: {remedy}")


def print_form(path: str, form: Any, rows: Sequence[Row], also: Sequence[str]) -> None:
    """One line: the form, the fields it is known by, and those that are not read."""
    given = dict.fromkeys(name for _, fields in rows for name, value in fields.items() if value is not None)
    unread = [name for name in given if name not in (*form.fields, *also)]
    line = f"{path}: read as {form.name} ({', '.join(form.fields)})"
    print(line + (f"; not read: {', '.join(unread)}" if unread else ""), flush=True)


def has(fields: Fields, names: Sequence[str]) -> bool:
    return all(fields.get(name) is not None for name in names)


def names_of(fields: Fields) -> str:
    return ", ".join(map(repr, fields)) or "(none)"


def unknown(fields: Fields, forms: Mapping[str, Sequence[str]], remedy: str) -> DataError:
    nearly = [names for names in forms.values() if fields.keys() >= set(names)]
    nearly.sort(key=lambda names: all(fields[name] is None for name in names))  # columns of other rows' forms last
    if null := next((name for names in nearly for name in names if fields[name] is None), None):
        return DataError(f"the field {null!r} is null: fill it, or leave the row out")
    known = "; ".join(f"{name}: {', '.join(names)}" for name, names in forms.items())
    return DataError(
        f"the fields {names_of(fields)} are of no known form. Known are {known}. Other names: dataset=NAME "
        f"dataset.path=FILE with {remedy}"
    )


def one_form(rows: Sequence[Row], of: Callable[[Fields], Any]) -> Any:
    """The form of all rows. DataError, with the place, at the first row of another form."""
    first = None
    for where, fields in rows:
        try:
            form = of(fields)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        if first is not None and form.name != first.name:
            raise DataError(
                f"{where}: a row of the form {form.name}, where the first row has the form {first.name}: make two "
                "files of them"
            )
        first = form
    return first


def customized(messages: Sequence[Message], train_on_what: TrainOnWhat) -> tuple[list[Message], TrainOnWhat]:
    """Trainable marks count only where all assistant messages are trained on; otherwise they are
    removed. DataError where a message that a row marks as not trained on would be trained on."""
    last = messages[-1:] if train_on_what == TrainOnWhat.LAST_ASSISTANT_MESSAGE else []
    every = messages if train_on_what in (TrainOnWhat.ALL_MESSAGES, TrainOnWhat.ALL_TOKENS) else []
    untrained = any(message["role"] == "assistant" and not message.get("trainable", True) for message in last)
    if untrained or not all(is_trained(message) for message in every):
        raise DataError(
            f"an assistant's message is marked as not trained on ({', '.join(MARKS)}), and is with "
            f"train_on_what={train_on_what}: set train_on_what=all_assistant_messages, or take the mark away"
        )
    if not any("trainable" in message for message in messages) or train_on_what == TrainOnWhat.CUSTOMIZED:
        return list(messages), train_on_what
    if train_on_what == TrainOnWhat.ALL_ASSISTANT_MESSAGES:
        return list(messages), TrainOnWhat.CUSTOMIZED
    return [unmarked(message, MARKS) for message in messages], train_on_what
