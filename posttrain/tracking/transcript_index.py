"""transcripts/index.html, made from index.jsonl: iterations with a page and mean reward, newest
first. The numbers are of the transcripts' rollouts, perhaps a part of the step's. Left out: curves
(plots/).
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from posttrain.tracking.jsonl import (
    append_jsonl,
    as_dataclass,
    drop_torn_line,
    read_dataclasses,
    read_last_records,
    write_atomically,
    write_jsonl,
)
from posttrain.tracking.metrics_log import format_number
from posttrain.tracking.pages import html_page, table

ROWS = 1000  # of the page: a step of a long run writes no more than one of a short run
EVALUATIONS = "test"  # the folder of their pages. Not searched for: the pages of training beside it may be many


@dataclass
class IndexEntry:
    """One page. `mean_reward` is None without finished rollouts; `turns` is the mean over these."""

    iteration: int
    mean_reward: float | None
    rollouts: int
    failed: int
    turns: float


def update_index(folder: Path, entry: IndexEntry) -> None:
    """Adds the entry, or replaces that of the same iteration, and rewrites the page of the last ROWS."""
    records = folder / "index.jsonl"
    drop_torn_line(records)
    latest = [as_dataclass(record, IndexEntry, str(records)) for record in read_last_records(records, ROWS)]
    if latest and latest[-1].iteration >= entry.iteration:  # a resumed run writes it again
        entries = {known.iteration: known for known in read_dataclasses(records, IndexEntry)}
        entries[entry.iteration] = entry
        latest = [entries[iteration] for iteration in sorted(entries)]
        write_jsonl(records, latest)
    else:
        append_jsonl(records, asdict(entry))
        latest.append(entry)
    write_atomically(folder / "index.html", _page(folder, latest[-ROWS:]))


def _page(folder: Path, entries: list[IndexEntry]) -> str:
    rewards = [entry.mean_reward for entry in entries if entry.mean_reward is not None]
    low, high = min(rewards, default=0.0), max(rewards, default=0.0)
    rows = [_row(entry, min(low, 0.0), high) for entry in reversed(entries)]
    links = [(f"{EVALUATIONS}/index.html", EVALUATIONS)] if (folder / EVALUATIONS / "index.html").exists() else []
    links += [("../index.html", folder.parent.name)] if (folder.parent / "index.jsonl").exists() else []
    shown = f"the last {ROWS}" if len(entries) == ROWS else len(entries)
    columns = ("iteration", "mean reward", "", "rollouts", "failed", "turns")
    return html_page(f"{folder.name}: {shown} iterations", [], dict(links), table(columns, rows), _STYLE)


def _row(entry: IndexEntry, low: float, high: float) -> list[str]:
    reward, bar = "", ""
    if entry.mean_reward is not None:
        reward = format_number(entry.mean_reward)
        width = 100 * (entry.mean_reward - low) / (high - low) if high > low else 100
        bar = f'<div class="bar"><div style="width:{width:.0f}%"></div></div>'
    failed = f'<b class="bad">{entry.failed}</b>' if entry.failed else "0"
    link = f'<a href="{entry.iteration:06d}.html">{entry.iteration}</a>'
    return [link, reward, bar, str(entry.rollouts), failed, format_number(entry.turns)]


_STYLE = """
.bar{width:300px}.bar div{height:10px;background:rgb(var(--good));border-radius:3px;min-width:1px}.bad{color:rgb(var(--bad))}
"""
