"""Rollouts for people and programs: transcripts/000012.html and 000012.jsonl of iteration 12. The
page is a single file without scripts; a JSON line has all data of a member of a group. index.html
lists the iterations. An observation that extends the turn before keeps only its new part. Input is
plain data of the loop. Left out: search, token ids.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

from posttrain.tracking.jsonl import write_atomically, write_jsonl
from posttrain.tracking.metrics_log import format_number
from posttrain.tracking.pages import html_page
from posttrain.tracking.transcript_index import IndexEntry, update_index

SHADES = 5  # of green and of red
# an observation's common beginning with the previous one is folded from this length on
FOLDED_CHARS = 80
# sampled tokens of a page after which no group is added: 20 MB, more than which browsers refuse
PAGE_TOKENS = 300_000


@dataclass
class TranscriptTurn:
    """An observation and its action. `tokens` are the action's, decoded one by one, aligned with
    the lists. `continues`: the observation is the previous turn's observation and action, then
    `prompt_text`."""

    prompt_text: str
    tokens: list[str]
    advantages: list[float] | None = None
    logprobs: list[float] | None = None
    reward: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    stop_reason: str = "stop"
    continues: bool = False


@dataclass
class TranscriptMember:
    """One rollout. `error` says why it was dropped, and its rewards have no meaning. `final_reward`
    is the group's part of the total."""

    turns: list[TranscriptTurn]
    total_reward: float
    advantage: float | None = None
    error: str | None = None
    stop_reason: str = "done"
    final_reward: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class TranscriptGroup:
    """`num_seats`: consecutive members that play one game, shown side by side; 0: no games."""

    members: list[TranscriptMember]
    tags: list[str] = field(default_factory=list)
    num_retries: int = 0
    num_seats: int = 0


def write_transcripts(
    folder: Path, iteration: int, groups: Sequence[TranscriptGroup], max_html_groups: int = 16
) -> Path:
    """Writes both files; returns the page's path. The page has `max_html_groups`, the JSON all."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"{iteration:06d}.html"
    lines = [
        {"iteration": iteration, "group": g, "member": m, "tags": group.tags, **asdict(member)}
        for g, group in enumerate(groups)
        for m, member in enumerate(group.members)
    ]
    write_jsonl(page.with_suffix(".jsonl"), map(_finite, lines))
    title, rest = f"iteration {iteration}", f"all are in {iteration:06d}.jsonl"
    links = {"index.html": "all iterations"}
    write_atomically(page, transcript_page(title, groups, max_html_groups, rest, links))
    update_index(folder, _entry(iteration, groups))
    return page


def _entry(iteration: int, groups: Sequence[TranscriptGroup]) -> IndexEntry:
    members = [member for group in groups for member in group.members]
    finished = [member for member in members if member.error is None]
    return IndexEntry(
        iteration=iteration,
        mean_reward=sum(member.total_reward for member in finished) / len(finished) if finished else None,
        rollouts=len(finished),
        failed=len(members) - len(finished),
        turns=sum(len(member.turns) for member in finished) / len(finished) if finished else 0.0,
    )


def _finite(value: Any) -> Any:
    """NaN and infinities as text, which JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def transcript_page(
    title: str, groups: Sequence[TranscriptGroup], max_groups: int, rest: str, links: Mapping[str, str]
) -> str:
    """The page of the first `max_groups`, fewer if they are long; `rest` says where the others are."""
    entry, retries = _entry(0, groups), sum(group.num_retries for group in groups)
    facts = [f"{len(groups)} groups", f"{entry.rollouts} rollouts"]
    facts += [f"mean reward {format_number(entry.mean_reward)}"] if entry.mean_reward is not None else []
    facts += [f"{entry.failed} failed"] if entry.failed else []
    facts += [f"{retries} retried"] if retries else []
    shown = groups[: min(max_groups, 1 + _groups_before(PAGE_TOKENS, groups))]
    if len(shown) < len(groups):
        facts.append(f"the first {len(shown)} groups are shown, {rest}")
    scale = max(
        (abs(a) for group in shown for m in group.members for t in m.turns for a in t.advantages or [] if a == a),
        default=0,
    )
    body = "".join(_group(number, group, scale) for number, group in enumerate(shown))
    head = f"<p>{_LEGEND} advantage</span> point at a token for its numbers</p>" if scale else ""
    return html_page(title, facts, links, head + body, _STYLE)


_LEGEND = (
    '<span class="legend"><b class="n5">lower</b> <b class="n2">&nbsp;</b> <b class="p2">&nbsp;</b> <b '
    'class="p5">higher</b>'
)


