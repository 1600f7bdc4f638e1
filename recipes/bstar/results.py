"""The numbers of a finished run that `make evidence` reads: RUN/results.json.

METHOD: greedy, pass@1, ...     on the test set, after the last round
bstar - METHOD: pass@1, ...     what B-STaR has more, at the same seed
warm start: pass@1, ...         before round 1
reward: ...                     what the reward model's part tells apart in the warm start's test samples
"""

import math
from pathlib import Path

from recipes.bstar.metrics import auc, model_part
from recipes.bstar.pictures import samples_of, value
from recipes.bstar.records import Summary, read_candidates
from recipes.bstar.report import read_methods
from recipes.bstar.sums import sum_of
from recipes.bstar.tasks import Task


def final_numbers(run: Path, task: Task) -> dict[str, float]:
    rounds = read_methods(run)
    start = next(iter(rounds.values()))[0]
    wide = [f"pass@{samples_of([start])}-{distinct}" for distinct in (4, 8)]
    tests = {key: f"test/{key}" for key in ("greedy", "pass@1", *wide, "diversity")}
    keys = tests | {"training set right": "train/selected_accuracy", "temperature": "temperature"}
    numbers = {f"warm start: {name}": value(start, key) for name, key in tests.items()}
    for method, summaries in rounds.items():
        numbers |= {f"{method}: {name}": value(summaries[-1], key) for name, key in keys.items()}
        numbers[f"{method}: temperature, round 1"] = value(summaries[1], "temperature")
        if method != "bstar" and "bstar" in rounds:
            numbers |= {
                f"bstar - {method}: {name}": difference(rounds["bstar"], summaries, key) for name, key in tests.items()
            }
    known = {name: number for name, number in numbers.items() if not math.isnan(number)}
    return known | what_the_reward_knows(run, task)


def difference(rounds: list[Summary], others: list[Summary], key: str) -> float:
    """Of the last rounds."""
    return value(rounds[-1], key) - value(others[-1], key)


def what_the_reward_knows(run: Path, task: Task) -> dict[str, float]:
    """AUCs of the reward without its outcome term: right answers over wrong ones, and where the task
    can tell, valid derivations over invalid ones, whatever their answers."""
    queries, candidates = {query.problem.id: query for query in task.test}, read_candidates(run / "round_00/test.jsonl")
    scores = [model_part(candidate) for candidate in candidates]
    found = {"reward: AUC, right answers over wrong ones": auc(scores, [candidate.correct for candidate in candidates])}
    sums = [sum_of(queries[candidate.query]) for candidate in candidates]
    valid = [total.valid(candidate.text) for total, candidate in zip(sums, candidates, strict=True) if total]
    if len(valid) == len(candidates):
        found["reward: AUC, valid derivations over others"] = auc(scores, valid)
        found["warm start: valid derivations"] = sum(valid) / len(valid)
    return found
