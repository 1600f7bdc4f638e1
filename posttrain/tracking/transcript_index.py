"""transcripts/index.html, made from index.jsonl: iterations with a page and mean reward, newest
first. The numbers are of the transcripts' rollouts, perhaps a part of the step's. Left out: curves
(plots/).
"""

from dataclasses import dataclass
from pathlib import Path

from posttrain.tracking.jsonl import read_dataclasses, write_atomically, write_jsonl
from posttrain.tracking.metrics_log import format_number
from posttrain.tracking.pages import html_page, table


@dataclass
class IndexEntry:
    """One page. `mean_reward` is None without finished rollouts; `turns` is the mean over these."""

    iteration: int
    mean_reward: float | None
    rollouts: int
    failed: int
    turns: float


def update_index(folder: Path, entry: IndexEntry) -> None:
    """Adds the entry, or replaces that of the same iteration, and rewrites the page."""
    records = folder / "index.jsonl"
    entries = {known.iteration: known for known in read_dataclasses(records, IndexEntry)} | {entry.iteration: entry}
    ordered = [entries[iteration] for iteration in sorted(entries)]
    write_jsonl(records, ordered)
    write_atomically(folder / "index.html", _page(folder, ordered))


def _page(folder: Path, entries: list[IndexEntry]) -> str:
    rewards = [entry.mean_reward for entry in entries if entry.mean_reward is not None]
    low, high = min(rewards, default=0.0), max(rewards, default=0.0)
    rows = [_row(entry, min(low, 0.0), high) for entry in reversed(entries)]
    links = [(f"{other.parent.name}/index.html", other.parent.name) for other in sorted(folder.glob("*/index.html"))]
    links += [("../index.html", folder.parent.name)] if (folder.parent / "index.jsonl").exists() else []
    title = f"{folder.name}: {len(entries)} iterations"
    columns = ("iteration", "mean reward", "", "rollouts", "failed", "turns")
    return html_page(title, [], dict(links), table(columns, rows), _STYLE)


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
