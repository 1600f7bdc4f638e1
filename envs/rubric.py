"""Rubrics: weighted criteria in words, each judged by itself, as a reward in [0, 1] where no weight
is negative. A judge is a function of (Answer, Criterion), or a language model: an endpoint
(ChatEndpoint), or a frozen model of this machine (FrozenPolicy). A criterion of negative weight
takes reward away where it is met.

    value = sum over criteria of weight * score / sum of the positive weights, scores in [0, 1]
"""

import asyncio
import difflib
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import chz

from envs.graders import with_ascii_minus
from envs.rewards import Answer, Number, Reward, Value, called
from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.ranges import NUMBER, POSITIVE
from posttrain.renderers.types import Message
from posttrain.tracking.jsonl import read_json
from preference.endpoint import ChatEndpoint
from preference.reward_types import JudgeError, judged
from rl.frozen_policy import FrozenPolicy
from supervised.rows import read_rows

Completer = Callable[[str], Awaitable[str]]  # of a language model: text in, text out
# "7", "**Score: 8.5/10**"; a minus sign is the number's
NUMBER_AT_THE_END = re.compile(r"[^\w-]*(?:score[^\w-]*)?(-?\d+(?:\.\d+)?)(?:\s*/\s*(\d+))?\W*", re.IGNORECASE)
SHOWN_CHARS = 500  # of a judge's reasons, in the transcript
INSTRUCTION = """Judge the answer by the criterion alone.

[Question]
{question}
{reference}
[Answer]
{answer}
[End of the answer]

[Criterion]
{criterion}

Say briefly how far the answer meets the criterion. End with a line that holds one number: from 0 \
(not at all) to {highest:g} (fully)."""


@dataclass(frozen=True)
class Criterion:
    """What is wanted, in words. Its metric is reward/RUBRIC/NAME, before the weight."""

    name: str
    text: str
    weight: float = 1.0


CriterionJudge = Callable[[Answer, Criterion], Number | Awaitable[Number]]
Criteria = str | Mapping[str, str] | Sequence[Criterion | Mapping[str, Any]]


# --- what is judged -------------------------------------------------------------------------------


def read_criteria(criteria: Criteria) -> tuple[Criterion, ...]:
    """Criteria from {name: text}, from a list of Criterion or of {"name", "text", "weight"}, or
    from a .json or .jsonl file of either. ConfigError that says which criterion is wrong."""
    where, given = "rubric", criteria
    if isinstance(criteria, str):
        where = criteria
        given = (
            [row for _, row in read_rows(criteria)]
            if criteria.endswith(".jsonl")
            else read_json(criteria, "check the file")
        )
    if isinstance(given, Mapping):
        given = [{"name": name, "text": text} for name, text in given.items()]
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ConfigError(f"{where}: neither a list of criteria nor an object of name: text")
    read = tuple(_criterion(f"{where}: criterion {i}", item) for i, item in enumerate(given, start=1))
    names = [criterion.name for criterion in read]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(
            f"{where}: criterion {len(names) - names[::-1].index(twice)} is called {twice!r}, like another one: rename it"
        )
    if not any(criterion.weight > 0 for criterion in read):
        raise ConfigError(f"{where}: no criterion has a weight above 0")
    return read


def _criterion(where: str, item: Any) -> Criterion:
    if isinstance(item, Criterion):
        item = vars(item)
    if not isinstance(item, Mapping):
        raise ConfigError(f"{where} is {item!r:.60}: an object with name, text and perhaps weight is needed")
    known = [field.name for field in fields(Criterion)]
    if unknown := next((key for key in item if key not in known), None):
        near = difflib.get_close_matches(str(unknown), known, n=1, cutoff=0.5)
        raise ConfigError(
            f"{where}: no field is called {unknown!r}; "
            + (f"did you mean {near[0]}?" if near else f"there are {known}")
        )
    for key in ("name", "text"):
        if not isinstance(item.get(key), str) or not item[key].strip():
            raise ConfigError(f"{where} ({item.get('name', 'no name')}): {key!r} is {item.get(key)!r:.60}, not a text")
    weight = item.get("weight", 1.0)
    if needs := NUMBER.needs(weight):
        raise ConfigError(f"{where} ({item['name']}): weight={weight!r:.60} must be {needs}")
    if not weight:
        raise ConfigError(f"{where} ({item['name']}): weight=0 counts for nothing; leave the criterion out")
    return Criterion(item["name"], item["text"], float(weight))


