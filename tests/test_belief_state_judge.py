"""Votes on infilled stories: read in lock-step, both orders, failures counted, the tally by
hand.
"""

import asyncio
import json
import re
from pathlib import Path

import chz
import numpy as np
import pytest

from posttrain.backend.errors import ConfigError, DataError
from posttrain.tracking.jsonl import read_jsonl
from preference.reward_types import JudgeError
from preference.types import Comparison
from recipes.belief_state.judge import INSTRUCTION, Config, StoryEndpointBuilder, judge_files
from recipes.belief_state.judge_votes import Votes, read_contests, verdict, wilson_interval
from recipes.belief_state.stories import generate
from tests import jsonl_files
from tests.test_pairwise import Endpoint, endpoint  # noqa: F401


def write(path: Path, middles: list[str], **changes: str) -> str:
    lines = [
        {"prompt": f"{i}: ", "goal": ".", "original": f"story {i}", "generated": m} | changes
        for i, m in enumerate(middles)
    ]
    return jsonl_files.write(path, *lines)


def config(tmp_path: Path, first: list[str], second: list[str], **options) -> Config:
    paths = [write(tmp_path / f"{name}.jsonl", middles) for name, middles in (("first", first), ("second", second))]
    return Config(first=paths[0], second=paths[1], out=str(tmp_path / "out"), **options)


async def longer(comparison: Comparison) -> float:
    a, b = (len(side[0]["content"]) for side in (comparison.completion_A, comparison.completion_B))
    return float(np.sign(b - a))


@pytest.mark.usefixtures("rendered")
def test_a_tally_by_hand(tmp_path):
    """Votes fall by length whatever the order: aa beats b, cc and dd tie, e loses."""
    found = asyncio.run(judge_files(config(tmp_path, ["aa", "cc", "e"], ["b", "dd", "ffff"]), longer, "longer"))
    assert (found.first, found.tie, found.second, found.failed) == (3, 3, 3, 0)
    counts = {key: count for key, count in found.histogram.items() if count}
    assert counts == {"3_0_0": 1, "0_3_0": 1, "0_0_3": 1} and len(found.histogram) == 10
    assert found.won_by_first == pytest.approx(0.5) and (found.low, found.high) == pytest.approx(
        wilson_interval(0.5, 3)
    )
    lines = read_jsonl(tmp_path / "out" / "votes.jsonl")
    assert [line["votes"] for line in lines] == [["first"] * 3, ["tie"] * 3, ["second"] * 3]
    assert json.loads((tmp_path / "out" / "verdict.json").read_text())["won_by_first"] == pytest.approx(0.5)
    assert (tmp_path / "out" / "histogram.png").stat().st_size > 1000
    other = asyncio.run(judge_files(config(tmp_path, ["b", "dd", "ffff"], ["aa", "cc", "e"], seed=5), longer, "longer"))
    # the files exchanged
    assert other.won_by_first == pytest.approx(0.5) and other.histogram["3_0_0"] == 1


