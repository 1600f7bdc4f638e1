"""The stages before a process reward model: a policy's solutions, and labels of their steps
(preference/prm_labels.py).
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from posttrain.backend.config import BackendConfig
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import SamplingParams
from posttrain.tracking.jsonl import as_dataclass, read_jsonl, write_jsonl
from posttrain.tracking.stages import Stage
from preference.prm_labels import LabelConfig, label_solutions
from preference.solutions import GradedProblem, Solution, sample_solutions


def solutions_stage(
    file: Path,
    policy: Stage,
    problems_P: Sequence[GradedProblem],
    number: int,
    params: SamplingParams,
    settings: dict[str, Any],
    backend: BackendConfig,
) -> Stage:
    """Writes `file`: a line for each problem with `number` solutions sampled from `policy`.
    `settings` are the settings of the problems.
    """

    async def make() -> None:
        with ServiceClient(backend) as service:
            client = service.create_sampling_client(str(policy.result))
            solutions_P_G = await sample_solutions(client, problems_P, number, params)
        write_jsonl(file, ({"solutions": [asdict(solution) for solution in group]} for group in solutions_P_G))

    return Stage(file.stem, file, {**settings, "number": number, "params": params}, make, [policy])


def labels_stage(
    solutions: Stage,
    completer: Stage,
    problems_P: Sequence[GradedProblem],
    labelling: LabelConfig,
    backend: BackendConfig,
) -> Stage:
    """Writes labels.jsonl beside the solutions: a line for each solution. An interrupted stage
    resumes.
    """
    file = solutions.path.with_name("labels.jsonl")

    async def make() -> None:
        solutions_P_G = read_solutions(solutions.path)
        pairs = [
            (problem, solution) for problem, group in zip(problems_P, solutions_P_G, strict=True) for solution in group
        ]
        with ServiceClient(backend) as service:
            client = service.create_sampling_client(str(completer.result))
            _, counts = await label_solutions(client, pairs, labelling, stage.unfinished)
        stage.unfinished.rename(file)
        print("labels:", ", ".join(f"{count} {name}" for name, count in counts.items()))

    stage = Stage("labels", file, labelling, make, [solutions, completer])
    return stage


def read_solutions(file: Path) -> list[list[Solution]]:
    groups = read_jsonl(file, {"solutions": list})
    return [[as_dataclass(fields, Solution, str(file)) for fields in group["solutions"]] for group in groups]
