"""The metrics of a round (B-STaR, section 3.2), from K samples of each query:

    pass@k       unbiased estimate of P(at least one of k is right)           exploration; accuracy at k = 1
    pass@K-S     share of queries with at least S distinct right samples      exploration
    reward@K-S   share of queries whose S best samples are all right          exploitation
    diversity    distinct steps / steps of a query's samples, mean over queries
    auc          how often a right sample is above a wrong one (of any query)  what the reward model knows

"Best" is by the reward without its outcome term; a reward with no other term has no reward@K-S. The
original's diversity counts equations instead of steps.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from posttrain.backend.errors import DataError
from posttrain.tracking.metrics_log import Metrics
from preference.steps import StepFormat
from recipes.bstar.records import Candidate, Selected
from rl.sample_metrics import pass_at_k


def sample_metrics(candidates: Sequence[Candidate], queries: Sequence[str], form: StepFormat) -> Metrics:
    """Metrics by name: pass@1, pass@16-4, reward@16-4, diversity, truncated, unparsable, tokens,
    ...

    DataError unless all queries have the same number of samples.
    """
    groups = grouped(candidates, queries)
    k_all = len(groups[0])
    if not k_all or any(len(group) != k_all for group in groups):
        raise DataError(
            f"{min(map(len, groups))} to {max(map(len, groups))} samples per query: all queries need the same number"
        )
    right_M = [sum(candidate.correct for candidate in group) for group in groups]
    distinct_M = np.array([len({candidate.text for candidate in group if candidate.correct}) for group in groups])
    powers = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < k_all]
    metrics = {f"pass@{k}": float(np.mean([pass_at_k(right, k_all, k) for right in right_M])) for k in [*powers, k_all]}
    metrics |= {f"pass@{k_all}-{s}": float(np.mean(distinct_M >= s)) for s in powers if s > 1}
    metrics["distinct_right"] = float(distinct_M.mean())
    metrics["diversity"] = float(
        np.mean([diversity([candidate.text for candidate in group], form) for group in groups])
    )
    everything = [candidate for group in groups for candidate in group]
    metrics["truncated"] = float(np.mean([candidate.stop == "length" for candidate in everything]))
    metrics["unparsable"] = float(
        np.mean([candidate.stop == "stop" and candidate.answer is None for candidate in everything])
    )
    metrics["tokens"] = float(np.mean([len(candidate.tokens) for candidate in everything]))
    ranked = [sorted(group, key=_rank) for group in groups]
    if any(model_part(candidate) for candidate in everything):
        metrics |= {
            f"reward@{k_all}-{s}": float(np.mean([all(c.correct for c in r[:s]) for r in ranked])) for s in powers
        }
        metrics["auc"] = auc([model_part(c) for c in everything], [c.correct for c in everything])
    return metrics


def auc(scores_N: Sequence[float], positive_N: Sequence[bool]) -> float:
    """P(a positive has the higher score than a negative), where equal scores count one half; 1/2
    without positives or without negatives."""
    positive = np.array(positive_N, dtype=bool)
    above, others = np.array(scores_N)[positive], np.sort(np.array(scores_N)[~positive])
    if not len(above) or not len(others):
        return 0.5
    below, up_to = (np.searchsorted(others, above, side=side) for side in ("left", "right"))
    return float(np.mean(below + up_to) / (2 * len(others)))


def selection_metrics(selection: Sequence[Sequence[Selected]]) -> Metrics:
    """Size, query coverage, largest group and accuracy of the training set."""
    selected = [line for chosen in selection for line in chosen]
    return {
        "selected": float(len(selected)),
        "selected_queries": float(np.mean([bool(chosen) for chosen in selection])),
        "selected_quota": float(max(len(chosen) for chosen in selection)),
        "selected_accuracy": float(np.mean([line.correct for line in selected])) if selected else 0.0,
    }


def diversity(texts: Sequence[str], form: StepFormat) -> float:
    """Distinct steps / steps, over the solutions of one query; 0 without steps."""
    steps = [step for text in texts for step in form.strings(text)]
    return len(set(steps)) / len(steps) if steps else 0.0


def grouped(candidates: Sequence[Candidate], queries: Sequence[str]) -> list[list[Candidate]]:
    """The candidates of each query, in the order of `queries`."""
    groups: dict[str, list[Candidate]] = {query: [] for query in queries}
    for candidate in candidates:
        if candidate.query not in groups:
            raise DataError(f"candidate {candidate.key} is of an unknown query")
        groups[candidate.query].append(candidate)
    return list(groups.values())


def model_part(candidate: Candidate) -> float:
    """The reward without its outcome term."""
    return 0.0 if candidate.reward is None else candidate.reward - float(candidate.correct)


def _rank(candidate: Candidate) -> tuple[float, bytes]:
    return -model_part(candidate), hashlib.sha256(candidate.text.encode()).digest()
