"""Evaluates models on an environment or a benchmark, beside each other: means with standard errors,
pass@k, maj@k, paired differences, a page of transcripts. Samples are kept as they finish; the same
command goes on after a kill, and samples more where num_samples or num_problems has grown.

  python -m rl.evaluate models=runs/rl env=gsm8k env.data_dir=gsm8k num_problems=200
  python -m rl.evaluate models=runs/sft,runs/rl,Qwen/Qwen2.5-0.5B-Instruct env=math500 num_samples=16
"""

# run as a file, this folder is first on the path, and its types.py would shadow the standard one
if not __package__:
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import asyncio
import json
from collections import defaultdict
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chz

from posttrain.backend.choices import check_choices
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, SEED, TEMPERATURE, WHOLE
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.renderers import get_renderer
from posttrain.renderers.types import Renderer
from posttrain.tracking.command_line import by_name, run_command
from posttrain.tracking.jsonl import append_jsonl, drop_torn_line, read_jsonl, write_atomically
from posttrain.tracking.model_source import ModelSource, find_model
from posttrain.tracking.progress import TrainingProgress
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.run_lock import RunLock, lock_folder
from posttrain.tracking.seeds import EVALUATION
from posttrain.tracking.settings import (
    changes,
    changes_text,
    config_to_json,
    read_settings,
    with_later_options,
    write_settings,
)
from rl.evaluation_page import notices, print_results, write_page
from rl.evaluation_results import Estimates, Ratios, Values, differences, estimates, problem_values
from rl.evaluators import all_groups, merged, powers_of_two
from rl.names import BENCHMARKS, ENVS
from rl.rollout_state import group_from_json, group_to_json
from rl.rollouts import Policy, RolloutLimits, check_failures, do_group_rollout, raise_first
from rl.step_checks import beyond_context, held_out
from rl.types import EnvGroupBuilder, RLDatasetBuilder, TrajectoryGroup


@chz.chz
class Config:
    """Evaluation of models on the held-out problems of an environment or a benchmark."""

    models: list[str] = chz.field(
        doc="run folders (their last checkpoint), checkpoints, model folders, adapters, presets or hub names, with "
        "commas; differences are from the first"
    )
    env: RLDatasetBuilder = chz.field(default_factory=by_name(ENVS["arithmetic"]), doc="the environment or benchmark")
    num_problems: int | None = chz.field(default=None, validator=COUNT, doc="the first problems; None = all")
    num_samples: int = chz.field(default=1, validator=COUNT, doc="samples per problem")
    ks: tuple[int, ...] | None = chz.field(
        default=None, validator=COUNT, doc="k of pass@k, maj@k and best@k; None = the powers of two up to num_samples"
    )
    temperature: float | None = chz.field(
        default=None, validator=TEMPERATURE, doc="sampling temperature; None = 0 (greedy) for one sample, 1 for several"
    )
    max_tokens: int | None = chz.field(
        default=None, validator=COUNT, doc="most tokens sampled per turn; None = what the environment recommends"
    )
    renderer_name: str | None = chz.field(
        default=None, doc="role_colon, chat_template or plain; None = that of the model's run, else the model's own"
    )
    limits: RolloutLimits = chz.field(default_factory=RolloutLimits, doc="limits of a rollout")
    concurrent_rollouts: int = chz.field(default=1024, validator=COUNT, doc="most groups of rollouts in flight")
    seed: int = chz.field(default=0, validator=SEED, doc="seed of sampling, and of a preset's weights")
    num_transcripts: int = chz.field(default=50, validator=WHOLE, doc="problems shown on a page of transcripts")
    log_path: str = log_path_field("runs/eval", doc="the folder of samples and results")
    backend: BackendConfig = chz.field(default_factory=BackendConfig, doc="how this machine samples")

    @chz.validate
    def _check_choices(self) -> None:
        check_choices(self)

    @property
    def sampling_temperature(self) -> float:
        return (0.0 if self.num_samples == 1 else 1.0) if self.temperature is None else self.temperature

    def sample_sizes(self) -> tuple[int, ...]:
        return self.ks or powers_of_two(self.num_samples)


