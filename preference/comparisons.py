"""Sets of comparisons from files, the Hugging Face hub and scored samples: read, cleaned, counted,
split by prompt. Splits and swaps depend on content hashes and a seed, not on the order of reading.
Left out: streaming from sets that do not fit into memory.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

import chz

from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.ranges import COUNT, NON_NEGATIVE, SEED
from posttrain.renderers.types import Message
from preference import rows as shapes
from preference.rows import ScoredSample
from preference.types import Comparison, ComparisonDatasetBuilder, LabeledComparison
from supervised.rows import (
    JSON_ENDS,
    Fields,
    Row,
    after_system,
    called,
    checked_messages,
    read_rows,
    system_of,
    tools_of,
)
from supervised.table_rows import file_rows, table_rows

T = TypeVar("T")


# --- identity, order, pairs ---------------------------------------------------------------------


def content_hash(*parts: object) -> str:
    """Equal for equal content, in any process; messages are compared by all their fields."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def randomly_swapped(comparisons: Sequence[LabeledComparison], seed: int = 0) -> list[LabeledComparison]:
    """Sides exchanged for about half of them, as a function of (example, seed)."""
    return [labeled.swap() if int(content_hash(_sides(labeled), seed), 16) % 2 else labeled for labeled in comparisons]


def in_both_orders(comparisons: Sequence[LabeledComparison]) -> list[LabeledComparison]:
    """Each comparison, followed by itself with the sides exchanged."""
    return [side for labeled in comparisons for side in (labeled, labeled.swap())]


def prompt_hash(labeled: LabeledComparison) -> str:
    """Equal for comparisons with the same prompt, which belong on the same side of a split."""
    return content_hash(list(labeled.comparison.prompt_conversation))


def _sides(labeled: LabeledComparison) -> list[list[Message]]:
    comparison = labeled.comparison
    return [list(side) for side in (comparison.prompt_conversation, comparison.completion_A, comparison.completion_B)]


def pairs_of_samples(
    samples: Sequence[ScoredSample], min_gap: float, max_pairs: int | None, seed: int
) -> list[LabeledComparison]:
    """Every sample against each sample of the same prompt that scored at least `min_gap` less, with
    the difference as margin. Equal scores make no pair. `max_pairs` per prompt are kept, chosen by
    hash."""
    by_prompt: dict[str, list[ScoredSample]] = defaultdict(list)
    for sample in samples:
        by_prompt[content_hash(list(sample.prompt))].append(sample)
    pairs = []
    for group in by_prompt.values():
        of_prompt = [
            LabeledComparison(
                Comparison(better.prompt, better.completion, worse.completion),
                "A",
                better.score - worse.score,
                better.where,
            )
            for better in group
            for worse in group
            if better.score > worse.score and better.score - worse.score >= min_gap
        ]
        pairs += (
            sorted(of_prompt, key=lambda labeled: content_hash(_sides(labeled), seed))[:max_pairs]
            if max_pairs
            else of_prompt
        )
    return pairs


# --- cleaning and splitting ---------------------------------------------------------------------


def cleaned(
    comparisons: Sequence[LabeledComparison], identical: str = "drop", empty: str = "raise"
) -> tuple[list[LabeledComparison], Counter[str]]:
    """The comparisons without duplicates, identical answers and empty answers, and a count of each.
    With "raise" such a comparison is a DataError.

    A duplicate is the same judgement again, in either order of the sides. The opposite judgement is
    a disagreement and stays.
    """
    kept: dict[str, LabeledComparison] = {}
    dropped: Counter[str] = Counter()
    for labeled in comparisons:
        fault, option = _fault(labeled), {"empty answers": empty, "identical answers": identical}
        if fault and option.get(fault, "raise") == "raise":
            raise DataError(
                f"{labeled.where}: {fault}"
                + (f"; {fault.split()[0]}=drop leaves such pairs out" if fault in option else "")
            )
        judgement = _judgement(labeled)
        if fault or judgement in kept:
            dropped[fault or "duplicates"] += 1
        else:
            kept[judgement] = labeled
    return list(kept.values()), dropped


def _fault(labeled: LabeledComparison) -> str:
    prompt, a, b = _sides(labeled)
    if not prompt:
        return "no prompt before the answers"
    if any(side and side[0]["role"] != "assistant" for side in (a, b)):
        return "an answer that does not begin with an assistant's message"
    if not all(side and all(message["content"].strip() or message.get("parts") for message in side) for side in (a, b)):
        return "empty answers"
    return "identical answers" if a == b else ""


def _judgement(labeled: LabeledComparison) -> str:
    prompt, a, b = _sides(labeled)
    offered = [list(labeled.comparison.tools)] if labeled.comparison.tools else []
    if labeled.label == "Tie":
        return content_hash(prompt, sorted(map(content_hash, (a, b))), "Tie", *offered)
    return content_hash(prompt, *((a, b) if labeled.label == "A" else (b, a)), *offered)


