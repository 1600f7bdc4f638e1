"""One HTML page for a run folder: each method's rounds in tables and plots, and scored solutions.

    python -m recipes.bstar.report runs/bstar            # writes runs/bstar/report.html

The page is one file without scripts. It shows the finished rounds, so it works during a run. Left
out: the training curves within a round, which are in the run folders called `train`.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from math import isnan
from pathlib import Path

from posttrain.backend.errors import DataError
from posttrain.tracking.command_line import run_on_folders
from posttrain.tracking.figures import draw_panels
from posttrain.tracking.jsonl import read_jsonl, write_atomically, write_jsonl
from posttrain.tracking.pages import figure_html, html_page, table
from preference.steps import StepFormat
from recipes.bstar.methods import METHODS
from recipes.bstar.pictures import (
    STAGES,
    as_svg,
    draw_comparison,
    draw_costs,
    draw_surfaces,
    panels,
    samples_of,
    test_keys,
    value,
)
from recipes.bstar.records import Choice, Summary, read_choice, read_summaries
from recipes.bstar.showcase import samples_html
from recipes.bstar.tasks import Task

QUESTIONS = "questions.jsonl"


def write_questions(run: Path, task: Task) -> None:
    """Writes the question and answer of each training and test query id, one JSON line each."""
    sets = {"train": task.train, "test": task.test}
    lines = (
        {"query": query.problem.id, "split": name, "question": query.problem.question, "answer": query.problem.gold}
        for name, queries in sets.items()
        for query in queries
    )
    write_jsonl(run / QUESTIONS, lines)


def read_methods(run: Path) -> dict[str, list[Summary]]:
    """The rounds of each method with a finished round 1, in the order of METHODS. DataError if none."""
    files = run.glob("*/round_*/summary.json")
    names = {file.parent.parent.name for file in files if file.parent.name != "round_00"}
    if not names:
        raise DataError(f"{run}: no method there has finished a round; a run folder has METHOD/round_01/summary.json")
    order = [*METHODS, *sorted(names - METHODS.keys())]
    return {name: read_summaries(run / name) for name in order if name in names}


def write_report(run: Path) -> Path:
    """Writes report.html into the run folder and returns its path."""
    summaries = read_methods(run)
    settings = _settings(run, next(iter(summaries)))
    body = [_overview(summaries), *(_method(run / name, rounds, settings) for name, rounds in summaries.items())]
    shown = ("model_name", "samples", "steps", "batch_size", "n_star", "seed")
    facts = [f"{key} {settings[key]}" for key in shown if key in settings]
    facts += [settings["task"]["class"].partition(":")[2]] if "task" in settings else []
    page = run / "report.html"
    links = {f"#{name}": name for name in summaries}
    write_atomically(page, html_page(f"B-STaR: {run.resolve().name}", facts, links, "".join(body), STYLE))
    return page


def _settings(run: Path, method: str) -> dict:
    file = run / f"{method}.made_with.json"
    return json.loads(file.read_text())[method] if file.exists() else {}


def _form(settings: Mapping) -> StepFormat:
    fields = settings.get("task", {}).get("form", {})
    return StepFormat(**{name: text for name, text in fields.items() if name != "class"})


# --- the methods side by side -------------------------------------------------------------------


def _overview(summaries: Mapping[str, Sequence[Summary]]) -> str:
    """First and last round of each method."""
    keys = _known(test_keys(next(iter(summaries.values()))), [rounds[0] for rounds in summaries.values()])
    rows = []
    for name, rounds in summaries.items():
        first, last = rounds[0], rounds[-1]
        seconds, tokens = (
            sum(sum(getattr(summary, part).values()) for summary in rounds[1:]) for part in ("seconds", "tokens")
        )
        changes = (f"{a} → {b}" for a, b in zip(_numbers(first, keys), _numbers(last, keys), strict=True))
        rows.append([escape(name), str(last.round), *changes, f"{seconds:,.0f}", f"{tokens:,}"])
    columns = ["method", "rounds", *keys, "seconds", "tokens sampled and trained on"]
    picture = ""
    if len(summaries) > 1:
        svg = as_svg(draw_comparison({name: [rounds] for name, rounds in summaries.items()}))
        picture = figure_html(svg, "Round 0 is the warm start, which the methods share.")
    return "<section><h2>Methods</h2>" + table(columns, rows) + picture + "</section>"


# --- one method ---------------------------------------------------------------------------------


def _method(folder: Path, summaries: Sequence[Summary], settings: Mapping) -> str:
    choices = {n: read_choice(_round(folder, n) / "choice.json") for n in (summary.round for summary in summaries) if n}
    surfaces: dict[int, Choice] = {number: choice for number, choice in choices.items() if choice.surface}
    name = escape(folder.name)
    parts = [f'<section id="{name}"><h2>{name}</h2>', _rounds_tables(summaries)]
    parts.append(figure_html(as_svg(draw_panels(panels(summaries))), "Metrics by round."))
    if surfaces:
        caption = (
            "Balance scores of the dev subset. Framed: the chosen cell; ties go to the lower temperature, "
            "then to the higher threshold."
        )
        parts.append(figure_html(as_svg(draw_surfaces(surfaces)), caption))
    parts += [figure_html(as_svg(draw_costs(summaries)), "Cost of a round."), _speeds(summaries)]
    last = _round(folder, summaries[-1].round)
    parts.append(samples_html(last, _form(settings), read_jsonl(folder.parent / QUESTIONS)))
    return "".join(parts) + "</section>"


def _round(folder: Path, number: int) -> Path:
    return folder / f"round_{number:02d}"


def _rounds_tables(summaries: Sequence[Summary]) -> str:
    """Tables of the training sets and of the test metrics after training."""
    k = samples_of(summaries)
    training = {
        "balance": "balance",
        "selected": "train/selected",
        "of them right": "train/selected_accuracy",
        "questions covered": "train/selected_queries",
        "truncated": "train/truncated",
        "unparsable": "train/unparsable",
    }
    test = {
        "greedy": "test/greedy",
        "pass@1": "test/pass@1",
        f"pass@{k}": f"test/pass@{k}",
        f"pass@{k}-4": f"test/pass@{k}-4",
        f"reward@{k}-4": f"test/reward@{k}-4",
        "diversity": "test/diversity",
    }
    later = [summary for summary in summaries if summary.round]
    training, test = _known(training, later), _known(test, summaries)
    chosen = [
        [str(summary.round), str(summary.temperature), str(summary.threshold), *_numbers(summary, training)]
        for summary in later
    ]
    reached = [[str(summary.round), *_numbers(summary, test)] for summary in summaries]
    tables = table(["training", "T", "threshold", *training], chosen) + table(["test", *test], reached)
    return f'<div class="beside">{tables}</div>'


def _known(keys: Mapping[str, str], summaries: Sequence[Summary]) -> dict[str, str]:
    """Keys that at least one round has: e.g. methods without a choice have no balance score."""
    return {name: key for name, key in keys.items() if any(not isnan(value(summary, key)) for summary in summaries)}


def _numbers(summary: Summary, keys: Mapping[str, str]) -> list[str]:
    """Counts as integers, other values with three decimals, missing values as empty text."""
    values = {key: value(summary, key) for key in keys.values()}
    return ["" if isnan(x) else f"{x:,.0f}" if key == "train/selected" else f"{x:.3f}" for key, x in values.items()]


def _speeds(summaries: Sequence[Summary]) -> str:
    seconds, tokens = Counter[str](), Counter[str]()
    for summary in summaries:
        seconds.update(summary.seconds)  # type: ignore[arg-type]  # a Counter adds floats too
        tokens.update(summary.tokens)
    stages = [stage for stage in STAGES if stage in seconds]
    total = sum(seconds.values()) or 1.0
    rows = [
        ["seconds", *(f"{seconds[stage]:,.1f}" for stage in stages)],
        ["share", *(f"{seconds[stage] / total:.0%}" for stage in stages)],
        [
            "tokens/s",
            *(f"{tokens[stage] / seconds[stage]:,.0f}" if tokens[stage] and seconds[stage] else "" for stage in stages),
        ],
    ]
    return table(["all rounds", *stages], rows)


STYLE = """
h3{font-size:14px;margin:18px 0 6px}
section{background:var(--card);border:1px solid var(--line);border-radius:8px;margin:16px 0;padding:16px 18px}
.beside{display:flex;flex-wrap:wrap;gap:10px 28px;align-items:flex-end}
.query{border-top:1px solid var(--line);padding:8px 0}.query p{margin:2px 0 6px;white-space:pre-wrap}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));gap:10px}
.card{border:1px solid var(--line);border-radius:6px;padding:8px 10px}.card h4{margin:0 0 4px;font-size:12px;font-weight:600}
.chip{margin-left:4px}
.step{display:flex;justify-content:space-between;gap:10px;padding:0 4px;border-radius:3px}.step span{color:var(--soft);white-space:nowrap}
"""


if __name__ == "__main__":
    run_on_folders(lambda folders: "\n".join(str(write_report(run)) for run in folders))