@dataclass(frozen=True)
class Evaluated:
    """A model's samples: a merged group, and its values, for each problem."""

    model: ModelSource
    label: str
    groups_P: Sequence[TrajectoryGroup]
    values: Values
    ratios: Ratios
    page: str

    def by_tag(self) -> dict[str, Estimates]:
        """Of tags that only some of the problems have."""
        places: dict[str, list[int]] = defaultdict(list)
        for p, group in enumerate(self.groups_P):
            for tag in set(group.tags):
                places[tag].append(p)
        return {
            tag: estimates(self.values, self.ratios, places_T)
            for tag, places_T in sorted(places.items())
            if len(places_T) < len(self.groups_P)
        }


async def main(config: Config) -> list[Evaluated]:
    """Writes results.json, report.html and a page of transcripts per model to `log_path`."""
    _check(config)
    models = [find_model(name) for name in config.models]
    labels = _labels(models)
    folder = Path(config.log_path)
    lock = _open_folder(folder)
    evaluated = [await _evaluate(config, model, label) for model, label in zip(models, labels, strict=True)]
    results = to_json(config, evaluated)
    write_atomically(folder / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
    print_results(results)
    print(*(f"WARNING {notice}\n" for notice in notices(results)), sep="", end="")
    print(f"report: {write_page(folder / 'report.html', results)}")
    lock.close()
    return evaluated


def _check(config: Config) -> None:
    if not config.models:
        raise ConfigError("models= names no model; give folders or names, with commas")
    if largest := [k for k in config.sample_sizes() if k > config.num_samples]:
        raise ConfigError(f"ks={largest[0]} is more than num_samples={config.num_samples}")
    if config.num_samples > 1 and config.sampling_temperature == 0:
        raise ConfigError("temperature=0 gives the same sample every time: num_samples > 1 needs one above 0")


def _open_folder(folder: Path) -> RunLock:
    if (folder / "metrics.jsonl").exists():
        raise ConfigError(f"{folder} holds a training run: choose another log_path for its evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    return lock_folder(folder)


def _labels(models: Sequence[ModelSource]) -> list[str]:
    labels = [model.label for model in models]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ConfigError(
            f"two models have the label {twice[0]}, their last folder: link or copy one under another name, or evaluate "
            "them with separate log_path"
        )
    return labels


async def _evaluate(config: Config, model: ModelSource, label: str) -> Evaluated:
    folder = Path(config.log_path) / label
    renderer_name = config.renderer_name or model.renderer_name
    renderer = get_renderer(renderer_name, load_tokenizer(str(model.folder or model.name), config.backend.max_length))
    builders_P = all_groups(await held_out(config.env, renderer))[: config.num_problems]
    max_tokens = config.max_tokens or config.env.recommended_max_tokens()
    if notice := beyond_context(max_tokens, renderer.tokenizer):
        print(f"WARNING {label}: {notice}", flush=True)
    saved = _open_samples(config, model, folder, renderer_name, max_tokens)
    missing = [(p, s) for s in range(config.num_samples) for p in range(len(builders_P)) if (p, s) not in saved]
    if missing:
        if saved:
            print(f"{label}: {len(saved)} samples exist, {len(missing)} are left to draw", flush=True)
        from posttrain.backend.service_client import ServiceClient  # with torch, for which --help does not wait

        with ServiceClient(config.backend) as service:
            policy = Policy(model.open(service, config.seed), max_tokens, config.sampling_temperature)
            await _sample(config, label, policy, builders_P, missing, folder / "samples.jsonl", saved)
    groups_P = [
        merged([group_from_json(saved.pop((p, s)), builder) for s in range(config.num_samples)])
        for p, builder in enumerate(builders_P)
    ]
    check_failures(groups_P, config.limits)
    page = _transcripts(config, label, groups_P, renderer)
    values = problem_values(groups_P, config.sample_sizes())
    return Evaluated(model, label, groups_P, values, config.env.ratios(), page)


def _open_samples(
    config: Config, model: ModelSource, folder: Path, renderer_name: str | None, max_tokens: int
) -> dict[tuple[int, int], dict[str, Any]]:
    """The groups on disk by (problem, sample), without those that lost members, which are sampled
    again. ConfigError if other settings made them."""
    made_with = {
        "model": str(model.folder.resolve()) if model.folder else model.name,
        "weights": model.fingerprint(),
        "env": config_to_json(config.env),
        "renderer_name": renderer_name,
        "temperature": config.sampling_temperature,
        "max_tokens": max_tokens,
        "max_length": config.backend.max_length,
        "limits": config_to_json(config.limits),
        "seed": config.seed,
    }
    folder.mkdir(exist_ok=True)
    if (folder / "samples.jsonl").exists():
        before = read_settings(folder / "made_with.json")
        if different := changes(with_later_options(before, {"env": config.env, "limits": config.limits}), made_with):
            raise ConfigError(
                f"the samples in {folder} were made with {changes_text(different)}: delete that folder to sample anew, "
                "or choose another log_path"
            )
        drop_torn_line(folder / "samples.jsonl")
    write_settings(folder / "made_with.json", made_with)
    records = read_jsonl(folder / "samples.jsonl", {"problem": int, "sample": int, "group": dict})
    return {
        (record["problem"], record["sample"]): record["group"] for record in records if not record["group"]["errors"]
    }


async def _sample(
    config: Config,
    label: str,
    policy: Policy,
    builders_P: Sequence[EnvGroupBuilder],
    missing: Sequence[tuple[int, int]],
    file: Path,
    saved: dict[tuple[int, int], dict[str, Any]],
) -> None:
    """Adds the missing groups to `saved` and to the file, each when it is finished."""
    slots, done = asyncio.Semaphore(config.concurrent_rollouts), len(saved)
    with TrainingProgress(done + len(missing), done, label) as progress:

        async def one_group(p: int, s: int) -> None:
            nonlocal done
            async with slots:
                # a copy, since each builder's `cleanup` is called when its own rollouts are over
                seed = (config.seed, EVALUATION, s, p)
                group = await do_group_rollout(copy(builders_P[p]), policy, seed, config.limits)
            saved[p, s] = group_to_json(group)
            append_jsonl(file, {"problem": p, "sample": s, "group": saved[p, s]})
            progress.update(done)
            done += 1

        try:
            async with asyncio.TaskGroup() as tasks:
                for p, s in missing:
                    tasks.create_task(one_group(p, s))
        except BaseExceptionGroup as errors:
            raise_first(errors)


def _transcripts(config: Config, label: str, groups_P: Sequence[TrajectoryGroup], renderer: Renderer) -> str:
    from posttrain.tracking.transcripts import transcript_page
    from rl.transcripts import transcript_group

    shown = [transcript_group(group, None, renderer.tokenizer) for group in groups_P[: config.num_transcripts]]
    page = Path(config.log_path) / f"{label}.html"
    rest = f"of {len(groups_P)}; all samples are in {label}/samples.jsonl"
    write_atomically(page, transcript_page(label, shown, len(shown), rest, {"report.html": "all models"}))
    return page.name


def to_json(config: Config, evaluated: Sequence[Evaluated]) -> dict[str, Any]:
    """All numbers of the evaluation, and its settings."""
    first, *others = evaluated
    paired = []
    for other in others:
        if not _same_problems(_questions(other), _questions(first)):
            print(f"{other.label} and {first.label} were not given the same problems: no paired differences")
            continue
        found = differences(other.values, first.values, first.ratios)
        paired.append({"model": other.label, "baseline": first.label, "metrics": _json(found)})
    models = [
        {
            "label": one.label,
            "model": one.model.name,
            "folder": str(one.model.folder) if one.model.folder else None,
            "problems": len(one.groups_P),
            "samples_lost": sum(len(group.errors) for group in one.groups_P),
            "metrics": _json(estimates(one.values, one.ratios)),
            "tags": {tag: _json(found) for tag, found in one.by_tag().items()},
            "transcripts": one.page,
        }
        for one in evaluated
    ]
    return {"settings": config_to_json(config), "models": models, "paired": paired}


def _questions(evaluated: Evaluated) -> list[str | None]:
    """Of each problem, as the environment logs it."""
    turns_P = [[turn for t in group.trajectories_G for turn in t.transitions] for group in evaluated.groups_P]
    return [next((turn.logs["question"] for turn in turns if "question" in turn.logs), None) for turns in turns_P]


def _same_problems(questions_P: Sequence[str | None], others_P: Sequence[str | None]) -> bool:
    """A problem whose samples were all lost has no question (None), and differs from none."""
    return len(questions_P) == len(others_P) and all(
        None in pair or pair[0] == pair[1] for pair in zip(questions_P, others_P, strict=True)
    )


def _json(found: Estimates) -> dict[str, Any]:
    return {name: estimate.to_json() for name, estimate in found.items()}


def command() -> None:
    run_command(main, Config, {"env": ENVS | BENCHMARKS})


if __name__ == "__main__":
    command()
