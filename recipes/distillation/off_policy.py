"""Off-policy distillation: a student of another architecture learns, from nothing, from a teacher's answers,
by its most likely tokens at each position (soft) or by the answers alone (hard).

    python recipes/distillation/off_policy.py            # runs/distillation

Soft targets: with a rest class and renormalised, see supervised/distill.py."""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from pathlib import Path
from typing import Any

import chz

from posttrain.backend.ranges import COUNT
from posttrain.tracking.command_line import run_command
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.stages import Stage, run_stages, training_stage
from recipes.distillation import teacher
from recipes.distillation.answers import answers_stage
from recipes.results import write_results
from recipes.warm_start import shared_settings
from supervised import distill, train
from supervised.data import ConversationFileBuilder


@chz.chz
class Config(teacher.Config):
    """A student of the teacher's answers and probabilities."""

    number: int = chz.field(default=10000, validator=COUNT, doc="questions that the teacher answers")
    steps: int = chz.field(default=400, validator=COUNT, doc="steps of each student, 128 answers each")
    top_k: int = chz.field(default=8, validator=COUNT, doc="soft targets per token")


def students(config: Config, teaches: Stage, answers: Stage) -> dict[str, Stage]:
    folder = answers.path.parent
    settings: dict[str, Any] = {
        "dataset": ConversationFileBuilder(path=str(answers.path), batch_size=128, test_size=200, seed=config.seed),
        "num_epochs": config.steps,
        "max_steps": config.steps,
        "learning_rate": 2e-3,
        "lr_schedule": "linear",
        "eval_every": 100,
        "save_every": 0,
        **shared_settings(config),
    }
    soft = settings | {"teacher": str(teaches.result), "top_k": config.top_k}
    runs = {
        "hard": (train.main, train.Config(log_path=str(folder / "hard"), **settings)),
        "soft": (distill.main, distill.Config(log_path=str(folder / "soft"), **soft)),
        "renormalised": (distill.main, distill.Config(log_path=str(folder / "renormalised"), rest=False, **soft)),
    }
    return {name: training_stage(name, main, run, [teaches, answers]) for name, (main, run) in runs.items()}


async def main(config: Config) -> None:
    folder, teaches = Path(config.log_path) / f"off_policy_{config.seed}", teacher.teacher_stage(config)
    answers = answers_stage(config, folder / "answers.jsonl", teaches, config.number)
    stages = students(config, teaches, answers)
    await run_stages(list(stages.values()))
    results = {"teacher": await teacher.accuracy(config, teaches.result)}
    print(f"held-out accuracy of the teacher {results['teacher']:.3f}")
    for name, stage in stages.items():
        nll = read_metrics(stage.path)[-1]["test/nll"]
        results[name] = await teacher.accuracy(config, stage.result)
        print(f"{name:13s} {results[name]:.3f}   nats per token of unseen answers {nll:.4f}")
    write_results(folder, results)


if __name__ == "__main__":
    run_command(main, Config)
