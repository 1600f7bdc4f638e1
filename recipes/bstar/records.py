"""The records that the stages write and the reports read.

    RUN/METHOD/round_03/sweep.jsonl           Candidates: the dev subset at every temperature of the grid
                        choice.json           Choice: balance scores, chosen temperature and threshold
                        samples.jsonl         Candidates: all training queries at that temperature
                        selection.jsonl       Selected: the training set
                        test.jsonl            Candidates: the test queries, `eval_samples` each
                        greedy.jsonl          Candidates: the test queries, greedy, one each
                        summary.json          Summary: the round's metrics
    RUN/round_00 has only the evaluation of the warm start. NAME_scores.jsonl has the scores of
    NAME.jsonl.

Temperatures and thresholds are canonical decimals as text ("0.5", never "0.50"), usable as keys.
Files appear complete: unfinished ones have other names.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from posttrain.backend.errors import DataError
from posttrain.backend.types import StopReason
from posttrain.tracking.jsonl import as_dataclass, read_dataclasses, read_jsonl, write_atomically, write_jsonl
from posttrain.tracking.settings import read_settings


@dataclass(frozen=True)
class Candidate:
    """A sampled solution. `answer` is None if it has none; `sample` counts from 0 within a query
    and temperature. `step_scores` are the process reward model's logits, one per step.
    """

    query: str
    sample: int
    temperature: str
    text: str
    tokens: list[int]
    answer: str | None
    correct: bool
    stop: StopReason
    step_scores: list[float] | None = None
    reward: float | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        return self.query, self.temperature, self.sample


@dataclass(frozen=True)
class Selected:
    """An example of a round's training set. `sample` is None for a human solution."""

    query: str
    sample: int | None
    reward: float
    correct: bool
    text: str


@dataclass(frozen=True)
class Cell:
    temperature: str
    threshold: str
    score: float


@dataclass(frozen=True)
class Choice:
    temperature: str
    threshold: str
    score: float | None  # None if both are fixed
    surface: list[Cell]


@dataclass(frozen=True)
class Summary:
    """A round in numbers. `metrics` are train/... and test/... (metrics.py); `seconds` and `tokens`
    (sampled or trained on) are by stage.
    """

    round: int
    temperature: str | None = None
    threshold: str | None = None
    balance: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)


def candidate_line(candidate: Candidate) -> str:
    """A JSON line without the scores, which have a file of their own."""
    fields = {key: value for key, value in asdict(candidate).items() if key not in ("step_scores", "reward")}
    return json.dumps(fields, ensure_ascii=False) + "\n"


def scores_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}_scores.jsonl")


def write_scores(path: Path, candidates: Sequence[Candidate]) -> None:
    """Writes the scores next to the candidates at `path`, in the same order."""
    names = ("query", "temperature", "sample", "reward", "step_scores")
    write_jsonl(scores_path(path), ({name: getattr(candidate, name) for name in names} for candidate in candidates))


def read_candidates(path: Path) -> list[Candidate]:
    """Candidates with their scores, if scored. DataError if the scores are of other candidates."""
    candidates = read_dataclasses(path, Candidate)
    if not scores_path(path).exists():
        return candidates
    scores = read_jsonl(scores_path(path))
    if [c.key for c in candidates] != [
        (line.get("query"), line.get("temperature"), line.get("sample")) for line in scores
    ]:
        raise DataError(f"{scores_path(path)} holds the scores of other candidates than {path.name}: delete it")
    return [
        replace(candidate, reward=line.get("reward"), step_scores=line.get("step_scores"))
        for candidate, line in zip(candidates, scores, strict=True)
    ]


def write_selection(path: Path, selected: Sequence[Selected]) -> None:
    write_jsonl(path, selected)


def read_selection(path: Path) -> list[Selected]:
    return read_dataclasses(path, Selected)


def write_choice(path: Path, choice: Choice) -> None:
    write_atomically(path, json.dumps(asdict(choice), indent=1) + "\n")


def read_choice(path: Path) -> Choice:
    choice = as_dataclass(read_settings(path), Choice, str(path))
    return replace(choice, surface=[as_dataclass(cell, Cell, str(path)) for cell in choice.surface])


def write_summary(path: Path, summary: Summary) -> None:
    write_atomically(path, json.dumps(asdict(summary), indent=1) + "\n")


def read_summaries(method_folder: Path) -> list[Summary]:
    """Summaries of the finished rounds, in order; round 0 is the warm start."""
    files = sorted(method_folder.glob("round_*/summary.json"))
    return [as_dataclass(read_settings(file), Summary, str(file)) for file in files]
