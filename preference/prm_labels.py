"""Step labels from rollouts, without a human: Math-Shepherd (Wang et al. 2024, section 3.3). N
completions are sampled from the end of each step but the last. The soft label is the share that
reach the right answer; the hard label is 1 if any does. The last step's label is whether the answer
is right, and 0 in a malformed solution. Left out: binary search for the first wrong step,
completions by another policy.
"""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import chz

from posttrain.backend.errors import DataError
from posttrain.backend.ranges import COUNT, SEED, TEMPERATURE
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.types import ModelInput, SamplingParams
from posttrain.tracking.jsonl import append_jsonl, drop_torn_line, read_dataclasses
from preference.solutions import GradedProblem, Solution, grade
from preference.steps import Malformed, StepFormat, StepTokens, split_response
from rl.types import RolloutError
from supervised.rows import read_rows

# in its sets with stepwise supervision
OF_TRL = {"prompt": "input", "completions": "output", "labels": "label"}


@dataclass(frozen=True)
class StepRecord:
    """A solution with a label for each step: a line of the file, in the "prm-v4" format (`input`,
    `output`, `label`) with extra fields. `soft` is None in files of other projects. `written` is the solution if it is
    not its steps with one separator between two, as with a blank line: a model is trained on what it will score."""

    input: str
    output: list[str]
    label: list[int]
    soft: list[float] | None = None
    malformed: Malformed | None = None
    id: str = ""
    written: str | None = None


@chz.chz
class LabelConfig:
    """How steps are labelled."""

    max_tokens: int = chz.field(
        validator=COUNT, doc="most tokens of a whole solution: a completion gets the rest after its prefix"
    )
    form: StepFormat = chz.field(default_factory=StepFormat, doc="how solutions are written")
    num_completions: int = chz.field(default=8, validator=COUNT, doc="completions from the end of each step")
    temperature: float = chz.field(default=1.0, validator=TEMPERATURE, doc="sampling temperature of the completions")
    seed: int = chz.field(default=0, validator=SEED, doc="of the completions")
    chunk_size: int = chz.field(
        default=64, validator=COUNT, doc="solutions labelled by one engine call: a kill loses at most these"
    )


async def label_solutions(
    client: SamplingClient, solutions: Sequence[tuple[GradedProblem, Solution]], config: LabelConfig, path: Path
) -> tuple[list[StepRecord], dict[str, int]]:
    """A record for each distinct solution, in order. Records are appended to `path` chunk by chunk;
    a restart keeps them. Labels depend on the solution, the settings and the policy, not on the
    order.

    Also returns counts: `labelled` now, `cached` before, `duplicate` and `empty` solutions (no
    record), other malformed ones by kind, and `failed`: the verifier raised RolloutError, so there
    is no record and a restart tries again.
    """
    drop_torn_line(path)
    done = {record.id: record for record in read_dataclasses(path, StepRecord)}
    counts = Counter(duplicate=0, empty=0, cached=0, labelled=0, failed=0)
    todo: dict[str, tuple[GradedProblem, Solution, StepTokens]] = {}
    ids: dict[str, None] = {}
    for problem, solution in solutions:
        steps, key = split_response(solution.tokens, problem.renderer, config.form), _id(solution, config)
        if key in ids or not steps.strings:
            counts["duplicate" if key in ids else "empty"] += 1
            continue
        ids[key] = None
        counts["cached"] += key in done
        if steps.malformed:
            counts[steps.malformed] += 1
        if key not in done:
            todo[key] = (problem, solution, steps)
    keys = list(todo)
    for start in range(0, len(keys), config.chunk_size):
        chunk = keys[start : start + config.chunk_size]
        outcomes = await asyncio.gather(*(_label(client, key, *todo[key], config) for key in chunk))
        for key, record in zip(chunk, outcomes, strict=True):
            counts["labelled" if record else "failed"] += 1
            if record:
                append_jsonl(path, asdict(record), sync=True)
                done[key] = record
    return [done[key] for key in ids if key in done], dict(counts)


async def _label(
    client: SamplingClient, key: str, problem: GradedProblem, solution: Solution, steps: StepTokens, config: LabelConfig
) -> StepRecord | None:
    ends = steps.bounds[1:-1]
    try:
        hits = await asyncio.gather(*(_hits(client, f"{key}{end:08x}", problem, solution, end, config) for end in ends))
    except RolloutError:
        return None
    right = float(solution.correct and not steps.malformed)
    soft = [*(count / config.num_completions for count in hits), right]
    written = None if steps.text == config.form.separator.join(steps.strings) else steps.text
    hard = [int(share > 0) for share in soft]
    return StepRecord(solution.question, steps.strings, hard, soft, steps.malformed, key, written)


async def _hits(
    client: SamplingClient, key: str, problem: GradedProblem, solution: Solution, end: int, config: LabelConfig
) -> int:
    """Number of right completions of the first `end` tokens; 0 where max_tokens leaves no room for one."""
    if end >= config.max_tokens:
        return 0
    prefix = solution.tokens[:end]
    stop, seed = problem.renderer.get_stop_sequences(), int(_digest(key), 16) >> 2
    params = SamplingParams(config.max_tokens - end, seed, stop, config.temperature)
    response = await client.sample_async(ModelInput.from_ints(solution.prompt + prefix), config.num_completions, params)
    graded = [await grade(problem, prefix + sequence.tokens) for sequence in response.sequences]
    return sum(completed.correct for completed in graded)


def _id(solution: Solution, config: LabelConfig) -> str:
    """Everything a label depends on except the policy: a file belongs to one policy."""
    settings = [getattr(config, name) for name in ("num_completions", "temperature", "max_tokens", "seed")]
    return _digest(
        json.dumps([solution.prompt, solution.tokens, config.form.separator, config.form.answer_marker, *settings])
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_records(path: str | Path) -> list[StepRecord]:
    """The records of a prm-v4 file of any project, or of one with TRL's names. DataError names the malformed line."""
    records = []
    for where, fields in read_rows(path):
        try:
            of_trl = OF_TRL if fields.keys() >= OF_TRL.keys() else {}
            records.append(_record({of_trl.get(name, name): value for name, value in fields.items()}))
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
    return records


def _record(fields: dict[str, Any]) -> StepRecord:
    if missing := [name for name in ("input", "output", "label") if name not in fields]:
        raise DataError(f"no field {missing[0]!r}; the fields are {', '.join(map(repr, fields))}")
    for name in ("input", "output_prefix", "malformed", "id", "written"):
        if not isinstance(fields.get(name), str if name == "input" else str | None):
            raise DataError(f"{name} must be a text, not {str(fields[name])[:80]}")
    steps, label, soft = fields["output"], fields["label"], fields.get("soft")
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) and step for step in steps):
        raise DataError("output must be a list of at least one step, each a text")
    if not isinstance(label, list) or len(label) != len(steps) or not all(value in (0, 1) for value in label):
        raise DataError(f"label must be a 0 or 1 for each of the {len(steps)} steps, not {str(label)[:80]}")
    if soft is not None and (
        not isinstance(soft, list)
        or not all(isinstance(share, int | float) for share in soft)
        or len(soft) != len(steps)
        or not all(0 <= share <= 1 for share in soft)
    ):
        raise DataError(f"soft must be a share from 0 to 1 for each of the {len(steps)} steps, not {str(soft)[:80]}")
    question = fields["input"] + (fields.get("output_prefix") or "")
    hard, known = [int(value) for value in label], (fields.get("malformed"), fields.get("id") or "")
    return StepRecord(question, steps, hard, soft, *known, fields.get("written"))
