"""Rows of preference sets, in the usual shapes, to labelled comparisons. A malformed row is a
DataError that says which fields are needed; comparisons.py adds file and line.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.backend.errors import DataError
from posttrain.renderers.types import Message
from preference.types import Comparison, Label, LabeledComparison
from supervised.rows import Fields, after_system, conversation, system_of, tools_of, unmarked

SPEAKER = re.compile(r"\n\n(Human|Assistant):")
ROLE_OF = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class ScoredSample:
    """An answer and its score: 0 or 1 for correctness, or any rating."""

    prompt: Sequence[Message]
    completion: Sequence[Message]
    score: float
    where: str = ""


def labeled(fields: Fields, label_field: str = "label") -> LabeledComparison:
    """{"prompt": ..., "completion_A": ..., "completion_B": ..., "label": "A" | "B" | "Tie"}; each
    side is a text or messages."""
    label = need(fields, label_field)
    if label not in ("A", "B", "Tie"):
        raise DataError(f"the field {label_field!r} is {label!r}: it must be 'A', 'B' or 'Tie'")
    sides = [messages(fields, name, "assistant") for name in ("completion_A", "completion_B")]
    return LabeledComparison(Comparison(messages(fields, "prompt", "user"), *sides), label)


def chosen_rejected(fields: Fields, prompt_field: str, chosen_field: str, rejected_field: str) -> LabeledComparison:
    """Answers with a prompt field, or whole conversations that begin with the same prompt. A prompt that is a
    transcript (HH) is read as its turns."""
    prompt = fields.get(prompt_field)
    sides = [side for name in (chosen_field, rejected_field) if isinstance(side := fields.get(name), str)]
    if isinstance(prompt, str) and is_transcript(prompt) and len(sides) == 2:
        begun = prompt if prompt.rstrip().endswith("Assistant:") else f"{prompt}\n\nAssistant: "
        wholes = [side if side.lstrip().startswith(prompt.strip()) else begun + side for side in sides]
        return LabeledComparison(_cut_where_they_part(*(_turns({"": whole}, "") for whole in wholes)), "A")
    chosen, rejected = messages(fields, chosen_field, "assistant"), messages(fields, rejected_field, "assistant")
    if chosen and rejected and "assistant" not in (chosen[0]["role"], rejected[0]["role"]):
        asked = messages(fields, prompt_field, "user") if isinstance(prompt, list) else []
        if asked != chosen[: len(asked)]:
            raise DataError(
                f"the messages in {prompt_field!r} are not those that {chosen_field!r} begins with: keep one of them, "
                f"or leave {prompt_field!r} out"
            )
        return LabeledComparison(_cut_where_they_part(chosen, rejected), "A")
    return LabeledComparison(Comparison(messages(fields, prompt_field, "user"), chosen, rejected), "A")


def transcripts(fields: Fields, chosen_field: str, rejected_field: str) -> LabeledComparison:
    """Two texts like "\\n\\nHuman: hi\\n\\nAssistant: hello" (Anthropic's HH and HHH)."""
    return LabeledComparison(_cut_where_they_part(_turns(fields, chosen_field), _turns(fields, rejected_field)), "A")


def is_transcript(text: str) -> bool:
    """Whether a text begins with the turn of a speaker, as those of HH."""
    return SPEAKER.match("\n\n" + text.lstrip("\n")) is not None


def _turns(fields: Fields, name: str) -> list[Message]:
    text = need(fields, name)
    before, *rest = SPEAKER.split("\n\n" + text.lstrip("\n") if isinstance(text, str) else "no text")
    spoken = [
        Message(role=ROLE_OF[role], content=text.strip()) for role, text in zip(rest[::2], rest[1::2], strict=True)
    ]
    if before or not spoken:
        raise DataError(
            f"the field {name!r} is not a transcript of 'Human:' and 'Assistant:' turns: {str(text)[:40]!r}"
        )
    return spoken


def _cut_where_they_part(chosen: list[Message], rejected: list[Message]) -> Comparison:
    """The prompt is the common beginning of two conversations, up to the assistant's message."""
    last = min(len(chosen), len(rejected)) - 1
    cut = next((i for i in range(last) if chosen[i] != rejected[i]), last)
    while cut > 0 and not chosen[cut]["role"] == rejected[cut]["role"] == "assistant":
        cut -= 1
    if cut <= 0:
        raise DataError("the two conversations have no prompt in common that the assistant answers")
    return Comparison(chosen[:cut], chosen[cut:], rejected[cut:])


def rated_pair(
    fields: Fields, prompt_field: str, answer_fields: tuple[str, str], preference_field: str, tie_within: float
) -> LabeledComparison:
    """Two answers and a signed rating; near 0 is a tie. HelpSteer3: -3 first better, 3 second."""
    rating = number(fields, preference_field)
    label: Label = "Tie" if abs(rating) <= tie_within else ("A" if rating < 0 else "B")
    sides = [messages(fields, name, "assistant") for name in answer_fields]
    margin = None if label == "Tie" else abs(rating)
    return LabeledComparison(Comparison(messages(fields, prompt_field, "user"), *sides), label, margin)


def scored_samples(
    fields: Fields, prompt_field: str, completion_field: str, score_field: str
) -> Iterator[ScoredSample]:
    """The answer in a row, or nested answers in objects or lists of objects (a row per problem)."""
    if tools_of(fields):
        raise DataError("scored answers with a field 'tools': write the pairs as prompt, chosen and rejected")
    prompt = after_system(system_of(fields), messages(fields, prompt_field, "user"))
    flat = completion_field in fields
    inner = [item for value in fields.values() for item in (value if isinstance(value, list) else [value])]
    items = [fields] if flat else [item for item in inner if isinstance(item, Mapping) and completion_field in item]
    if not items:
        raise DataError(
            f"no field {completion_field!r}, in the row or in an object within it; there are {_names(fields)}"
        )
    for sample in items:
        yield ScoredSample(prompt, messages(sample, completion_field, "assistant"), number(sample, score_field))


def check_scores(fields: Fields) -> None:
    """DataError where a row says that its rejected answer is the better one (UltraFeedback's names, and others)."""
    for names in (
        ("score_chosen", "score_rejected"),
        ("chosen_score", "rejected_score"),
        ("chosen-rating", "rejected-rating"),
    ):
        chosen, rejected = map(fields.get, names)
        if isinstance(chosen, int | float) and isinstance(rejected, int | float) and chosen < rejected:
            raise DataError(
                f"{names[0]!r} is {chosen:g} and {names[1]!r} is {rejected:g}: exchange the two answers, leave these "
                "fields out, or drop such rows (malformed=drop)"
            )


def messages(fields: Fields, name: str, role: str) -> list[Message]:
    """A conversation unchanged, or a text as a message of `role`."""
    value = need(fields, name)
    if isinstance(value, str):
        return [Message(role=role, content=value)]
    if isinstance(value, Mapping):  # LLaMA-Factory's answers
        fields = {name: [value]}
    # without marks of what is trained on: preferences train on whole answers
    return [unmarked(message) for message in conversation(fields, name)]


def number(fields: Fields, name: str) -> float:
    value = need(fields, name)
    if not isinstance(value, bool | int | float) or value != value:
        raise DataError(f"the field {name!r} is {str(value)[:40]!r}, not a number")
    return float(value)


def need(fields: Fields, name: str) -> Any:
    if fields.get(name) is None:
        raise DataError(f"no field {name!r}; the fields are {_names(fields)}")
    return fields[name]


def _names(fields: Fields) -> str:
    return ", ".join(map(repr, fields))
