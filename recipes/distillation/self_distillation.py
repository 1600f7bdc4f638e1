"""Self-distillation (Shenfeld et al. 2026; Zhao et al. 2026): the teacher is the student's own start,
which reads the solution before the question. The student samples without it, and learns from the
teacher's logprobs of its tokens. No reward, no other model; solutions are never imitated.

    python recipes/distillation/self_distillation.py            # runs/distillation
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from pathlib import Path

import chz

from envs.arithmetic import ArithmeticBuilder
from posttrain.backend.ranges import COUNT
from posttrain.tracking.command_line import run_command
from posttrain.tracking.figures import read_curve
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.stages import run_stages, training_stage
from recipes.distillation import teacher
from recipes.distillation.instructed import InstructedSumsExamples
from recipes.warm_start import shared_settings, warm_start
from rl import train
from rl.advantages import NoReward
from rl.distill import POLICY, Distillation


@chz.chz
class Config(teacher.Config):
    """Distillation of a model that knows the solution into itself."""

    model_name: str = chz.field(default="tiny", doc="the model, teacher and student")
    teacher_steps: int = chz.field(default=250, validator=COUNT, doc="supervised steps of the model, 128 sums each")
    context: str = chz.field(default="{solution}! ", doc="what the teacher reads before the question")
    live: bool = chz.field(default=False, doc="the teacher is the student's present weights, not its start")
    steps: int = chz.field(default=150, validator=COUNT, doc="steps of distillation: 256 sums, one rollout each")


async def main(config: Config) -> None:
    folder = Path(config.log_path) / f"self_{config.seed}"
    data = InstructedSumsExamples(
        num_digits=2, instruction=config.context, n_batches=config.teacher_steps, batch_size=128, seed=config.seed
    )
    start = warm_start(config, data, folder / "start", "start", eval_every=0)
    run = train.Config(
        env=ArithmeticBuilder(num_digits=2, n_batches=config.steps, batch_size=256, group_size=1, seed=config.seed),
        distill=Distillation(teacher=POLICY if config.live else str(start.result), context=config.context),
        advantage=NoReward(),
        load_checkpoint_path=str(start.result),
        learning_rate=1e-3,
        lr_schedule="linear",
        eval_every=25,
        save_every=0,
        transcript_every=100,
        log_path=str(folder / ("live" if config.live else "frozen")),
        **shared_settings(config),
    )
    student = training_stage("self_distillation", train.main, run, [start])
    await run_stages([student])
    correct = read_curve(read_metrics(student.path), "test/env/all/correct").values_K
    print(f"held-out sums, without the solution: {correct[0]:.3f} -> {correct[-1]:.3f}")


if __name__ == "__main__":
    run_command(main, Config)
