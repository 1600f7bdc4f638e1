"""The shapes of preference files, recognised by field names. docs/data_formats.md has the table. A
field that would change what is trained on, and that the form does not read, is a DataError.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chz

from posttrain.backend.errors import DataError
from posttrain.renderers.types import Message
from preference.comparisons import (
    ChosenRejectedBuilder,
    LabeledBuilder,
    PreferenceRowsBuilder,
    RatedPairBuilder,
    ScoredSamplesBuilder,
    TranscriptBuilder,
    read_each,
)
from preference.rows import is_transcript
from preference.types import Comparison, LabeledComparison
from supervised.forms import IS_GOOD, alpaca_prompt, check_meaning, has, names_of, one_form, print_form, unknown
from supervised.rows import SYSTEM, Fields, Row, conversation

# texts beside an answer that are no prompt
NOTES = ("id", "source", "dataset", "subset", "split", "category", "domain", "task", "type", "language", "model")


@chz.chz
class SharedPrefixBuilder(PreferenceRowsBuilder):
    """{"chosen": "The sky is blue.", "rejected": "The sky is green."}: the prompt is the words that
    both texts begin with."""

    def comparison(self, fields: Fields) -> LabeledComparison:
        chosen, rejected = fields.get("chosen"), fields.get("rejected")
        if not isinstance(chosen, str) or not isinstance(rejected, str):
            raise DataError("'chosen' and 'rejected' must both be texts")
        shared = os.path.commonprefix([chosen, rejected])
        cut = max(shared.rfind(space) for space in (" ", "\n"))
        if not shared[: max(cut, 0)].strip():
            raise DataError(
                "'chosen' and 'rejected' do not begin with the same words, so there is no prompt; give a field 'prompt'"
            )
        answers = [[Message(role="assistant", content=text[cut:])] for text in (chosen, rejected)]
        return LabeledComparison(Comparison([Message(role="user", content=chosen[:cut])], *answers), "A")


def _of_openai(fields: Fields) -> Fields:
    asked = fields["input"]
    if not isinstance(asked, Mapping):
        raise DataError("'input' must be an object with 'messages'")
    renamed = {"chosen": fields["preferred_output"], "rejected": fields["non_preferred_output"]}
    return {"prompt": asked.get("messages"), "tools": asked.get("tools"), **renamed}


def _of_cookbook(fields: Fields) -> Fields:
    compared = fields["comparison"]
    if not isinstance(compared, Mapping):
        raise DataError("'comparison' must be an object with 'prompt_conversation', 'completion_A' and 'completion_B'")
    sides = {name: compared.get(name) for name in ("completion_A", "completion_B")}
    return {"prompt": compared.get("prompt_conversation"), **sides, "label": fields["label"]}


def _of_alpaca(fields: Fields) -> Fields:
    return {
        **{name: fields[name] for name in fields if name not in ("input", "history")},
        "prompt": alpaca_prompt(fields),
    }


def _of_marked_conversation(fields: Fields) -> Fields:
    """The last answer is what is marked; before it is the prompt."""
    name = next(name for name in CONVERSATION if name in fields)
    if not isinstance(spoken := fields[name], list) or not isinstance(fields[mark_of(fields)], bool):
        raise DataError(f"the field {name!r} must be a list of messages, and {mark_of(fields)!r} true or false")
    if [message["role"] for message in conversation(fields, name)[-1:]] != ["assistant"]:
        raise DataError(f"{name!r} must end with the answer that {mark_of(fields)!r} marks, an assistant's message")
    beside = {other: fields[other] for other in (*SYSTEM, "tools") if other in fields}
    return {**beside, "prompt": spoken[:-1], "completion": spoken[-1:], "label": fields[mark_of(fields)]}


def mark_of(fields: Fields) -> str:
    """The field that says whether an answer is good."""
    return next(name for name in IS_GOOD if fields.get(name) is not None)


class Form(NamedTuple):
    """`builder` reads what `renamed` makes of a row. `also` are fields that it may have."""

    name: str
    fields: tuple[str, ...]
    builder: type[PreferenceRowsBuilder]
    settings: Mapping[str, Any] = {}
    renamed: Callable[[Fields], Fields] = lambda fields: fields
    also: tuple[str, ...] = ()


LABELED = Form("labelled comparisons", ("prompt", "completion_A", "completion_B", "label"), LabeledBuilder)
CHOSEN = Form("chosen and rejected", ("prompt", "chosen", "rejected"), ChosenRejectedBuilder)
QUESTION = Form(
    "question, chosen and rejected",
    ("question", "chosen", "rejected"),
    ChosenRejectedBuilder,
    {"prompt_field": "question"},
)
INSTRUCTION = Form(
    "Alpaca's instruction, chosen and rejected",
    ("instruction", "chosen", "rejected"),
    ChosenRejectedBuilder,
    renamed=_of_alpaca,
    also=("input", "history"),
)
SHAREGPT = Form(
    "ShareGPT conversation, chosen and rejected",
    ("conversations", "chosen", "rejected"),
    ChosenRejectedBuilder,
    {"prompt_field": "conversations"},
)
OPENAI = Form(
    "OpenAI's preferences", ("input", "preferred_output", "non_preferred_output"), ChosenRejectedBuilder, {}, _of_openai
)
COOKBOOK = Form("comparisons of tinker-cookbook", ("comparison", "label"), LabeledBuilder, {}, _of_cookbook)
CONVERSATIONS = Form("chosen and rejected conversations", ("chosen", "rejected"), ChosenRejectedBuilder)
TRANSCRIPTS = Form("chosen and rejected transcripts", ("chosen", "rejected"), TranscriptBuilder)
SHARED_PREFIX = Form("chosen and rejected texts with the prompt in both", ("chosen", "rejected"), SharedPrefixBuilder)
RATED = Form("rated pairs", ("context", "response1", "response2", "overall_preference"), RatedPairBuilder)
SCORED = Form("scored answers", ("prompt", "completion", "score"), ScoredSamplesBuilder)
KTO = Form(
    "answers marked good and bad", ("prompt", "completion", "label"), ScoredSamplesBuilder, {"score_field": "label"}
)
CONVERSATION = ("messages", "conversations")
MARKED = tuple(
    Form("conversations marked good and bad", (name, mark), KTO.builder, KTO.settings, _of_marked_conversation)
    for name in CONVERSATION
    for mark in IS_GOOD
)
WITHOUT_CHOSEN = (LABELED, RATED, SCORED, KTO, OPENAI, COOKBOOK)
FORMS = (*WITHOUT_CHOSEN, MARKED[0], CHOSEN, QUESTION, INSTRUCTION, SHAREGPT, CONVERSATIONS, TRANSCRIPTS, SHARED_PREFIX)


def form_of(fields: Fields) -> Form:
    """DataError where the fields match no form, or two."""
    forms = [form for form in WITHOUT_CHOSEN if has(fields, form.fields)]
    if has(fields, ("chosen", "rejected")):
        forms.append(_chosen_rejected(fields))
    forms = forms or [form for form in MARKED if has(fields, form.fields)][:1]
    if len(forms) > 1:
        raise DataError(
            f"the fields {names_of(fields)} are those of two forms, {' and '.join(form.name for form in forms)}: say "
            "which, as dataset=chosen_rejected dataset.path=FILE or dataset=scored_samples dataset.path=FILE"
        )
    if not forms:
        raise unknown(fields, {form.name: form.fields for form in FORMS}, "dataset.chosen_field=NAME and the like")
    return forms[0]


def _chosen_rejected(fields: Fields) -> Form:
    if has(fields, ("prompt",)):
        return CHOSEN
    if isinstance(fields["chosen"], Mapping) and has(fields, ("conversations",)):
        return SHAREGPT
    if not isinstance(fields["chosen"], str):
        return QUESTION if has(fields, ("question",)) and not _is_whole(fields["chosen"]) else CONVERSATIONS
    if is_transcript(fields["chosen"]):
        return TRANSCRIPTS
    if has(fields, ("question",)):
        return QUESTION
    if has(fields, ("instruction",)):
        return INSTRUCTION
    known = (*SHARED_PREFIX.fields, *SYSTEM, *NOTES)
    texts = [name for name, value in fields.items() if isinstance(value, str) and value.strip() and name not in known]
    if texts := [name for name in texts if not name.endswith("_id")]:
        raise DataError(
            f"'chosen' and 'rejected' are texts without a field 'prompt', beside {', '.join(map(repr, texts))}: name "
            "the prompt 'prompt'; if it is what the two texts have in common, leave other texts out of the rows"
        )
    return SHARED_PREFIX


def _is_whole(answer: Any) -> bool:
    """Whether an answer is a conversation with its prompt."""
    is_list = isinstance(answer, list) and len(answer) > 0 and isinstance(answer[0], Mapping)
    return is_list and answer[0].get("role") != "assistant"


@chz.chz
class FileBuilder(PreferenceRowsBuilder):
    """A file of any form in preference/forms.py, recognised by its rows' fields."""

    def comparisons(self, rows: Sequence[Row], dropped: Counter[str] | None) -> list[LabeledComparison]:
        if not rows:
            return []
        form: Form = one_form(rows if dropped is None else rows[:1], form_of)
        also = (*SYSTEM, *form.also)
        print_form(rows[0][0].rsplit(":", 1)[0], form, rows, (*also, "tools"))

        def checked(fields: Fields) -> Fields:
            check_meaning(fields, (*form.fields, *also), form.name)
            return form.renamed(fields)

        rows = list(read_each(rows, checked, dropped))
        common: dict[str, Any] = {name: getattr(self, name) for name in chz.chz_fields(PreferenceRowsBuilder)}
        comparisons = form.builder(**common, **form.settings).comparisons(rows, dropped)
        if form in (KTO, *MARKED) and not comparisons:
            raise DataError(
                f"{self.path}: no prompt has both a good and a bad answer, so there are no pairs; a loss "
                "for unpaired answers (KTO) is not here: train on the good ones with supervised/train_cli.py, "
                f"without the field {form.fields[-1]!r}"
            )
        return comparisons