def test_the_interval_by_hand():
    assert wilson_interval(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    low, high = wilson_interval(1.0, 10)  # no width of 0 where all ten won: z^2 / (n + z^2) below
    assert high == pytest.approx(1.0) and low == pytest.approx(10 / (10 + 1.959964**2))


# Trap: a judge that likes a side.
def test_a_judge_that_likes_a_side_wins_nobody_anything(tmp_path):
    async def left(comparison: Comparison) -> float:
        return -1.0

    found = asyncio.run(judge_files(config(tmp_path, ["x"] * 300, ["y"] * 300), left, "left"))
    assert found.shown_first_share == 1.0 and found.low < 0.5 < found.high
    votes = Votes(left, "left", tmp_path / "other.jsonl", seed=1)
    order = [votes.swapped(story, vote) for story in range(50) for vote in range(3)]
    assert order == [
        Votes(left, "left", tmp_path / "other.jsonl", seed=1).swapped(s, v) for s in range(50) for v in range(3)
    ]
    assert 50 < sum(order) < 100


# Trap: a failed vote counted as a tie.
def test_votes_are_kept_by_content_and_failures_are_asked_again(tmp_path):
    asked: list[str] = []

    async def flaky(comparison: Comparison) -> float:
        asked.append(comparison.completion_A[0]["content"])
        if len(asked) == 2:
            raise JudgeError("not understood")
        return await longer(comparison)

    options = config(tmp_path, ["aa", "bb"], ["c", "d"], max_failed_fraction=0.5)
    found = asyncio.run(judge_files(options, flaky, "flaky"))
    # a failure is no tie
    assert (found.first, found.tie, found.failed, found.incomplete_stories) == (5, 0, 1, 1)
    assert found.won_by_first == 1.0 and sum(found.histogram.values()) == 1 and len(asked) == 6
    assert asyncio.run(judge_files(options, flaky, "flaky")).failed == 0 and len(asked) == 7  # only what failed
    asyncio.run(judge_files(options, flaky, "another"))
    assert len(asked) == 13
    asyncio.run(judge_files(config(tmp_path, ["aa", "changed"], ["c", "d"]), flaky, "flaky"))
    assert len(asked) == 16

    async def broken(comparison: Comparison) -> float:
        return 2.0

    with pytest.raises(JudgeError, match=r"failed on every story: the judge answered 2.0"):
        asyncio.run(judge_files(options, broken, "broken"))
    asked.clear()
    with pytest.raises(JudgeError, match=r"1 of 6 votes failed .*not understood"):
        asyncio.run(
            judge_files(
                chz.replace(options, max_failed_fraction=0.1, cache=str(tmp_path / "new.jsonl")), flaky, "flaky"
            )
        )
    with pytest.raises(ConfigError, match="its name together"):
        asyncio.run(judge_files(options, longer))


def test_files_that_do_not_belong_together_are_refused_with_both_lines(tmp_path):
    first = write(tmp_path / "a.jsonl", ["x", "y"])
    with pytest.raises(DataError, match=r"a.jsonl:1 and .*b.jsonl:1 are not about the same story: the field 'goal'"):
        read_contests(first, write(tmp_path / "b.jsonl", ["x", "y"], goal="!"))
    with pytest.raises(DataError, match="has 2 stories and .* has 1"):
        read_contests(first, write(tmp_path / "b.jsonl", ["x"]))
    (tmp_path / "c.jsonl").write_text(Path(first).read_text().replace('"generated": "y"', '"generated": null'))
    with pytest.raises(DataError, match=r"c.jsonl:2: no text in the field 'generated'"):
        read_contests(first, str(tmp_path / "c.jsonl"))
    with pytest.raises(JudgeError, match="failed on every story"):
        verdict([[JudgeError("down")]], Votes(longer, "longer", tmp_path / "cache.jsonl"))


def test_the_rule_finds_the_story_that_makes_sense(tmp_path):
    told, other = generate(20, seed=0), generate(20, seed=1)
    cut, files = [(story[:200], story[200:400], story[400:]) for story in told], {}
    for name, middles in (("right", [parts[1] for parts in cut]), ("wrong", [story[200:400] for story in other])):
        lines = [
            {"prompt": prompt, "generated": middle, "goal": goal, "original": story}
            for (prompt, _, goal), middle, story in zip(cut, middles, told, strict=True)
        ]
        files[name] = jsonl_files.write(tmp_path / f"{name}.jsonl", *lines)
    settings = Config(first=files["wrong"], second=files["right"], num_judges=1, out=str(tmp_path / "out"))
    found = asyncio.run(judge_files(settings))
    assert (found.first, found.tie, found.second) == (0, 0, 20) and found.high < 0.2


def test_an_endpoint_is_asked_in_both_orders_and_garbage_is_no_vote(tmp_path, endpoint: Endpoint):  # noqa: F811
    judge = StoryEndpointBuilder(base_url=endpoint.url, model="m", retries=0, timeout=600.0, max_concurrent=1)
    endpoint.replies = ["Both are fine.\nA"]
    options = config(tmp_path, ["left"] * 4, ["right"] * 4, judge=judge)
    found = asyncio.run(judge_files(options))
    shown = [request["messages"][0]["content"] for request in endpoint.requests]
    assert len(shown) == 12 and all(text.startswith(INSTRUCTION) for text in shown)
    firsts = [re.search(r"\[A\]\n\d: (\w+)", text)[1] for text in shown]  # type: ignore[index]
    assert (
        found.first == firsts.count("left") and found.second == firsts.count("right") and found.first * found.second > 0
    )
    endpoint.replies = ["I cannot say."]
    with pytest.raises(JudgeError, match="not with A, B or Tie"):
        asyncio.run(judge_files(chz.replace(options, seed=7, cache=str(tmp_path / "fresh.jsonl"))))
    assert asyncio.run(longer(read_contests(options.first, options.second)[0].comparison(swapped=False))) == 1.0
