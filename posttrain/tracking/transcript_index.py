"""transcripts/index.html: the iterations that have a page, with their mean reward, newest first. index.jsonl holds what it is made from.

The numbers are those of the rollouts in the transcripts, which may be a part of the step's. Left out: curves (see plots/).
"""

from dataclasses import asdict, dataclass
from html import escape
from json import dumps
from pathlib import Path

from posttrain.tracking.jsonl import read_dataclasses, write_atomically
from posttrain.tracking.metrics_log import format_number


@dataclass
class IndexEntry:
    """One page. `mean_reward` is None where no rollout was finished; `turns` is the mean over the finished ones."""

    iteration: int
    mean_reward: float | None
    rollouts: int
    failed: int
    turns: float


def update_index(folder: Path, entry: IndexEntry) -> None:
    """Adds the entry, or replaces the one of the same iteration, and writes the page again."""
    records = folder / "index.jsonl"
    entries = {known.iteration: known for known in read_dataclasses(records, IndexEntry)} | {entry.iteration: entry}
    ordered = [entries[iteration] for iteration in sorted(entries)]
    write_atomically(records, "".join(dumps(asdict(each)) + "\n" for each in ordered))
    write_atomically(folder / "index.html", _page(folder, ordered))


def _page(folder: Path, entries: list[IndexEntry]) -> str:
    rewards = [entry.mean_reward for entry in entries if entry.mean_reward is not None]
    low, high = min(rewards, default=0.0), max(rewards, default=0.0)
    rows = "".join(_row(entry, min(low, 0.0), high) for entry in reversed(entries))
    links = [(f"{other.parent.name}/index.html", other.parent.name) for other in sorted(folder.glob("*/index.html"))]
    links += [("../index.html", folder.parent.name)] if (folder.parent / "index.jsonl").exists() else []
    others = " · ".join(f'<a href="{escape(link)}">{escape(name)}</a>' for link, name in links)
    title = f"{folder.name}: {len(entries)} iterations"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style><body><h1>{escape(title)}</h1><p>{others}</p>"
        f"<table><thead><tr><th>iteration</th><th>mean reward</th><th></th><th>rollouts</th><th>failed</th><th>turns</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></body></html>\n"
    )


def _row(entry: IndexEntry, low: float, high: float) -> str:
    reward, bar = "", ""
    if entry.mean_reward is not None:
        reward = format_number(entry.mean_reward)
        width = 100 * (entry.mean_reward - low) / (high - low) if high > low else 100
        bar = f'<div style="width:{width:.0f}%"></div>'
    return (
        f'<tr><td><a href="{entry.iteration:06d}.html">{entry.iteration}</a></td><td>{reward}</td><td class="bar">{bar}</td>'
        f'<td>{entry.rollouts}</td><td class="{"bad" if entry.failed else ""}">{entry.failed}</td><td>{format_number(entry.turns)}</td></tr>'
    )


_STYLE = """
:root{color-scheme:light dark;--ink:#1d232b;--soft:#67717e;--line:#dfe3e8;--page:#f6f7f9;--bar:#2f7d57;--bad:#c03438}
@media(prefers-color-scheme:dark){:root{--ink:#dfe4ea;--soft:#8d97a5;--line:#30363e;--page:#14171b;--bar:#3fa873;--bad:#eb5a5a}}
body{font:14px/1.5 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif;color:var(--ink);background:var(--page);
max-width:760px;margin:0 auto;padding:24px 20px 60px}
h1{font-size:22px;margin:0}a{color:inherit}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:4px 10px;border-bottom:1px solid var(--line)}th{color:var(--soft);font-weight:500}
.bar{width:40%}.bar div{height:10px;background:var(--bar);border-radius:3px;min-width:1px}.bad{color:var(--bad);font-weight:600}
"""
