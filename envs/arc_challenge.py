"""ARC-Challenge (Clark et al. 2018): science questions, each with three to five options of which one is right.

Rows come from JSONL files of the hub's form or from the hub. Options are lettered anew from A, since some questions number theirs. A response
is right if the letter behind its last "answer is" is. Left out: an RLDatasetBuilder, retrieval of supporting text.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from envs.math_word import read_hub
from envs.problem_env import ProblemEnv
from posttrain.backend.errors import DataError
from posttrain.renderers.types import Renderer
from supervised.rows import Fields, Row, read_rows, text_of

ANSWER_PHRASE = "The answer is"
_ANSWER = re.compile(r"answer is:?\s*\(?([A-Z])\b")


@dataclass(frozen=True)
class ArcQuestion:
    """`gold` is the right option's index in `options`."""

    stem: str
    options: tuple[str, ...]
    gold: int


def read_arc(data_dir: str | None, split: str) -> Iterable[Row]:
    """The rows of `split`: from `data_dir`/`split`.jsonl, or else from the hub."""
    return read_rows(f"{data_dir}/{split}.jsonl") if data_dir else read_hub("allenai/ai2_arc", "ARC-Challenge", split)


def arc_question(where: str, row: Fields) -> ArcQuestion:
    """DataError where a field is missing or of another kind, or the key is none of the options."""
    choices = row.get("choices")
    columns: list[Any] = [choices.get(name) for name in ("label", "text")] if isinstance(choices, Mapping) else []
    if not columns or not all(map(_are_texts, columns)) or len({*map(len, columns)}) > 1:
        raise DataError(f"{where}: 'choices' must hold a 'label' and a 'text' list of the same length, not {str(choices)[:80]}")
    stem, key = text_of(where, row, "question"), text_of(where, row, "answerKey")
    options = dict(zip(*columns, strict=True))
    if key not in options:
        raise DataError(f"{where}: answerKey {key!r} is none of the options {', '.join(options)}")
    texts = tuple(text.strip() for text in options.values())
    return ArcQuestion(stem, texts, list(options).index(key))


def _are_texts(column: object) -> bool:
    return isinstance(column, list) and all(isinstance(text, str) for text in column)


class ArcEnv(ProblemEnv):
    """`trigger` follows the options."""

    def __init__(self, problem: ArcQuestion, renderer: Renderer, trigger: str = ""):
        super().__init__(renderer)
        self.problem, self.trigger = problem, trigger

    def question(self) -> str:
        options = (f"{letter}. {text}" for letter, text in zip(ascii_uppercase, self.problem.options, strict=False))
        return "\n".join([self.problem.stem, *options]) + self.trigger

    def reference_answer(self) -> str:
        return ascii_uppercase[self.problem.gold]

    def extract(self, text: str) -> str:
        """The letter of an option, "" where there is none."""
        letters = _ANSWER.findall(text)
        return letters[-1] if letters and letters[-1] in ascii_uppercase[: len(self.problem.options)] else ""

    def check_answer(self, text: str) -> bool:
        return self.extract(text) == self.reference_answer()

    def check_format(self, text: str) -> bool:
        return self.extract(text) != ""
