"""The shapes of conversation files, recognised by field names. docs/data_formats.md has the table.
A row of no form or of two is a DataError that names the fields and the known forms. Left out:
images, several answers in a row.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from posttrain.backend.errors import DataError
from posttrain.renderers.types import Message, TrainOnWhat
from supervised.rows import Fields, Row, conversation, exchange


class Form(NamedTuple):
    """`read` gives the messages of a row, or a plain text."""

    name: str
    fields: tuple[str, ...]
    read: Callable[[Fields], list[Message] | str]


SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}


def sharegpt(fields: Fields) -> list[Message]:
    """{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]};
    `role` and `content` are read, too."""
    turns = fields["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError("the field 'conversations' is no list of objects")
    renamed = [
        {"role": SHAREGPT_ROLES.get(str(turn.get("from")), turn.get("from")), "content": turn.get("value")}
        if "from" in turn
        else turn
        for turn in turns
    ]
    return conversation({"conversations": renamed}, "conversations")


def prompt_completion(fields: Fields) -> list[Message]:
    """{"prompt": ..., "completion": ...}, texts or lists of messages; loss on completions only."""
    if isinstance(fields["prompt"], str) and isinstance(fields["completion"], str):
        return exchange(fields, "prompt", "completion", "{prompt}")
    prompt, answered = (
        [Message(role=role, content=fields[name])] if isinstance(fields[name], str) else conversation(fields, name)
        for name, role in (("prompt", "user"), ("completion", "assistant"))
    )
    marked = [(message, False) for message in prompt] + [
        (message, message["role"] == "assistant") for message in answered
    ]
    return [Message(**(_unmarked(message) | {"trainable": trained})) for message, trained in marked]  # type: ignore[typeddict-item]


def alpaca(fields: Fields) -> list[Message]:
    """{"instruction": ..., "input": ..., "output": ...}; an empty input is left out."""
    given = fields.get("input") or ""
    if not isinstance(given, str) or not isinstance(fields["instruction"], str):
        raise DataError("'instruction' and 'input' must be texts")
    prompt = fields["instruction"] + (f"\n\n{given}" if given else "")
    return exchange({"prompt": prompt, "completion": fields["output"]}, "prompt", "completion", "{prompt}")


def plain_text(fields: Fields) -> str:
    if not isinstance(fields["text"], str) or not fields["text"]:
        raise DataError("the field 'text' is empty or no text")
    return fields["text"]


FORMS = (
    Form("messages", ("messages",), lambda fields: conversation(fields, "messages")),
    Form("ShareGPT", ("conversations",), sharegpt),
    Form("prompt and completion", ("prompt", "completion"), prompt_completion),
    Form(
        "question and answer", ("question", "answer"), lambda fields: exchange(fields, "question", "answer", "{prompt}")
    ),
    Form("Alpaca", ("instruction", "output"), alpaca),
)
# often a rendered copy beside other fields, so only where there are no others
TEXT = Form("text", ("text",), plain_text)
ELSEWHERE = {
    ("chosen", "rejected"): "preferences, which preference/train_cli.py trains on",
    ("completion_A", "completion_B", "label"): "preferences, which preference/train_cli.py trains on",
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
            "which with "
            "dataset=conversations (messages) or dataset=prompt_completion, and dataset.path=FILE"
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


def has(fields: Fields, names: Sequence[str]) -> bool:
    return all(fields.get(name) is not None for name in names)


def names_of(fields: Fields) -> str:
    return ", ".join(map(repr, fields)) or "(none)"


def unknown(fields: Fields, forms: Mapping[str, Sequence[str]], remedy: str) -> DataError:
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
    """Trainable marks of `prompt_completion` count only where all assistant messages are trained
    on; otherwise they are removed."""
    if not any("trainable" in message for message in messages) or train_on_what == TrainOnWhat.CUSTOMIZED:
        return list(messages), train_on_what
    if train_on_what == TrainOnWhat.ALL_ASSISTANT_MESSAGES:
        return list(messages), TrainOnWhat.CUSTOMIZED
    return [_unmarked(message) for message in messages], train_on_what


def _unmarked(message: Message) -> Message:
    kept = ("role", "content", "parts", "name", "tool_call_id")
    return {key: value for key, value in message.items() if key in kept}  # type: ignore[return-value]
