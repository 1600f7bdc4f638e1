"""What a round is trained on: of each query's candidates the best distinct ones above the
threshold, up to a quota.

The quota is one number for all queries, the smallest at which the set reaches its target size (the
set is not trimmed to it), or is given. Duplicates go before they are counted against it; in the
original they eat places. Only candidates that ended by themselves, with an answer that can be read,
are selected. Equal rewards are ordered by a hash of the text, so that no kind of solution is
preferred, and neither the order of the candidates nor their numbers change what is selected. Left
out: balancing between kinds of queries.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from posttrain.backend.errors import ConfigError, DataError
from recipes.bstar.balance import Counts
from recipes.bstar.records import Candidate, Selected

HUMAN_REWARD = 1.0  # of a human solution, as in the original


def select(
    candidates: Sequence[Candidate],
    queries: Sequence[str],
    threshold: float | str,
    target_size: int,
    quota: int | None = None,
    human: Mapping[str, str] | None = None,
) -> dict[str, list[Selected]]:
    """For each id in `queries`, also those without candidates, the selected ones, best first.
    `human`: solutions by id, to compete with them.

    `quota` overrides the target size. DataError for candidates without a reward or of other
    queries.
    """
    if target_size < 1 or (quota is not None and quota < 1):
        raise ConfigError(f"target_size={target_size} and quota={quota}: at least 1")
    human = human or {}
    pool: dict[str, dict[str, Selected]] = {query: {} for query in queries}
    for query, text in human.items():
        if query in pool:
            pool[query][text] = Selected(query, None, HUMAN_REWARD, True, text)
    for candidate in candidates:
        if candidate.query not in pool or candidate.reward is None:
            what = "has no reward" if candidate.query in pool else "is of a query that was not asked for"
            raise DataError(f"candidate {candidate.key} {what}")
        if candidate.stop == "stop" and candidate.answer is not None:
            _keep_better(pool[candidate.query], candidate, candidate.reward)
    kept = {query: _ranked(found.values(), float(threshold)) for query, found in pool.items()}
    places = quota or _smallest_quota([len(ranked) for ranked in kept.values()], target_size)
    return {query: ranked[:places] for query, ranked in kept.items()}


def shortfall(selection: Iterable[Sequence[Selected]], target_size: int) -> int:
    """How many fewer were selected than wanted: distinct candidates above the threshold were too
    few.
    """
    return max(0, target_size - sum(map(len, selection)))


def counts(selection: Mapping[str, Sequence[Selected]]) -> list[Counts]:
    """(selected, right among them) of each query, human solutions left out: what the balance score
    is made of.
    """
    sampled = [[one for one in chosen if one.sample is not None] for chosen in selection.values()]
    return [(len(chosen), sum(one.correct for one in chosen)) for chosen in sampled]


def _keep_better(found: dict[str, Selected], candidate: Candidate, reward: float) -> None:
    """Of equal texts (which may be tokenized otherwise, and so scored) the better; of those equally
    good the first sample.
    """
    new = Selected(candidate.query, candidate.sample, reward, candidate.correct, candidate.text)
    old = found.get(candidate.text)
    if old is None or (old.sample is not None and (-new.reward, candidate.sample) < (-old.reward, old.sample)):
        found[candidate.text] = new


def _ranked(selected: Iterable[Selected], threshold: float) -> list[Selected]:
    above = [one for one in selected if one.reward > threshold]
    return sorted(above, key=lambda one: (-one.reward, hashlib.sha256(f"{one.query}\0{one.text}".encode()).digest()))


def _smallest_quota(sizes_M: Sequence[int], target_size: int) -> int:
    """The smallest c with sum_i min(c, size_i) >= target_size; all of them where there are not so
    many.
    """
    largest = max(sizes_M, default=1)
    return next((c for c in range(1, largest) if sum(min(c, size) for size in sizes_M) >= target_size), max(largest, 1))
