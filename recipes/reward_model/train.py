"""Two kinds of reward model, scalar (Bradley-Terry) and label token, on the same comparisons.

    python recipes/reward_model/train.py                       # notes with kind words; runs/reward_model
    python recipes/reward_model/train.py comparisons=gsm8k_solutions \\
        comparisons.path=example_model_solutions.jsonl log_path=runs/reward_model_gsm8k

Prints held-out accuracy with its standard error, calibration and the agreement of both orders, next
to two baselines: chance, and preferring the longer (or shorter) answer. reliability.png plots the
calibration.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from pathlib import Path

import chz

from envs.kind_words import KindWordsComparisons
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, SEED, WHOLE
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.renderers import get_renderer
from posttrain.tracking.command_line import run_command
from posttrain.tracking.metrics_log import Metrics
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.run_folder import BehaviorIfExists
from preference import train_reward_model
from preference.bradley_terry import BradleyTerryJudgeBuilder, PreferencePairsBuilder, ScalarModelBuilder
from preference.label_model import LabelExamplesBuilder, LabelModelBuilder
from preference.names import DATASETS
from preference.reward_evaluation import Evaluation, evaluate_judge, length_baseline, plot_reliability
from preference.reward_types import JudgeBuilder
from preference.types import ComparisonDatasetBuilder
from recipes.results import write_results


@chz.chz
class Config:
    """A scalar and a label-token reward model on the same comparisons."""

    comparisons: ComparisonDatasetBuilder = chz.field(
        default_factory=KindWordsComparisons, doc="training and held-out comparisons"
    )
    kinds: str = chz.field(default="scalar,label", doc="kinds of reward model, by comma")
    model_name: str = chz.field(default="tiny", doc="a preset, a local folder, or a Hugging Face hub name")
    renderer_name: str = chz.field(default="plain", doc="role_colon, chat_template or plain")
    batch_size: int = chz.field(
        default=64, validator=COUNT, doc="examples per step; a label model has two per comparison, one in each order"
    )
    num_epochs: int = chz.field(default=3, validator=COUNT, doc="passes over the comparisons")
    eval_every: int = chz.field(
        default=60, validator=WHOLE, doc="held-out evaluation before every this many steps, and at the end"
    )
    seed: int = chz.field(default=0, validator=SEED, doc="seed of the weights and the order")
    log_path: str = log_path_field("runs/reward_model", "folder of both runs")
    behavior_if_log_dir_exists: BehaviorIfExists = chz.field(
        default="delete", doc="what to do with the last runs' folders"
    )
    backend: BackendConfig = chz.field(default_factory=BackendConfig, doc="how this machine trains")


LEARNING_RATES = {"scalar": 1e-3, "label": 2e-3}


def training(config: Config, kind: str) -> train_reward_model.Config:
    builder = PreferencePairsBuilder if kind == "scalar" else LabelExamplesBuilder
    return train_reward_model.Config(
        dataset=builder(comparisons=config.comparisons, batch_size=config.batch_size, seed=config.seed),
        model_name=config.model_name,
        renderer_name=config.renderer_name,
        learning_rate=LEARNING_RATES[kind],
        num_epochs=config.num_epochs,
        eval_every=config.eval_every,
        save_every=0,
        seed=config.seed,
        log_path=f"{config.log_path}/{kind}",
        behavior_if_log_dir_exists=config.behavior_if_log_dir_exists,
        backend=config.backend,
    )


def saved_judge(config: Config, kind: str) -> JudgeBuilder:
    """The trained model, opened as in an environment. The evaluation itself swaps the order."""
    path = f"{config.log_path}/{kind}/checkpoints/final"
    if kind == "scalar":
        return BradleyTerryJudgeBuilder(model=ScalarModelBuilder(path=path, backend=config.backend))
    return LabelModelBuilder(path=path, both_orders=False, backend=config.backend)


async def main(config: Config) -> None:
    from rich.console import Console
    from rich.table import Table

    kinds = config.kinds.split(",")
    if unknown := set(kinds) - LEARNING_RATES.keys():
        raise ConfigError(
            f"kinds={config.kinds}: {', '.join(unknown)} is unknown; choose from {', '.join(LEARNING_RATES)}"
        )
    tokenizer = load_tokenizer(config.model_name, config.backend.max_length)
    table = Table(
        "", "accuracy", "always the longer*", "chance", "ECE", "both orders agree", "held out", title=config.log_path
    )
    evaluations: dict[str, Evaluation] = {}
    results: Metrics = {}
    for kind in kinds:
        run = training(config, kind)
        await train_reward_model.main(run)
        train_D, test_D = run.dataset.load(get_renderer(config.renderer_name, tokenizer))
        evaluations[kind] = await evaluate_judge(saved_judge(config, kind)(tokenizer), test_D)
        m = evaluations[kind].metrics()
        baseline = length_baseline(train_D, test_D)
        results |= {f"{kind}/{name}": value for name, value in m.items()} | {f"{kind}/always_longer": baseline}
        row = (f"{baseline:.3f}", "0.500", f"{m['ece']:.3f}", f"{m['swap_agreement']:.3f}", f"{m['comparisons']:.0f}")
        table.add_row(kind, f"{m['accuracy']:.3f} +- {m['accuracy_stderr']:.3f}", *row)
    Console().print(table)
    write_results(config.log_path, results)
    print("* or always the shorter, whichever is right more often on the training comparisons")
    print(f"calibration: {plot_reliability(evaluations, Path(config.log_path) / 'reliability.png')}")


if __name__ == "__main__":
    run_command(main, Config, {"comparisons": DATASETS})