def _groups_before(most: int, groups: Sequence[TranscriptGroup]) -> int:
    """How many groups, in order, have at most so many sampled tokens."""
    sizes = (sum(len(turn.tokens) for member in group.members for turn in member.turns) for group in groups)
    return sum(total <= most for total in accumulate(sizes))


def _group(number: int, group: TranscriptGroup, scale: float) -> str:
    chips = "".join(
        '<span class="chip bad">error</span>' if member.error else _chip(member.total_reward, member.advantage)
        for member in group.members
    )
    tags = "".join(f'<span class="tag">{escape(tag)}</span>' for tag in group.tags)
    tags += f'<span class="note">{group.num_retries} retried</span>' if group.num_retries else ""
    prompts = [member.turns[0].prompt_text for member in group.members if member.turns]
    hint = " ".join(prompts[0].split())[-120:] if prompts else ""
    shared = prompts[0] if len(set(prompts)) == 1 else None
    head = f'<div class="shared"><pre class="ob">{_visible(shared)}</pre></div>' if shared is not None else ""
    games = _games(group, scale, shared) if group.num_seats else _members("rollout", group.members, scale, shared)
    opened = " open" if number == 0 else ""
    return (
        f'<details class="group"{opened}><summary><span class="name">group {number}</span>{tags}'
        f'<span class="chips">{chips}</span><span class="hint">{escape(hint)}</span></summary>{head}{games}</details>'
    )


def _games(group: TranscriptGroup, scale: float, shared: str | None) -> str:
    """A row per game, a column per seat."""
    games = [group.members[first : first + group.num_seats] for first in range(0, len(group.members), group.num_seats)]
    rows = (f'<div class="seats">{_members("seat", game, scale, shared)}</div>' for game in games)
    titles = (f"<h3>game {number}</h3>" if len(games) > 1 else "" for number in range(len(games)))
    return "".join(title + row for title, row in zip(titles, rows, strict=True))


def _members(name: str, members: Sequence[TranscriptMember], scale: float, shared: str | None) -> str:
    return "".join(_member(f"{name} {index}", member, scale, shared) for index, member in enumerate(members))


def _chip(reward: float, advantage: float | None) -> str:
    sign = "" if not advantage else "good" if advantage > 0 else "bad"
    hover = f' title="advantage {format_number(advantage)}"' if advantage is not None else ""
    return f'<span class="chip {sign}"{hover}>{format_number(reward)}</span>'


def _member(name: str, member: TranscriptMember, scale: float, shared: str | None) -> str:
    head = f'<span class="name">{name}</span>'
    if member.error:
        head += f'<span class="chip bad">error</span> {escape(member.error)}'
    else:
        notes = [_plural(len(member.turns), "turn")]
        notes += [f"advantage {format_number(member.advantage)}"] if member.advantage is not None else []
        notes += [f"of the group {format_number(member.final_reward)}"] if member.final_reward else []
        notes += [f"{name} {format_number(value)}" for name, value in member.metrics.items()]
        head += _chip(member.total_reward, member.advantage)
        head += f'<span class="chip bad">ended by {member.stop_reason}</span>' if member.stop_reason != "done" else ""
        head += "".join(f'<span class="note">{escape(note)}</span>' for note in notes)
    turns = "".join(_turn(number, member.turns, scale, shared) for number in range(len(member.turns)))
    return f'<details class="member" open><summary>{head}</summary>{turns}</details>'


def _turn(number: int, turns: Sequence[TranscriptTurn], scale: float, shared: str | None) -> str:
    """The new part of the observation, the action, and its data."""
    turn = turns[number]
    advantages = turn.advantages or [None] * len(turn.tokens)
    logprobs = turn.logprobs or [None] * len(turn.tokens)
    action = "".join(_token(*numbers, scale) for numbers in zip(turn.tokens, advantages, logprobs, strict=True))
    facts = [
        ("reward", format_number(turn.reward)),
        ("stopped by", turn.stop_reason),
        ("tokens", str(len(turn.tokens))),
    ]
    facts += [(name, format_number(value)) for name, value in turn.metrics.items()]
    short = {name: text for name, text in turn.logs.items() if len(text) < 40 and "\n" not in text}
    table = "".join(f"<span><i>{escape(name)}</i> {escape(value)}</span>" for name, value in facts)
    table += "".join(f"<span><i>{escape(name)}</i> <code>{escape(text)}</code></span>" for name, text in short.items())
    long = "".join(
        f"<dt>{escape(name)}</dt><dd>{_visible(text)}</dd>" for name, text in turn.logs.items() if name not in short
    )
    label = f"<h3>turn {number}</h3>" if len(turns) > 1 else ""
    observation = _observation(turn, turns[number - 1]) if number else _first_observation(turn, shared)
    return (
        f'<section>{label}{observation}<pre class="ac">{action}</pre>'
        f'<p class="facts">{table}</p>{f"<dl>{long}</dl>" if long else ""}</section>'
    )