def split_by_prompt(
    comparisons: Sequence[LabeledComparison], test_size: int, seed: int
) -> tuple[list[LabeledComparison], list[LabeledComparison]]:
    """Training and held-out comparisons: whole prompts, in hash order, until there are `test_size` comparisons."""
    if not 0 <= test_size < len(comparisons):
        raise DataError(f"test_size={test_size} of {len(comparisons):,} comparisons: it must leave some to train on")
    prompts = [content_hash(list(labeled.comparison.prompt_conversation), seed) for labeled in comparisons]
    held_out, count, sizes = set(), 0, Counter(prompts)
    for prompt in sorted(sizes):
        if count >= test_size:
            break
        held_out.add(prompt)
        count += sizes[prompt]
    train, test = (
        [labeled for labeled, p in zip(comparisons, prompts, strict=True) if (p in held_out) is side]
        for side in (False, True)
    )
    if not train:
        raise DataError(f"test_size={test_size} holds out every prompt: there are only {len(sizes)}")
    return train, test


def read_each(
    rows: Sequence[Row], read: Callable[[Fields], T], dropped: Counter[str] | None = None
) -> Iterator[tuple[str, T]]:
    """(place, `read`(fields)) of each row. A malformed row is counted in `dropped`, or is a
    DataError that begins with its place."""
    for where, fields in rows:
        try:
            yield where, read(fields)
        except DataError as error:
            if dropped is None:
                raise DataError(f"{where}: {error}") from error
            dropped["malformed rows"] += 1


# --- builders -----------------------------------------------------------------------------------


@chz.chz
class PreferenceRowsBuilder(ComparisonDatasetBuilder):
    """The options of all sets: source, cleaning, split. A subclass reads the shape of its rows."""

    path: str = chz.field(doc="file (JSONL, JSON, Parquet, CSV), hub name, or local folder of a Hugging Face dataset")
    subset: str | None = chz.field(default=None, doc="configuration of the hub dataset")
    split: str = chz.field(default="train", doc="split to train on (not of a JSON file)")
    test_split: str | None = chz.field(default=None, doc="split held out (not of a JSON file)")
    test_path: str | None = chz.field(default=None, doc="held-out file: JSONL, JSON or Parquet; in place of test_split")
    identical: Literal["drop", "raise"] = chz.field(default="drop", doc="pairs whose two answers are the same")
    empty: Literal["drop", "raise"] = chz.field(default="raise", doc="pairs with an empty answer")
    malformed: Literal["drop", "raise"] = chz.field(
        default="raise", doc="rows without a field, with a label outside the set, ..."
    )

    def comparison(self, fields: Fields) -> LabeledComparison:
        """The comparison in a row. Raises DataError without the row's place."""
        raise NotImplementedError

    def comparisons(self, rows: Sequence[Row], dropped: Counter[str] | None) -> list[LabeledComparison]:
        """Malformed rows are counted in `dropped`; where that is None, they raise DataError."""
        return [replace(labeled, where=where) for where, labeled in read_each(rows, self._whole, dropped)]

    def _whole(self, fields: Fields) -> LabeledComparison:
        """With what a row of any shape may say beside its answers: `system` and `tools`."""
        shapes.check_scores(fields)
        name, labeled = f"{type(self).__name__}.comparison", called(self, "comparison", fields)
        if not isinstance(labeled, LabeledComparison) or not isinstance(labeled.comparison, Comparison):
            raise DataError(f"{name} returned {labeled!r:.80}, not a LabeledComparison of a Comparison")
        for part in ("prompt_conversation", "completion_A", "completion_B"):
            checked_messages(f"{name}: the {part}", getattr(labeled.comparison, part))
        prompt = after_system(system_of(fields), list(labeled.comparison.prompt_conversation))
        return replace(
            labeled, comparison=replace(labeled.comparison, prompt_conversation=prompt, tools=tuple(tools_of(fields)))
        )

    def __call__(self) -> tuple[list[LabeledComparison], list[LabeledComparison]]:
        train_rows, test_rows = self._rows()
        dropped = Counter[str]()
        train, test = (self._clean(rows, dropped) for rows in (train_rows, test_rows))
        if self.test_size:
            train, test = split_by_prompt(train, self.test_size, self.split_seed)
        test_prompts = {prompt_hash(labeled) for labeled in test}
        apart = [labeled for labeled in train if prompt_hash(labeled) not in test_prompts]
        if overlapping := len(train) - len(apart):
            dropped["training pairs on held-out prompts"] += overlapping
        return self._reported(apart, test, dropped)

    def _clean(self, rows: Sequence[Row], dropped: Counter[str]) -> list[LabeledComparison]:
        comparisons = self.comparisons(rows, dropped if self.malformed == "drop" else None)
        kept, counts = cleaned(comparisons, self.identical, self.empty)
        dropped.update(counts)
        return kept

    def _rows(self) -> tuple[Sequence[Row], Sequence[Row]]:
        if self.test_size and (self.test_split or self.test_path):
            raise ConfigError(f"test_size={self.test_size} and a held-out set: give one of them")
        is_json = str(self.path).lower().endswith(JSON_ENDS)
        train = read_rows(self.path) if is_json else table_rows(self.path, self.subset, self.split)
        if self.test_path:
            return train, file_rows(self.test_path)
        test_split = None if is_json else self.test_split
        return train, table_rows(self.path, self.subset, test_split) if test_split else []

    def _reported(
        self, train: list[LabeledComparison], test: list[LabeledComparison], dropped: Counter[str]
    ) -> tuple[list[LabeledComparison], list[LabeledComparison]]:
        """Both sets unchanged, after one printed line. DataError if no training data are left."""
        ties = sum(labeled.label == "Tie" for labeled in (*train, *test))
        counts = [f"{len(train):,} comparisons", f"{len(test):,} held out", f"{ties:,} of them ties"]
        line = f"{self.path}: {', '.join(counts)}" + "".join(
            f"; {count:,} {fault} dropped" for fault, count in dropped.items()
        )
        if not train:
            raise DataError(f"{line}: nothing is left to train on")
        print(line, flush=True)
        return train, test


