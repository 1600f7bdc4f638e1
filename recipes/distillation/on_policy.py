"""On-policy distillation against RL, from one start: a student of another architecture samples sums, and
learns from a teacher's logprobs of its tokens (rl/distill.py), or from the verifier (GRPO).

    python recipes/distillation/on_policy.py                                  # runs/distillation
    python recipes/distillation/on_policy.py seeds=0,1,2

Prints the sampled tokens that each needs for 0.95 of the teacher's accuracy; draws on_policy.png."""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from collections.abc import Mapping, Sequence
from pathlib import Path

import chz

from envs.arithmetic import ArithmeticBuilder, ArithmeticExamplesBuilder
from posttrain.backend.ranges import COUNT, LEARNING_RATE, NON_NEGATIVE, SHARE, WHOLE
from posttrain.tracking.command_line import run_command
from posttrain.tracking.figures import Curve, Panel, Records, at_multiples, draw_panels, over_total, save_figure
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.stages import Stage, run_stages, training_stage
from recipes.distillation import teacher
from recipes.results import write_results
from recipes.warm_start import preset, seeds_of, shared_settings, warm_start
from rl import train
from rl.algorithms import ALGORITHMS
from rl.distill import Distillation

CORRECT, SAMPLED = "test/env/all/correct", "env/all/total_ac_tokens"


@chz.chz
class Config(teacher.Config):
    """On-policy distillation of two-digit addition, beside GRPO from the same start."""

    seeds: str = chz.field(default="0", doc="seeds of the students, by comma; option `seed` is not read")
    start_nll: float = chz.field(
        default=0.3, validator=NON_NEGATIVE, doc="nats per token at which the student's warm start ends"
    )
    steps: int = chz.field(default=150, validator=COUNT, doc="steps of distillation: 256 sums, one rollout each")
    rl_steps: int = chz.field(default=400, validator=WHOLE, doc="steps of GRPO: 64 sums, 8 rollouts each; 0 = none")
    learning_rate: float = chz.field(default=1e-3, validator=LEARNING_RATE, doc="of both, falling to 0")
    share: float = chz.field(default=0.95, validator=SHARE, doc="part of the teacher's accuracy to be reached")


def run_config(config: Config, seed: int, algorithm: str, start: Stage, folder: Path) -> train.Config:
    distills = algorithm == "distill"
    steps, groups, members = (config.steps, 256, 1) if distills else (config.rl_steps, 64, 8)
    return chz.replace(
        preset(ALGORITHMS[algorithm].settings),
        env=ArithmeticBuilder(num_digits=2, n_batches=steps, batch_size=groups, group_size=members, seed=seed),
        distill=Distillation(teacher=str(teacher.teacher_stage(config).result) if distills else None),
        load_checkpoint_path=str(start.result),
        learning_rate=config.learning_rate,
        lr_schedule="linear",
        eval_every=10 if distills else 25,
        save_every=100,
        keep_checkpoints=1,
        transcript_every=100,
        log_path=str(folder / algorithm),
        **shared_settings(config) | {"seed": seed},
    )


def stages_of(config: Config, seed: int) -> list[Stage]:
    """Distillation and RL of a student, from its warm start."""
    folder, teaches = Path(config.log_path) / f"on_policy_{seed}", teacher.teacher_stage(config)
    sums = ArithmeticExamplesBuilder(num_digits=2, n_batches=1000, batch_size=128, seed=seed)
    settings = {"stop_at_nll": config.start_nll, "eval_every": 0, "seed": seed}
    start = warm_start(config, sums, folder / "start", f"start_{seed}", **settings)
    needs: dict[str, list[Stage]] = {"distill": [start, teaches]} | ({"grpo": [start]} if config.rl_steps else {})
    return [
        training_stage(f"{name}_{seed}", train.main, run_config(config, seed, name, start, folder), before)
        for name, before in needs.items()
    ]


def over_tokens(records: Records) -> Curve:
    return over_total(records, CORRECT, SAMPLED)


def first_at(curve: Curve, level: float) -> str:
    reached = [tokens for tokens, value in zip(*curve, strict=True) if value >= level]
    return f"{reached[0]:,}" if reached else f"not within {curve.steps_K[-1]:,}"


async def main(config: Config) -> None:
    seeds = seeds_of(config.seeds)
    await run_stages([stage for seed in seeds for stage in stages_of(config, seed)])
    best = await teacher.accuracy(config, teacher.teacher_stage(config).result)
    write_results(config.log_path, {"teacher": best})
    level = config.share * best
    print(f"teacher: {best:.3f} of the held-out sums; sampled tokens until {level:.3f}:")
    runs = {
        name: [read_metrics(Path(config.log_path) / f"on_policy_{seed}" / name) for seed in seeds]
        for name in (("distill", "grpo") if config.rl_steps else ("distill",))
    }
    for name, of_seeds in runs.items():
        for seed, curve in zip(seeds, map(over_tokens, of_seeds), strict=True):
            accuracy = f"{curve.values_K[0]:.3f} -> {curve.values_K[-1]:.3f}"
            print(f"{name:8s} seed {seed}  {first_at(curve, level):>18s}   accuracy {accuracy}")
    picture = draw(runs, Path(config.log_path) / "on_policy.png", {f"{config.share:g} of the teacher": level})
    print(f"curves: {picture}")


def draw(runs: Mapping[str, Sequence[Records]], out: Path, levels: Mapping[str, float]) -> Path:
    """Held-out accuracy over sampled tokens."""
    shared = {name: [at_multiples(over_tokens(records), 5000) for records in seeds] for name, seeds in runs.items()}
    return save_figure(draw_panels([Panel("held-out accuracy", shared, levels, xlabel="sampled tokens")]), out)


if __name__ == "__main__":
    run_command(main, Config)
