"""Votes of a judge on two models' infills of the same stories, and their win rate.

    win rate = mean over stories of (votes for the first + ties / 2) / votes

Its interval is Wilson's with n = stories, since the votes on a story are not independent; for
shares between 0 and 1 it is, if anything, too wide. Left out: Elo, more than two models.
"""

import asyncio
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from posttrain.backend.errors import DataError
from posttrain.renderers.types import Message
from posttrain.tracking.jsonl import append_jsonl, drop_torn_line, read_jsonl
from posttrain.tracking.progress import TrainingProgress
from preference.reward_types import Judge, JudgeError, judge_all
from preference.types import Comparison
from supervised.rows import read_rows

Vote = Literal["first", "tie", "second"]
SHARED_FIELDS = ("original", "prompt", "goal")
Z_95 = 1.959964
STORIES_AT_ONCE = 64


# --- the two files ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contest:
    """One story that two models filled in."""

    prompt: str
    goal: str
    first: str
    second: str

    def comparison(self, swapped: bool) -> Comparison:
        stories = [self.prompt + middle + self.goal for middle in (self.first, self.second)]
        task = f"A story that begins with\n{self.prompt}\n\nand ends with\n{self.goal}"
        sides = [[Message(role="assistant", content=story)] for story in (stories[::-1] if swapped else stories)]
        return Comparison([Message(role="user", content=task)], *sides)


def read_contests(first: str, second: str) -> list[Contest]:
    """The lines {prompt, generated, goal, original} of both files, in pairs. DataError, with both
    places, if two lines are not about the same story.
    """
    first_rows, second_rows = read_rows(first), read_rows(second)
    contests = []
    for (where, fields), (other_where, other) in zip(first_rows, second_rows, strict=False):
        for place, row in ((where, fields), (other_where, other)):
            if wrong := [name for name in (*SHARED_FIELDS, "generated") if not isinstance(row.get(name), str)]:
                raise DataError(
                    f"{place}: no text in the field {wrong[0]!r}; the fields are {', '.join(map(repr, row))}"
                )
        if differing := [name for name in SHARED_FIELDS if fields[name] != other[name]]:
            name = differing[0]
            raise DataError(
                f"{where} and {other_where} are not about the same story: the field {name!r} is "
                f"{fields[name][:40]!r} in one and {other[name][:40]!r} in the other"
            )
        contests.append(Contest(fields["prompt"], fields["goal"], fields["generated"], other["generated"]))
    if len(first_rows) != len(second_rows):
        raise DataError(
            f"{first} has {len(first_rows):,} stories and {second} has {len(second_rows):,}: "
            "both models must infill the same stories"
        )
    return contests


# --- votes --------------------------------------------------------------------------------------


class Votes:
    """Votes of a judge, cached in a file by hash of `judge_name` and the whole comparison. A failed
    vote, or an answer that is no judgement, is a JudgeError, never a tie; the next run repeats it.
    """

    def __init__(self, judge: Judge, judge_name: str, cache: Path, seed: int = 0):
        self.judge, self.judge_name, self.cache, self.seed = judge, judge_name, cache, seed
        cache.parent.mkdir(parents=True, exist_ok=True)
        drop_torn_line(cache)
        self.known: dict[str, float] = {line["key"]: line["score"] for line in read_jsonl(cache)}
        self.num_new = 0

    def swapped(self, story: int, vote: int) -> bool:
        """Whether the second model's story is shown first; drawn from (seed, story, vote)."""
        return bool(np.random.default_rng([self.seed, story, vote]).integers(2))

    async def __call__(self, contest: Contest, story: int, vote: int) -> Vote:
        """JudgeError if the judge fails."""
        swapped = self.swapped(story, vote)
        key = self._key(comparison := contest.comparison(swapped), vote)
        if key not in self.known:
            self.num_new += 1
            (score,) = await judge_all(self.judge, [comparison])
            self.known[key] = float(score)
            append_jsonl(self.cache, {"key": key, "score": self.known[key]})
        score = -self.known[key] if swapped else self.known[key]
        return "second" if score > 0 else "first" if score < 0 else "tie"

    def _key(self, comparison: Comparison, vote: int) -> str:
        sides = (comparison.prompt_conversation, comparison.completion_A, comparison.completion_B)
        question = json.dumps([self.judge_name, [side[0]["content"] for side in sides], vote])
        return hashlib.sha256(question.encode()).hexdigest()[:32]


async def collect_votes(contests: Sequence[Contest], votes: Votes, num_judges: int) -> list[list[Vote | JudgeError]]:
    """`num_judges` votes on each story; a JudgeError in place of a failed vote."""
    collected: list[list[Vote | JudgeError]] = []
    with TrainingProgress(len(contests), description="judging") as progress:
        for start in range(0, len(contests), STORIES_AT_ONCE):
            batch = list(enumerate(contests))[start : start + STORIES_AT_ONCE]
            coroutines = [votes(contest, story, vote) for story, contest in batch for vote in range(num_judges)]
            answers = await asyncio.gather(*coroutines, return_exceptions=True)
            for answer in answers:
                if isinstance(answer, BaseException) and not isinstance(answer, JudgeError):
                    raise answer
            collected += [answers[i : i + num_judges] for i in range(0, len(answers), num_judges)]  # type: ignore[misc]
            progress.update(len(collected) - 1)
    return collected


# --- verdict ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """`histogram`: number of stories with all votes, by "first_tie_second" ("2_0_1");
    `won_by_first` counts a tie as half.
    """

    stories: int
    won_by_first: float
    low: float
    high: float
    first: int
    tie: int
    second: int
    failed: int
    incomplete_stories: int
    histogram: dict[str, int]
    # of the votes that are no ties: 0.5 if the judge has no position bias
    shown_first_share: float | None


def verdict(collected: Sequence[Sequence[Vote | JudgeError]], votes: Votes) -> Verdict:
    """JudgeError if no story has a vote."""
    cast = [[vote for vote in of_story if not isinstance(vote, JudgeError)] for of_story in collected]
    shares = [(of_story.count("first") + of_story.count("tie") / 2) / len(of_story) for of_story in cast if of_story]
    if not shares:
        error = next((vote for of_story in collected for vote in of_story if isinstance(vote, JudgeError)), None)
        raise JudgeError(f"the judge failed on every story: {error}") from error
    total, num_judges = Counter(itertools.chain(*cast)), len(collected[0])
    keys = [f"{a}_{num_judges - a - b}_{b}" for a in range(num_judges, -1, -1) for b in range(num_judges - a + 1)]
    histogram = dict.fromkeys(keys, 0)
    for of_story in cast:
        if len(of_story) == num_judges:
            histogram[f"{of_story.count('first')}_{of_story.count('tie')}_{of_story.count('second')}"] += 1
    shown_first = [
        (vote == "second") == votes.swapped(story, number)
        for story, of_story in enumerate(collected)
        for number, vote in enumerate(of_story)
        if vote in ("first", "second")
    ]
    mean = float(np.mean(shares))
    return Verdict(
        stories=len(shares),
        won_by_first=mean,
        **dict(zip(("low", "high"), wilson_interval(mean, len(shares)), strict=True)),
        **{name: total[name] for name in ("first", "tie", "second")},
        failed=sum(isinstance(vote, JudgeError) for of_story in collected for vote in of_story),
        incomplete_stories=sum(len(of_story) < num_judges for of_story in cast),
        histogram=histogram,
        shown_first_share=float(np.mean(shown_first)) if shown_first else None,
    )


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share of n, at 95%."""
    z = Z_95
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * float(np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)))
    return max(0.0, centre - half), min(1.0, centre + half)
