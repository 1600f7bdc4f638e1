"""Compares two models' infills of the same stories with a judge: votes, win rate, histogram.

    python recipes/belief_state/judge.py first=bst.jsonl second=fim.jsonl  # by rule: fewer mistakes (stories.py)
    python recipes/belief_state/judge.py first=bst.jsonl second=fim.jsonl judge=endpoint \\
        judge.base_url=http://localhost:8000/v1 judge.model=NAME

The files are written by infill.py. From Python the judge may be any async callable.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import chz

from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, SEED, SHARE
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.renderers.types import Tokenizer
from posttrain.tracking.command_line import run_command
from posttrain.tracking.figures import COLORS, finish_axis, panel_axes, save_figure
from posttrain.tracking.jsonl import write_atomically, write_jsonl
from posttrain.tracking.run_config import log_path_field
from preference.judges import EndpointJudgeBuilder, RuleJudge
from preference.reward_types import Judge, JudgeBuilder, JudgeError
from recipes.belief_state.judge_votes import Contest, Verdict, Vote, Votes, collect_votes, read_contests, verdict
from recipes.belief_state.stories import mistakes

INSTRUCTION = (
    "You are comparing two short stories, A and B, written for small children. Both have the same beginning and the "
    "same end; their authors wrote the middle. Look at plot, language and sense: say what is good and what is bad "
    "about each, argue for the better one, then decide. The better story is the one whose middle leads from the "
    "beginning to the end with the fewest abrupt transitions. End with a line that holds one word: A, B or Tie."
)


# --- judges -------------------------------------------------------------------------------------


@chz.chz
class FewerMistakesBuilder(JudgeBuilder):
    """The story with fewer mistakes is better: exact for the stories of stories.py only."""

    def __call__(self, tokenizer: Tokenizer) -> Judge:
        return RuleJudge(lambda comparison, story: -float(len(mistakes(story))))


@chz.chz
class StoryEndpointBuilder(EndpointJudgeBuilder):
    """A model served by an endpoint. A custom instruction must ask for a last line A, B or Tie."""

    instruction: str = chz.field(default=INSTRUCTION, doc="instruction to the judge")


# --- the command --------------------------------------------------------------------------------


@chz.chz
class Config:
    """Judges two files of infilled stories against each other."""

    first: str = chz.field(doc="JSONL file of the first model")
    second: str = chz.field(doc="JSONL file of the second model: the same stories in the same order")
    first_name: str | None = chz.field(default=None, doc="name of the first model; None = the file's name")
    second_name: str | None = chz.field(default=None, doc="name of the second model; None = the file's name")
    judge: JudgeBuilder = chz.field(
        default_factory=FewerMistakesBuilder, doc="stories, endpoint, or module:Class of a JudgeBuilder"
    )
    num_judges: int = chz.field(default=3, validator=COUNT, doc="votes on each story")
    limit: int | None = chz.field(default=None, validator=COUNT, doc="judge only the first this many stories")
    seed: int = chz.field(default=42, validator=SEED, doc="of the order in which the two stories are shown")
    max_failed_fraction: float = chz.field(
        default=0.1, validator=SHARE, doc="a larger share of failed votes is an error"
    )
    out: str = log_path_field("runs/judge", "folder for verdict.json, votes.jsonl and histogram.png")
    cache: str | None = chz.field(
        default=None,
        munger=lambda _, path: path and str(Path(path).expanduser()),
        doc="file of the votes so far; None = OUT/cache.jsonl",
    )


JUDGES = {
    "judge": {
        "stories": "recipes.belief_state.judge:FewerMistakesBuilder",
        "endpoint": "recipes.belief_state.judge:StoryEndpointBuilder",
    }
}


async def judge_files(config: Config, judge: Judge | None = None, judge_name: str | None = None) -> Verdict:
    """`judge`: an async callable in place of the configured judge, with `judge_name` as its key in
    the cache.
    """
    if (judge is None) != (judge_name is None):
        raise ConfigError("give a judge and its name together: the cache keeps votes by the judge's name")
    contests = read_contests(config.first, config.second)[: config.limit]
    out = Path(config.out)
    settings = {
        key: value
        for key, value in chz.asdict(config.judge).items()
        if key not in ("timeout", "retries", "max_concurrent")
    }
    name = judge_name or json.dumps([type(config.judge).__name__, settings], default=str, sort_keys=True)
    cache = Path(config.cache or out / "cache.jsonl")
    votes = Votes(judge or config.judge(load_tokenizer("tiny")), name, cache, config.seed)
    collected = await collect_votes(contests, votes, config.num_judges)
    result = verdict(collected, votes)
    if result.failed > config.max_failed_fraction * len(contests) * config.num_judges:
        error = next(vote for of_story in collected for vote in of_story if isinstance(vote, JudgeError))
        raise JudgeError(
            f"{result.failed} of {len(contests) * config.num_judges} votes failed "
            f"(max_failed_fraction={config.max_failed_fraction}); the other votes are kept in {cache}. The first "
            f"error: {error}"
        ) from error
    names = (config.first_name or Path(config.first).stem, config.second_name or Path(config.second).stem)
    _write(out, config, names, contests, collected, result)
    print(_table(names, result), f"{votes.num_new} new votes; results in {out}", sep="\n")
    return result


def draw_histogram(result: Verdict, names: tuple[str, str], path: Path) -> Path:
    """Number of stories by votes, from all for the first model to all for the second."""
    title = f"{names[0]} wins {result.won_by_first:.1%} against {names[1]} (95%: {result.low:.1%} to {result.high:.1%})"
    figure, (axis,) = panel_axes(1, title, size=(7.5, 2.8))
    margins = [int(key.split("_")[0]) - int(key.split("_")[2]) for key in result.histogram]
    colors = [COLORS[0] if margin > 0 else COLORS[1] if margin < 0 else COLORS[7] for margin in margins]
    order = sorted(range(len(margins)), key=lambda i: -margins[i])
    labels, counts = list(result.histogram), list(result.histogram.values())
    bars = axis.bar([labels[i] for i in order], [counts[i] for i in order], color=[colors[i] for i in order])
    axis.bar_label(bars, fontsize=8)
    finish_axis(axis, "", xlabel=f"votes for {names[0]} _ ties _ votes for {names[1]}", integer=False)
    axis.set_ylabel("stories", fontsize=8)
    return save_figure(figure, path)


def _write(
    out: Path,
    config: Config,
    names: tuple[str, str],
    contests: Sequence[Contest],
    collected: Sequence[Sequence[Vote | JudgeError]],
    result: Verdict,
) -> None:
    record = {"first": names[0], "second": names[1], "num_judges": config.num_judges, "seed": config.seed}
    write_atomically(out / "verdict.json", json.dumps(record | asdict(result), indent=2) + "\n")
    lines = [
        asdict(contest) | {"votes": [str(vote) for vote in votes]}
        for contest, votes in zip(contests, collected, strict=True)
    ]
    write_jsonl(out / "votes.jsonl", lines)
    draw_histogram(result, names, out / "histogram.png")


def _table(names: tuple[str, str], result: Verdict) -> str:
    votes = f"votes: {result.first} for {names[0]}, {result.tie} ties, {result.second} for {names[1]}, {result.failed} failed"
    wins = (
        f"{names[0]} wins {result.won_by_first:.1%} of {result.stories} stories, ties half (95%: "
        f"{result.low:.1%} to {result.high:.1%})"
    )
    return f"{votes}\n{wins}"


async def main(config: Config) -> None:
    await judge_files(config)


if __name__ == "__main__":
    run_command(main, Config, JUDGES)
