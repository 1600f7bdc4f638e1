"""Solutions of a round for report.py: of a few questions what was selected, what the reward took for right, and what it missed.

The steps are shaded by the process reward model's score, where there is one; the number beside a step is that logit.
"""

from collections.abc import Mapping, Sequence
from html import escape
from math import exp
from pathlib import Path
from typing import Any

from preference.steps import StepFormat
from recipes.bstar.records import Candidate, read_candidates, read_selection

SHOWN_QUERIES, SHOWN_CHARS = 4, 800


def samples_html(folder: Path, form: StepFormat, questions: Sequence[Mapping[str, Any]]) -> str:
    """`folder` is a round's; `questions` are the lines of questions.jsonl. Questions answered both ways come first."""
    taken = {(one.query, one.sample) for one in read_selection(folder / "selection.jsonl")}
    asked = {line["query"]: line for line in questions}
    groups: dict[str, list[Candidate]] = {}
    for candidate in read_candidates(folder / "samples.jsonl"):
        groups.setdefault(candidate.query, []).append(candidate)
    mixed = [query for query, group in groups.items() if 0 < sum(one.correct for one in group) < len(group)]
    shown = [*mixed, *(query for query in groups if query not in mixed)][:SHOWN_QUERIES]
    blocks = "".join(_query(query, groups[query], asked.get(query, {}), taken, form) for query in shown)
    return f"<h3>Samples of {escape(folder.name.replace('_', ' '))}</h3>{blocks}"


def _query(
    query: str, group: Sequence[Candidate], asked: Mapping[str, Any], taken: set[tuple[str, int | None]], form: StepFormat
) -> str:
    right, chosen = sum(one.correct for one in group), sum((query, one.sample) in taken for one in group)
    facts = f"{right} of {len(group)} right, {chosen} selected"
    cards = "".join(_card(why, one, form) for why, one in _examples(group, taken).items())
    question = f"<p>{escape(str(asked.get('question', '')))[:SHOWN_CHARS]}</p>" if asked else ""
    answer = f" · answer {escape(str(asked['answer']))[:80]}" if asked else ""
    return f'<div class="query"><div class="soft">{escape(query)} · {facts}{answer}</div>{question}<div class="cards">{cards}</div></div>'


def _examples(group: Sequence[Candidate], taken: set[tuple[str, int | None]]) -> dict[str, Candidate]:
    """By what they are examples of; no solution twice."""
    ranked = sorted(group, key=lambda one: -(one.reward or 0.0))
    wanted = {
        "best selected": [one for one in ranked if (one.query, one.sample) in taken],
        "best wrong": [one for one in ranked if not one.correct and one.stop == "stop"],
        "worst right": [one for one in reversed(ranked) if one.correct],
        "cut off": [one for one in ranked if one.stop == "length"],
    }
    found: dict[str, Candidate] = {}
    for why, candidates in wanted.items():
        fresh = [one for one in candidates if one.text not in {other.text for other in found.values()}]
        found |= {why: fresh[0]} if fresh else {}
    return found


def _card(why: str, candidate: Candidate, form: StepFormat) -> str:
    mark = "right" if candidate.correct else "wrong"
    reward = f'<span class="chip">reward {candidate.reward:.2f}</span>' if candidate.reward is not None else ""
    chips = f'<span class="chip {"good" if candidate.correct else "bad"}">{mark}</span>{reward}'
    return f'<div class="card"><h4>{why}{chips}</h4><pre>{_steps(candidate, form)}</pre></div>'


def _steps(candidate: Candidate, form: StepFormat) -> str:
    steps, scores = form.strings(candidate.text[:SHOWN_CHARS]), candidate.step_scores
    if not scores or len(form.strings(candidate.text)) != len(scores):
        return escape("\n".join(steps) or candidate.text[:SHOWN_CHARS])
    return "".join(_step(step, score) for step, score in zip(steps, scores, strict=False))


def _step(text: str, score: float) -> str:
    good = 1 / (1 + exp(-score))
    color, strength = ("--good", good - 0.5) if good > 0.5 else ("--bad", 0.5 - good)
    return f'<div class="step" style="background:rgba(var({color}),{0.5 * strength:.2f})">{escape(text)}<span>{score:+.1f}</span></div>'