@chz.chz
class LabeledBuilder(PreferenceRowsBuilder):
    """{"prompt": ..., "completion_A": ..., "completion_B": ..., "label": "A", "B" or "Tie"}; sides
    are texts or messages.
    """

    label_field: str = chz.field(default="label", doc="field with A, B or Tie")

    def comparison(self, fields: Fields) -> LabeledComparison:
        return shapes.labeled(fields, self.label_field)


@chz.chz
class ChosenRejectedBuilder(PreferenceRowsBuilder):
    """{"prompt": ..., "chosen": ..., "rejected": ...}: texts, messages, or whole conversations
    (UltraFeedback, Tulu 3).
    """

    prompt_field: str = chz.field(
        default="prompt", doc="field with the prompt; unread where the answers are whole conversations"
    )
    chosen_field: str = chz.field(default="chosen", doc="field with the better answer")
    rejected_field: str = chz.field(default="rejected", doc="field with the worse answer")

    def comparison(self, fields: Fields) -> LabeledComparison:
        return shapes.chosen_rejected(fields, self.prompt_field, self.chosen_field, self.rejected_field)


@chz.chz
class TranscriptBuilder(PreferenceRowsBuilder):
    """{"chosen": "\\n\\nHuman: ... \\n\\nAssistant: ...", "rejected": ...}: Anthropic's HH and
    HHH.
    """

    chosen_field: str = chz.field(default="chosen", doc="field with the better transcript")
    rejected_field: str = chz.field(default="rejected", doc="field with the worse transcript")

    def comparison(self, fields: Fields) -> LabeledComparison:
        return shapes.transcripts(fields, self.chosen_field, self.rejected_field)


@chz.chz
class RatedPairBuilder(PreferenceRowsBuilder):
    """Two answers and one signed rating; the defaults are HelpSteer3's."""

    prompt_field: str = chz.field(default="context", doc="field with the prompt or the conversation so far")
    a_field: str = chz.field(default="response1", doc="field with the answer that a negative rating prefers")
    b_field: str = chz.field(default="response2", doc="field with the answer that a positive rating prefers")
    preference_field: str = chz.field(default="overall_preference", doc="field with the rating")
    tie_within: float = chz.field(default=0.0, validator=NON_NEGATIVE, doc="ratings of at most this size are ties")

    def comparison(self, fields: Fields) -> LabeledComparison:
        return shapes.rated_pair(
            fields, self.prompt_field, (self.a_field, self.b_field), self.preference_field, self.tie_within
        )


@chz.chz
class ScoredSamplesBuilder(PreferenceRowsBuilder):
    """Pairs of better and worse answers to the same prompt, from scored answers: a row per answer
    (HelpSteer2, your own samples) or a row per prompt with the answers nested in it
    (UltraFeedback's ratings, GSM8K's model solutions)."""

    prompt_field: str = chz.field(default="prompt", doc="field with the prompt")
    completion_field: str = chz.field(default="completion", doc="field with the answer")
    score_field: str = chz.field(default="score", doc="field with its score: a number, or true for correct")
    min_gap: float = chz.field(
        default=0.0, validator=NON_NEGATIVE, doc="least difference of the scores of a pair; equal scores never make one"
    )
    max_pairs: int | None = chz.field(
        default=None, validator=COUNT, doc="pairs of one prompt to keep, drawn by pair_seed; None = all"
    )
    pair_seed: int = chz.field(default=0, validator=SEED, doc="seed of the choice under max_pairs")

    def comparisons(self, rows: Sequence[Row], dropped: Counter[str] | None) -> list[LabeledComparison]:
        names = (self.prompt_field, self.completion_field, self.score_field)
        read = read_each(rows, lambda fields: list(shapes.scored_samples(fields, *names)), dropped)
        samples = [replace(sample, where=where) for where, samples in read for sample in samples]
        return pairs_of_samples(samples, self.min_gap, self.max_pairs, self.pair_seed)
