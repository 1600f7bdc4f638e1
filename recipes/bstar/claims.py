"""Tests four claims of the paper about B-STaR and online RFT with fixed settings, on every seed.

    python -m recipes.bstar.claims runs/bstar runs/bstar_1 runs/bstar_2

    (a) pass@K-4: the cold run ends below its best round, B-STaR no lower than after round 1.
    (b) B-STaR ends above the better of the fixed runs, in greedy accuracy and in pass@1.
    (c) After the middle round B-STaR still gains, and more than online RFT.
    (d) The chosen temperature ends above its first value; the balance score never falls by more than `NOISE`.

Left out: significance tests, for which three seeds are too few.
"""

from collections.abc import Sequence
from pathlib import Path

from posttrain.backend.errors import DataError
from posttrain.tracking.command_line import run_on_folders
from recipes.bstar.pictures import samples_of, value
from recipes.bstar.records import Summary, read_summaries

STATIC = ("online_rft", "online_rft_cold")
NOISE = 0.02


def claims(run: Path) -> dict[str, tuple[bool, str]]:
    """Claim -> whether it holds in this run, and the figures. DataError if a method is missing."""
    rounds = {name: read_summaries(run / name) for name in ("bstar", *STATIC)}
    if short := [name for name, summaries in rounds.items() if len(summaries) < 3]:
        raise DataError(f"{run}: {', '.join(short)} has fewer than two finished rounds")
    wide = f"test/pass@{samples_of(rounds['bstar'])}-4"
    line = {
        (name, key): [value(summary, key) for summary in summaries]
        for name, summaries in rounds.items()
        for key in ("test/greedy", "test/pass@1", wide)
    }
    middle = len(rounds["bstar"]) // 2
    cold, bstar = line["online_rft_cold", wide], line["bstar", wide]
    holds = cold[-1] < max(cold[1:]) and bstar[-1] >= bstar[1]
    outcomes = {"a": (holds, f"{wide[5:]}: cold {_path(cold)}; bstar {_path(bstar)}")}
    for key in ("test/greedy", "test/pass@1"):
        best = max(line[name, key][-1] for name in STATIC)
        reached = line["bstar", key][-1]
        outcomes[f"b, {key[5:]}"] = (reached > best, f"{reached:.3f} against {best:.3f}")
        late = {name: line[name, key][-1] - line[name, key][middle] for name in ("bstar", "online_rft")}
        holds = 0 < late["bstar"] > late["online_rft"]
        figures = f"from round {middle}: bstar {late['bstar']:+.3f}, online_rft {late['online_rft']:+.3f}"
        outcomes[f"c, {key[5:]}"] = (holds, figures)
    return outcomes | {"d": _chosen(rounds["bstar"][1:])}


def _chosen(rounds: Sequence[Summary]) -> tuple[bool, str]:
    temperatures, scores = ([value(summary, key) for summary in rounds] for key in ("temperature", "balance"))
    rising = all(after >= before - NOISE for before, after in zip(scores[:-1], scores[1:], strict=True))
    thresholds = ", ".join(str(summary.threshold) for summary in rounds)
    shown = f"T {', '.join(f'{t:g}' for t in temperatures)}; threshold {thresholds}; balance {_path(scores)}"
    return rising and temperatures[-1] > temperatures[0], shown


def _path(values: Sequence[float]) -> str:
    return " ".join(f"{number:.3f}" for number in values)


def text(folders: Sequence[Path]) -> str:
    lines = []
    for run in folders:
        shown = (
            f"  ({name}) {'holds' if holds else 'fails'}: {figures}" for name, (holds, figures) in claims(run).items()
        )
        lines += [str(run), *shown]
    return "\n".join(lines)


if __name__ == "__main__":
    run_on_folders(text)