# --- judges ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LanguageJudge:
    """A language model as a CriterionJudge: it ends with a number from 0 to `highest`."""

    complete: Completer
    instruction: str = INSTRUCTION
    highest: float = 10.0

    async def __call__(self, answer: Answer, criterion: Criterion) -> Value:
        """The number divided by `highest`; JudgeError without one, or out of range."""
        reference = f"\n[Reference answer]\n{answer.gold}\n" if answer.gold else ""
        filled = {
            "question": answer.question,
            "reference": reference,
            "answer": answer.text,
            "criterion": criterion.text,
            "highest": self.highest,
        }
        reply = await self.complete(self.instruction.format(**filled))
        lines = reply.strip().splitlines() or [""]
        number = NUMBER_AT_THE_END.fullmatch(with_ascii_minus(lines[-1]))
        if number is None:
            raise JudgeError(f"the judge ended with {reply[-60:]!r}, not with a number from 0 to {self.highest:g}")
        if not 0 <= float(number[1]) <= self.highest or float(number[2] or self.highest) != self.highest:
            raise JudgeError(f"the judge answered {number[0].strip()}: a number from 0 to {self.highest:g} is needed")
        return Value(float(number[1]) / self.highest, logs={"reply": reply[-SHOWN_CHARS:]})


def check_instruction(instruction: str) -> None:
    """ConfigError unless the answer and the criterion have a place in it, and it has no other."""
    for name in ("answer", "criterion"):
        if f"{{{name}}}" not in instruction:
            raise ConfigError(f"instruction={instruction!r:.60} has no {{{name}}}")
    try:
        instruction.format(question="", reference="", answer="", criterion="", highest=1.0)
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"instruction: {error!r}; it may have {{question}}, {{reference}}, {{answer}}, {{criterion}}, "
            "{highest}; other braces are doubled"
        ) from None


# --- the reward -----------------------------------------------------------------------------------


@chz.chz
class Rubric(Reward):
    """The criteria, judged at the same time. The judge's reasons are in the transcript."""

    criteria: tuple[Criterion, ...] = chz.field(doc="what is wanted")
    judge: CriterionJudge | ChatEndpoint | FrozenPolicy = chz.field(
        doc="a function of (Answer, Criterion) to a number from 0 to 1; an endpoint; a model of this machine"
    )
    instruction: str = chz.field(default=INSTRUCTION, doc="what a language model is told; its places are filled")
    highest: float = chz.field(default=10.0, validator=POSITIVE, doc="a language model's best number; 0 is the worst")

    @chz.init_property
    def _judge(self) -> CriterionJudge:
        check_instruction(self.instruction)
        if isinstance(self.judge, ChatEndpoint):
            return LanguageJudge(self.judge.client.complete, self.instruction, self.highest)
        if isinstance(self.judge, FrozenPolicy):
            return LanguageJudge(_Frozen(self.judge), self.instruction, self.highest)
        if not callable(self.judge):
            raise ConfigError(f"judge={self.judge!r:.60}: neither a function nor an endpoint nor a FrozenPolicy")
        return self.judge

    async def score(self, answers_G: Sequence[Answer]) -> list[Value]:
        return [await self._score(answer) for answer in answers_G]

    async def _score(self, answer: Answer) -> Value:
        judged = await asyncio.gather(*(self._judged(answer, criterion) for criterion in self.criteria))
        pairs = list(zip(self.criteria, judged, strict=True))
        best = sum(criterion.weight for criterion in self.criteria if criterion.weight > 0)
        value = sum(criterion.weight * score.value for criterion, score in pairs) / best
        metrics = {f"reward/{self.name}/{criterion.name}": score.value for criterion, score in pairs}
        logs = {
            f"{self.name}/{c.name}": f"{score.value:g} {score.logs.get('reply', '')}".rstrip() for c, score in pairs
        }
        return Value(value, metrics, logs)

    async def _judged(self, answer: Answer, criterion: Criterion) -> Value:
        what = f"{self.name}, criterion {criterion.name!r}"
        try:
            result = await called(what, self._judge, answer, criterion)
        except JudgeError as error:
            raise JudgeError(f"{what}: {error}") from error
        value = result if isinstance(result, Value) else Value(result)
        if (score := judged(value.value, 0)) is None:
            raise JudgeError(f"{what}: the judge answered {value.value!r:.60}; a number from 0 to 1 is needed")
        return Value(score, logs=value.logs)


class _Frozen:
    """A frozen model as a Completer, opened at its first use."""

    def __init__(self, policy: FrozenPolicy):
        self._policy, self._completer = policy, None

    async def __call__(self, text: str) -> str:
        self._completer = self._completer or self._policy.open_completer()
        return (await self._completer([Message(role="user", content=text)]))["content"]


def rubric(
    criteria: Criteria,
    judge: CriterionJudge | ChatEndpoint | FrozenPolicy,
    weight: float = 1.0,
    name: str = "rubric",
    **settings: Any,
) -> Rubric:
    """`criteria` judged by `judge`; `settings` are fields of Rubric. ConfigError, with the criterion,
    for a malformed rubric."""
    try:
        return Rubric(criteria=read_criteria(criteria), judge=judge, weight=weight, name=name, **settings)
    except DataError as error:
        raise ConfigError(str(error)) from error