def _first_observation(turn: TranscriptTurn, shared: str | None) -> str:
    """Empty if the group shows it already."""
    return "" if turn.prompt_text == shared else f'<pre class="ob">{_visible(turn.prompt_text)}</pre>'


def _observation(turn: TranscriptTurn, before: TranscriptTurn) -> str:
    """A later observation. The part shared with the previous one is folded, if rewritten."""
    text, note = turn.prompt_text, ""
    same = 0 if turn.continues else len(os.path.commonprefix([before.prompt_text, text]))
    if same >= FOLDED_CHARS:
        note = f'<details class="same"><summary>{same} characters as before</summary><pre class="ob">{_visible(text[:same])}</pre></details>'
        text = text[same:]
    return note + (f'<pre class="ob">{_visible(text)}</pre>' if text else "")


def _token(text: str, advantage: float | None, logprob: float | None, scale: float) -> str:
    shade = math.ceil(SHADES * abs(advantage) / scale) if advantage and scale and advantage == advantage else 0
    kind = f' class="{"p" if advantage and advantage > 0 else "n"}{shade}"' if shade else ""
    numbers = [("logprob", logprob), ("advantage", advantage)]
    hover = " ".join(f"{name} {format_number(value)}" for name, value in numbers if value is not None)
    return f'<b{kind} title="{hover}">{_visible(text)}</b>'


_MARKS = {" ": "<i class=s> </i>", "\n": "<i class=l></i>\n", "\t": "<i class=t>\t</i>"}


def _visible(text: str) -> str:
    """Escaped, with faint marks for white space that copying skips."""
    return re.sub("[ \n\t]", lambda match: _MARKS[match[0]], escape(text))


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


_STYLE = """
h3{font-size:12px;font-weight:600;color:var(--soft);margin:14px 0 4px}.legend{margin-right:12px}
summary{cursor:pointer;display:flex;align-items:center;gap:8px;flex-wrap:wrap;list-style:none}
summary::-webkit-details-marker{display:none}
summary::before{content:"▸";color:var(--soft);width:10px}details[open]>summary::before{content:"▾"}
.group{background:var(--card);border:1px solid var(--line);border-radius:8px;margin:10px 0}
.group>summary{padding:10px 14px}.group[open]>summary{border-bottom:1px solid var(--line)}
.member{padding:10px 14px 12px;border-top:1px solid var(--line)}.shared{padding:8px 14px}summary+.member{border-top:0}
.seats{display:grid;grid-auto-flow:column;grid-auto-columns:minmax(260px,1fr);overflow-x:auto}
.seats>.member{border-right:1px solid var(--line)}.group>h3{margin:14px 14px 6px}
.same{margin:6px 0;color:var(--soft);font-size:12px}
.name{font-weight:600}.note{color:var(--soft)}
.hint{flex:1 1 200px;min-width:0;color:var(--soft);white-space:nowrap;overflow:hidden;text-overflow:ellipsis;text-align:right}
.chips{display:flex;gap:4px;flex-wrap:wrap}
.tag{font-size:12px;padding:0 6px;border:1px solid var(--line);border-radius:4px;color:var(--soft)}
pre,dd{max-height:420px;overflow-y:auto}pre{margin:6px 0;padding:8px 12px;border-radius:6px}
.ob{background:var(--inset);color:var(--soft)}.ac{border:1px solid var(--line)}
b{font-weight:400;border-radius:3px;padding:1px 0}pre b:hover{outline:1px solid var(--soft)}.legend b{padding:1px 7px}
i{font-style:normal}.s,.t{position:relative}.s::before,.t::before,.l::before{color:var(--soft);opacity:.4}
.s::before{content:"·";position:absolute}.t::before{content:"→";position:absolute}.l::before{content:"↵"}
.facts{display:flex;gap:4px 18px;flex-wrap:wrap;margin:6px 0;font-variant-numeric:tabular-nums}.facts i{color:var(--soft)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 14px;margin:6px 0}dt{color:var(--soft)}
""" + "".join(
    f".p{shade}{{background:rgba(var(--good),{0.07 * shade:.2f})}}.n{shade}{{background:rgba(var(--bad),{0.07 * shade:.2f})}}"
    for shade in range(1, SHADES + 1)
)
