"""Preference data: two answers to a conversation and a label, and the builders of sets of them.
Names are the Tinker cookbook's. A tie is a label and never becomes a preference. Rankings of more
than two answers become pairs by `comparisons.pairs_of_samples`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import chz

from posttrain.backend.choices import check_choices
from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.ranges import SEED, WHOLE
from posttrain.renderers.types import Message, ToolSpec

Label = Literal["A", "B", "Tie"]
SWAPPED: dict[Label, Label] = {"A": "B", "B": "A", "Tie": "Tie"}

Ties = Literal["drop", "both", "raise"]


@dataclass(frozen=True)
class Comparison:
    """Two completions, each a list of messages that continues `prompt_conversation`. `tools` are those that
    the prompt offers."""

    prompt_conversation: Sequence[Message]
    completion_A: Sequence[Message]
    completion_B: Sequence[Message]
    tools: Sequence[ToolSpec] = field(default=(), kw_only=True)

    def swap(self) -> "Comparison":
        return replace(self, completion_A=self.completion_B, completion_B=self.completion_A)


@dataclass(frozen=True)
class LabeledComparison:
    """`margin` (above 0) is by how much the better side wins on the data's scale, None if unknown.
    `where` is the source row ("path:line"), for errors."""

    comparison: Comparison
    label: Label
    margin: float | None = None
    where: str = ""

    def __post_init__(self) -> None:
        if self.label not in get_args(Label):
            raise DataError(
                f"{self.where or 'comparison'}: the label {self.label!r} is not one of {', '.join(get_args(Label))}"
            )

    def swap(self) -> "LabeledComparison":
        """The same judgement with the sides exchanged."""
        return replace(self, comparison=self.comparison.swap(), label=SWAPPED[self.label])

    def chosen_and_rejected(self) -> tuple[Sequence[Message], Sequence[Message]]:
        """(better, worse). DataError for a tie, which has neither."""
        if self.label == "Tie":
            raise DataError(
                f"{self.where or 'comparison'}: a tie has no better completion; leave it out or treat it as one"
            )
        comparison = self.comparison if self.label == "A" else self.comparison.swap()
        return comparison.completion_A, comparison.completion_B


@chz.chz
class ComparisonDatasetBuilder:
    """Builds training and held-out comparisons ([] if there are none); no prompt is in both.

    The sides keep the data's order: in a chosen/rejected set A is the chosen answer. A model that
    sees both sides is trained on `comparisons.randomly_swapped` or `comparisons.in_both_orders`.
    """

    test_size: int = chz.field(
        default=0, validator=WHOLE, doc="comparisons held out from the training data, whole prompts at a time; 0 = none"
    )
    split_seed: int = chz.field(default=0, validator=SEED, doc="seed of the choice of held-out prompts")

    @chz.validate
    def _check_choices(self) -> None:
        check_choices(self)

    def __call__(self) -> tuple[list[LabeledComparison], list[LabeledComparison]]:
        raise ConfigError(
            "no set of comparisons was chosen: give dataset=NAME or dataset=module:Class (--help lists the names)"
        )
