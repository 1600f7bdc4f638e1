"""Sample solutions of a round, for report.py: the best selected, best wrong, worst right,
truncated.

Each step is shaded by the process reward model's logit, if there is one.
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
    """HTML of the round in `folder`; `questions` are the lines of questions.jsonl. Questions with
    both right and wrong answers come first.
    """
    taken = {(line.query, line.sample) for line in read_selection(folder / "selection.jsonl")}
    texts = {line["query"]: line for line in questions}
    groups: dict[str, list[Candidate]] = {}
    for candidate in read_candidates(folder / "samples.jsonl"):
        groups.setdefault(candidate.query, []).append(candidate)
    mixed = [query for query, group in groups.items() if 0 < sum(candidate.correct for candidate in group) < len(group)]
    shown = [*mixed, *(query for query in groups if query not in mixed)][:SHOWN_QUERIES]
    blocks = "".join(_query(query, groups[query], texts.get(query, {}), taken, form) for query in shown)
    return f"<h3>Samples of {escape(folder.name.replace('_', ' '))}</h3>{blocks}"


def _query(
    query: str,
    group: Sequence[Candidate],
    text: Mapping[str, Any],
    taken: set[tuple[str, int | None]],
    form: StepFormat,
) -> str:
    right = sum(candidate.correct for candidate in group)
    chosen = sum((query, candidate.sample) in taken for candidate in group)
    facts = f"{right} of {len(group)} right, {chosen} selected"
    cards = "".join(_card(why, candidate, form) for why, candidate in _examples(group, taken).items())
    question = f"<p>{escape(str(text.get('question', '')))[:SHOWN_CHARS]}</p>" if text else ""
    answer = f" · answer {escape(str(text['answer']))[:80]}" if text else ""
    return f'<div class="query"><div class="soft">{escape(query)} · {facts}{answer}</div>{question}<div class="cards">{cards}</div></div>'


def _examples(group: Sequence[Candidate], taken: set[tuple[str, int | None]]) -> dict[str, Candidate]:
    """Category -> example, without duplicates."""
    ranked = sorted(group, key=lambda candidate: -(candidate.reward or 0.0))
    wanted = {
        "best selected": [candidate for candidate in ranked if (candidate.query, candidate.sample) in taken],
        "best wrong": [candidate for candidate in ranked if not candidate.correct and candidate.stop == "stop"],
        "worst right": [candidate for candidate in reversed(ranked) if candidate.correct],
        "truncated": [candidate for candidate in ranked if candidate.stop == "length"],
    }
    examples: dict[str, Candidate] = {}
    for why, candidates in wanted.items():
        fresh = [
            candidate for candidate in candidates if candidate.text not in {other.text for other in examples.values()}
        ]
        examples |= {why: fresh[0]} if fresh else {}
    return examples


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
