"""Tool calls from nothing: a small model learns to call a tool, and the same model to answer the same
questions without it. Here a calculator; retrieval.py has a search.

    python recipes/tool_calls/train.py                      # runs/tool_calls
    python recipes/tool_calls/train.py seed=1 env.num_digits=3 log_path=runs/again

Each of the two imitates its demonstrations, then RL goes on: 1 for the right answer, nothing for a
call. README.md has the results.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from pathlib import Path

import chz

from envs.calculator import SumsBuilder, SumsExamplesBuilder
from envs.retrieval import RetrievalBuilder, RetrievalExamplesBuilder
from posttrain.backend.config import BackendConfig
from posttrain.backend.ranges import COUNT, LEARNING_RATE, NON_NEGATIVE, SEED
from posttrain.tracking.command_line import run_command
from posttrain.tracking.figures import Panel, curves_by_label, draw_panels, save_figure
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.run_folder import BehaviorIfExists
from posttrain.tracking.stages import Stage, run_stages, training_stage
from recipes.warm_start import shared_settings, torch_backend, warm_start
from rl import train

EXAMPLES = {SumsBuilder: SumsExamplesBuilder, RetrievalBuilder: RetrievalExamplesBuilder}
MEMORY = "from_memory"


@chz.chz
class Config:
    """A calculator called by a small model, against the same model without it."""

    env: SumsBuilder = chz.field(
        default_factory=lambda: SumsBuilder(prompt="{expression}", list_tools=False, batch_size=16, group_size=8),
        doc="the sums, and what an episode may do",
    )
    model_name: str = chz.field(default="tiny", doc="a preset, a local folder, or a Hugging Face hub name")
    renderer_name: str | None = chz.field(default="chat_template", doc="a renderer that writes tools")
    warm_start_nll: float = chz.field(
        default=0.03, validator=NON_NEGATIVE, doc="nats per token of a batch at which imitation ends"
    )
    warm_start_steps: int = chz.field(default=720, validator=COUNT, doc="most supervised steps")
    demonstrations: int = chz.field(default=16, validator=COUNT, doc="demonstrations of a supervised step")
    num_steps: int = chz.field(default=60, validator=COUNT, doc="steps of RL")
    learning_rate: float = chz.field(default=3e-4, validator=LEARNING_RATE, doc="of RL, at its first step")
    seed: int = chz.field(default=0, validator=SEED, doc="seed of the weights, the data and the sampling")
    log_path: str = log_path_field("runs/tool_calls", "folder of the four runs and the picture")
    behavior_if_log_dir_exists: BehaviorIfExists = chz.field(default="ask", doc="what to do with existing run folders")
    backend: BackendConfig = torch_backend()


def labels_of(config: Config) -> tuple[str, str]:
    return f"with_{config.env.tools()[0].spec['name']}", MEMORY


def stages_of(config: Config, label: str) -> list[Stage]:
    """The warm start and RL, with tools or without."""
    env = chz.replace(config.env, use_tools=label != MEMORY, n_batches=config.num_steps, seed=config.seed)
    examples = EXAMPLES[type(env)]
    shared = {name: getattr(env, name) for name in chz.chz_fields(examples) if name in chz.chz_fields(env)}
    examples = examples(**shared | {"n_batches": config.warm_start_steps, "batch_size": config.demonstrations})
    folder = Path(config.log_path) / label
    ends = {"lr_schedule": "linear", "stop_at_nll": config.warm_start_nll}
    start = warm_start(config, examples, folder / "warm_start", f"{label}/warm_start", **ends)
    run = train.Config(
        env=env,
        load_checkpoint_path=str(start.result),
        learning_rate=config.learning_rate,
        lr_schedule="linear",
        eval_every=10,
        save_every=0,
        log_path=str(folder / "rl"),
        **shared_settings(config),
    )
    return [start, training_stage(f"{label}/rl", train.main, run, [start], config.behavior_if_log_dir_exists)]


def report(config: Config) -> str:
    """A line for each policy on the held-out sums."""
    lines = [f"{'held out':32}  correct   calls  well formed  cut off"]
    for label in labels_of(config):
        records = [r for r in read_metrics(Path(config.log_path, label, "rl")) if "test/env/all/correct" in r]
        for name, record in (("warm start", records[0]), (f"{config.num_steps} steps of RL", records[-1])):
            calls, malformed = (record[f"test/env/all/{key}"] for key in ("calls", "malformed_calls"))
            share = f"{1 - malformed / calls:11.1%}" if calls else "          -"
            lines.append(
                f"{label + ', ' + name:32}  {record['test/env/all/correct']:7.1%}  {calls:6.2f}  {share}"
                f"  {record['test/env/all/frac_truncated']:7.1%}"
            )
    return "\n".join(lines)


def picture(config: Config) -> Path:
    runs = {label: [read_metrics(Path(config.log_path, label, "rl"))] for label in labels_of(config)}
    called = {label: run for label, run in runs.items() if label != MEMORY}
    panels = [
        Panel("held-out tasks right, greedy", curves_by_label(runs, "test/env/all/correct")),
        Panel("rollouts right, at temperature 1", curves_by_label(runs, "env/all/correct")),
        Panel("well-formed calls of rollouts", curves_by_label(called, "env/all/well_formed"), limits=(0.5, 1.02)),
    ]
    return save_figure(draw_panels(panels), Path(config.log_path) / "tool_calls.png")


async def main(config: Config) -> None:
    await run_stages([stage for label in labels_of(config) for stage in stages_of(config, label)])
    print(report(config))
    print(f"picture: {picture(config)}")


if __name__ == "__main__":
    run_command(main, Config)
