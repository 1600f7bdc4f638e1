"""Compares methods over several seeds: a plot, a table of the last round, and a page with both.

    python -m recipes.bstar.compare runs/bstar runs/bstar_1 runs/bstar_2 out=runs/bstar_seeds

Each run folder is a seed. Writes OUT.png and OUT.html. Methods and rounds that are not in every
folder are skipped and named. Left out: significance tests; with few seeds the range says more.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from posttrain.backend.errors import DataError
from posttrain.tracking.command_line import run_on_folders
from posttrain.tracking.figures import save_figure
from posttrain.tracking.jsonl import write_atomically
from posttrain.tracking.pages import figure_html, html_page, table
from recipes.bstar.pictures import as_svg, draw_comparison, evaluated, middle, test_keys, value
from recipes.bstar.records import Summary
from recipes.bstar.report import STYLE, read_methods

Runs = dict[str, list[list[Summary]]]  # method -> seed -> rounds


def read_runs(folders: Sequence[Path]) -> tuple[Runs, list[str]]:
    """Methods and rounds that all folders have, up to the last one that was evaluated, and notes on the rest.
    DataError if none."""
    runs = [read_methods(run) for run in folders]
    shared = [name for name in runs[0] if all(name in methods for methods in runs)]
    rest = sorted({name for methods in runs for name in methods} - set(shared))
    if not shared:
        raise DataError(f"no method is in all of {', '.join(map(str, folders))}")
    lengths = [len(methods[name]) for methods in runs for name in shared]
    rounds, longest = evaluated(runs[0][shared[0]][: min(lengths)])[-1] + 1, max(lengths)
    notes = [f"{name}: not in every folder" for name in rest]
    notes += [f"rounds {rounds} to {longest - 1}: not evaluated everywhere"] if longest > rounds else []
    return {name: [methods[name][:rounds] for methods in runs] for name in shared}, notes


def final_table(runs: Runs) -> tuple[list[str], list[list[str]]]:
    """The last round: mean over seeds, and each seed's value."""
    start = next(iter(runs.values()))
    keys = test_keys(start[0])
    last = {"warm start": [run[0] for run in start]} | {
        method: [run[-1] for run in seeds] for method, seeds in runs.items()
    }
    rows = [[escape(name), *(_cell(summaries, key) for key in keys.values())] for name, summaries in last.items()]
    return ["after the last round", *keys], rows


def _cell(summaries: Sequence[Summary], key: str) -> str:
    values = [value(summary, key) for summary in summaries]
    return f"{np.mean(values):.3f}" + (
        f" ({', '.join(f'{number:.3f}' for number in values)})" if len(values) > 1 else ""
    )


def gains(runs: Mapping[str, Sequence[Sequence[Summary]]]) -> dict[str, tuple[float, float]]:
    """Method -> mean gain in P@1 up to the middle one of the evaluated rounds, and after it."""
    gained = {}
    for method, seeds in runs.items():
        first_S, half_S, last_S = (
            np.array([value(run[place], "test/pass@1") for run in seeds]) for place in (0, middle(seeds[0]), -1)
        )
        gained[method] = (float((half_S - first_S).mean()), float((last_S - half_S).mean()))
    return gained


def compare(folders: Sequence[Path], out: Path) -> Path:
    """Writes OUT.png and OUT.html; returns the page."""
    runs, notes = read_runs(folders)
    columns, rows = final_table(runs)
    late = [[escape(method), f"{first:+.3f}", f"{second:+.3f}"] for method, (first, second) in gains(runs).items()]
    figure, rounds = draw_comparison(runs), next(iter(runs.values()))[0]
    half, last = middle(rounds), len(rounds) - 1
    svg = as_svg(figure)
    save_figure(figure, out.with_suffix(".png"))
    caption = f"Thick: mean of {len(folders)} seeds; thin: each." if len(folders) > 1 else ""
    body = (
        f"<section>{figure_html(svg, caption)}{table(columns, rows)}<h3>Gain in P@1</h3>"
        + table(["method", f"rounds 1 to {half}", f"rounds {half + 1} to {last}"], late)
        + "".join(f'<p class="soft">Left out: {escape(note)}</p>' for note in notes)
        + "</section>"
    )
    page = out.with_suffix(".html")
    write_atomically(page, html_page("B-STaR and its relatives", [str(folder) for folder in folders], {}, body, STYLE))
    for note in notes:
        print(f"left out: {note}")
    return page


if __name__ == "__main__":
    run_on_folders(lambda folders, out: compare(folders, Path(out)), out="bstar_comparison")
