"""The training set of a round: each query's best distinct candidates above the threshold, up to a
quota.

Unless given, the quota is the smallest, same for all queries, that reaches the target size.
Truncated and unparsable candidates are never selected. Unlike the original, duplicates do not count
against the quota. Ties are broken by a hash of the text, so the order of candidates is irrelevant.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from posttrain.backend.errors import DataError
from recipes.bstar.balance import Counts
from recipes.bstar.records import Candidate, Selected

HUMAN_REWARD = 1.0  # as in the original


def select(
    candidates: Sequence[Candidate],
    queries: Sequence[str],
    threshold: float | str,
    target_size: int,
    quota: int | None = None,
    human: Mapping[str, str] | None = None,
) -> dict[str, list[Selected]]:
    """For each id in `queries`, also those without candidates, the selection, best first.

    `human`: id -> human solution, which competes with the candidates. `quota` overrides
    `target_size`. DataError for candidates without a reward or of other queries.
    """
    human = human or {}
    pool: dict[str, dict[str, Selected]] = {query: {} for query in queries}
    for query, text in human.items():
        if query in pool:
            pool[query][text] = Selected(query, None, HUMAN_REWARD, True, text)
    for candidate in candidates:
        if candidate.query not in pool or candidate.reward is None:
            fault = "has no reward" if candidate.query in pool else "is of an unknown query"
            raise DataError(f"candidate {candidate.key} {fault}")
        if candidate.stop == "stop" and candidate.answer is not None:
            _keep_better(pool[candidate.query], candidate, candidate.reward)
    kept = {query: _ranked(by_text.values(), float(threshold)) for query, by_text in pool.items()}
    places = quota or _smallest_quota([len(ranked) for ranked in kept.values()], target_size)
    return {query: ranked[:places] for query, ranked in kept.items()}


def shortfall(selection: Iterable[Sequence[Selected]], target_size: int) -> int:
    """How far the selection is below `target_size`; 0 if it reaches it."""
    return max(0, target_size - sum(map(len, selection)))


def counts(selection: Mapping[str, Sequence[Selected]]) -> list[Counts]:
    """(selected, right among them) of each query, without human solutions."""
    sampled = [[line for line in chosen if line.sample is not None] for chosen in selection.values()]
    return [(len(chosen), sum(line.correct for line in chosen)) for chosen in sampled]


def _keep_better(by_text: dict[str, Selected], candidate: Candidate, reward: float) -> None:
    """Of equal texts keeps the higher reward (tokens may differ), then the first sample."""
    new = Selected(candidate.query, candidate.sample, reward, candidate.correct, candidate.text)
    old = by_text.get(candidate.text)
    if old is None or (old.sample is not None and (-new.reward, candidate.sample) < (-old.reward, old.sample)):
        by_text[candidate.text] = new


def _ranked(selected: Iterable[Selected], threshold: float) -> list[Selected]:
    above = [line for line in selected if line.reward > threshold]
    return sorted(above, key=lambda s: (-s.reward, hashlib.sha256(f"{s.query}\0{s.text}".encode()).digest()))


def _smallest_quota(sizes_M: Sequence[int], target_size: int) -> int:
    """The smallest c with sum_i min(c, size_i) >= target_size, or the largest size if none."""
    largest = max(sizes_M, default=1)
    return next((c for c in range(1, largest) if sum(min(c, size) for size in sizes_M) >= target_size), max(largest, 1))
