"""The results of an evaluation (results.json) as printed tables and as report.html."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from posttrain.tracking.jsonl import write_atomically
from posttrain.tracking.pages import html_page, table
from rl.evaluation_results import Estimate, interval_text

TAG_METRIC = "correct"  # shown for each tag; the reward where no model has it
Results = Mapping[str, Any]
Table = tuple[str, Sequence[str], list[list[str]]]  # title, columns, rows


def print_results(results: Results) -> None:
    from rich import get_console
    from rich.table import Table as Printed

    for title, columns, rows in tables(results):
        printed = Printed(title=title, title_justify="left", header_style="dim", title_style="bold")
        for number, column in enumerate(columns):
            printed.add_column(column, justify="right" if number else "left", overflow="fold")
        for row in rows:
            printed.add_row(*row)
        get_console().print(printed)


def notices(results: Results) -> list[str]:
    """Of models none of whose answers could be graded: what to look at."""
    return [
        f"{model['label']}: no answer has the form that is graded. Read {model['transcripts']}: does the prompt say which "
        "form (env.prompt_template, env.boxed, env.few_shot), and is max_tokens large enough?"
        for model in results["models"]
        if model["metrics"].get("format", {}).get("mean") == 0
    ]


def write_page(file: Path, results: Results) -> Path:
    body = "".join(
        f"<h2>{escape(title)}</h2>{table([*map(escape, columns)], [[*map(escape, row)] for row in rows])}<br>"
        for title, columns, rows in tables(results)
    )
    links = {model["transcripts"]: f"transcripts of {model['label']}" for model in results["models"]}
    settings = results["settings"]
    facts = [f"{settings['env']['class'].partition(':')[2]}", f"{settings['num_samples']} samples of each problem"]
    facts += ["mean ± standard error over problems"]
    write_atomically(file, html_page("Evaluation", facts, links | {"results.json": "results.json"}, body))
    return file


def tables(results: Results) -> list[Table]:
    """All models beside each other; by tag; paired differences."""
    models, paired = results["models"], results["paired"]
    labels = [model["label"] for model in models]
    problems = sorted({model["problems"] for model in models})
    title = f"{results['settings']['env']['class'].partition(':')[2]}: {' / '.join(map(str, problems))} problems"
    rows = _rows([model["metrics"] for model in models])
    if any(model["samples_lost"] for model in models):
        rows.append(["samples lost", *(str(model["samples_lost"]) for model in models)])
    shown: list[Table] = [(title, ["metric", *labels], rows)]
    by_tag = {}
    for tag in dict.fromkeys(tag for model in models for tag in model["tags"]):
        metrics = [model["tags"].get(tag, {}) for model in models]
        metric = TAG_METRIC if any(TAG_METRIC in of for of in metrics) else "reward"
        name = tag if metric == TAG_METRIC else f"{tag} ({metric})"
        by_tag[name] = [_text(of.get(metric)) for of in metrics]
    if by_tag:
        shown.append((f"{TAG_METRIC}, by tag", ["tag", *labels], [[tag, *cells] for tag, cells in by_tag.items()]))
    if paired:
        names = dict.fromkeys(name for pair in paired for name in pair["metrics"])
        cells = [[name, *(_interval(pair["metrics"].get(name)) for pair in paired)] for name in names]
        columns = ["metric", *(f"{pair['model']} - {pair['baseline']}" for pair in paired)]
        shown.append(("paired differences [95 % interval]", columns, cells))
    return shown


def _rows(metrics_M: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    names = dict.fromkeys(name for metrics in metrics_M for name in metrics)
    return [[name, *(_text(metrics.get(name)) for metrics in metrics_M)] for name in names]


def _estimate(saved: Mapping[str, Any]) -> Estimate:
    mean, stderr = (float("nan") if saved[name] is None else saved[name] for name in ("mean", "stderr"))
    return Estimate(mean, stderr, saved["problems"])


def _text(saved: Mapping[str, Any] | None) -> str:
    return str(_estimate(saved)) if saved else ""


def _interval(saved: Mapping[str, Any] | None) -> str:
    return interval_text(_estimate(saved)) if saved else ""
