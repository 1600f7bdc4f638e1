"""Prompt distillation: a model that writes sums backwards when a prompt says so learns to do it without
the prompt, from its own answers with it and its own probabilities there (supervised/distill.py).

    python recipes/distillation/prompt.py            # runs/distillation
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from pathlib import Path

import chz

from posttrain.backend.ranges import COUNT
from posttrain.tracking.command_line import run_command
from posttrain.tracking.stages import run_stages, training_stage
from recipes.distillation import teacher
from recipes.distillation.answers import answers_stage
from recipes.distillation.instructed import BackwardsSums, InstructedSumsExamples
from recipes.results import write_results
from recipes.warm_start import shared_settings, warm_start
from supervised import distill
from supervised.data import ConversationFileBuilder


@chz.chz
class Config(teacher.Config):
    """Distillation of a prompt into the weights."""

    model_name: str = chz.field(default="tiny", doc="the model, teacher and student")
    teacher_steps: int = chz.field(default=400, validator=COUNT, doc="supervised steps of the model, 128 sums each")
    prompt: str = chz.field(default="Backwards: ", doc="what the teacher reads and the student does not")
    number: int = chz.field(default=4000, validator=COUNT, doc="answers of the teacher")
    steps: int = chz.field(default=150, validator=COUNT, doc="steps of distillation, 128 answers each")


async def main(config: Config) -> None:
    folder = Path(config.log_path) / f"prompt_{config.seed}"
    data = InstructedSumsExamples(
        num_digits=2,
        instruction=config.prompt,
        backwards=True,
        n_batches=config.teacher_steps,
        batch_size=128,
        seed=config.seed,
    )
    start = warm_start(config, data, folder / "start", "start", lr_schedule="linear", eval_every=200)
    answers = answers_stage(config, folder / "answers.jsonl", start, config.number, config.prompt)
    run = distill.Config(
        dataset=ConversationFileBuilder(path=str(answers.path), batch_size=128, test_size=100, seed=config.seed),
        teacher=str(start.result),
        context=config.prompt,
        load_checkpoint_path=str(start.result),
        num_epochs=config.steps,
        max_steps=config.steps,
        learning_rate=1e-3,
        lr_schedule="linear",
        eval_every=20,
        save_every=0,
        log_path=str(folder / "distill"),
        **shared_settings(config),
    )
    student = training_stage("distill", distill.main, run, [start, answers])
    await run_stages([student])
    prompted = await teacher.accuracy(config, start.result, BackwardsSums(num_digits=2, instruction=config.prompt))
    before, after = [
        await teacher.accuracy(config, stage.result, BackwardsSums(num_digits=2)) for stage in (start, student)
    ]
    write_results(folder, {"prompted": prompted, "before": before, "after": after})
    print(f"held-out sums written backwards: with the prompt {prompted:.3f}; without {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    run_command(main, Config)
