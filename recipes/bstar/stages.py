"""The stages before the rounds: the warm-started policy and, if the reward needs it, a process
reward model (PRM), which stays fixed.

The warm start imitates human solutions and stops early, so that the policy still errs; without
solutions it is the model as it is. More training makes it the completer, which labels the PRM's data
by rollouts and is the PRM's trunk.
"""

from collections.abc import Awaitable
from pathlib import Path

import chz

from posttrain.backend.errors import ConfigError
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import Datum, LoraConfig, SamplingParams
from posttrain.renderers.types import Renderer
from posttrain.tracking.datasets import ListDataset
from posttrain.tracking.jsonl import read_jsonl
from posttrain.tracking.stages import Stage
from preference import train_prm
from preference.prm_labels import LabelConfig
from preference.step_data import StepExamplesBuilder
from recipes.bstar.config import Config
from recipes.bstar.tasks import Task, TaskBuilder
from recipes.libraries.labelled_solutions import labels_stage, solutions_stage
from recipes.warm_start import shared_settings, warm_start
from supervised.data import conversation_to_datum
from supervised.types import SupervisedDatasetBuilder


@chz.chz
class HumanSolutions(SupervisedDatasetBuilder):
    """The task's human solutions."""

    task: TaskBuilder = chz.field(doc="the task")

    def __call__(self, renderer: Renderer) -> tuple[ListDataset[Datum], None]:
        data = [conversation_to_datum(query.messages(), renderer) for query in self.task(renderer).warm_start]
        return ListDataset(data, min(self.batch_size, len(data)), self.seed), None


def policy_path(config: Config) -> Path:
    return config.folder / "warm_start" / "checkpoints" / "final"


def prm_path(config: Config) -> Path:
    return config.folder / "prm" / "checkpoints" / "final"


def beginning(config: Config, task: Task) -> list[Stage]:
    """The stages in order; the last is the one that the methods need."""
    if task.warm_start and config.warm_start_steps:
        policy = _imitation(config, "warm_start", config.warm_start_steps, config.warm_start_nll, [])
    else:
        policy = _as_it_is(config)
    if not config.reward.needs_prm:
        return [policy]
    completer = policy
    if config.completer_steps:
        if not task.warm_start:
            raise ConfigError(
                "the task has no human solutions to train the completer on: set reward=outcome, or completer_steps=0, "
                "with which the policy completes"
            )
        completer = _imitation(config, "completer", config.completer_steps, config.completer_nll, [policy])
    file, problems_P = config.folder / "prm_data" / "solutions.jsonl", task.prm
    params, number = SamplingParams(task.max_tokens, seed=1000 * config.seed + 1), config.prm_solutions
    solutions = solutions_stage(file, policy, problems_P, number, params, {"task": config.task}, config.backend)
    completions = config.prm_completions
    labelling = LabelConfig(
        max_tokens=task.max_tokens, form=task.form, num_completions=completions, seed=config.seed, chunk_size=256
    )
    labels = labels_stage(solutions, completer, problems_P, labelling, config.backend)

    def train() -> Awaitable[object]:
        return train_prm.main(_prm_run(config, task, labels.path, completer))

    settings = {name: getattr(config, name) for name in ("prm_batch_size", "prm_epochs", "prm_learning_rate")}
    return [policy, Stage("prm", config.folder / "prm", settings, train, [labels], "checkpoints/final")]


def _as_it_is(config: Config) -> Stage:
    """The initial weights, where nothing is imitated."""
    folder, path = config.folder / "warm_start", config.load_checkpoint_path

    async def make() -> None:
        with ServiceClient(config.backend, folder / "checkpoints") as service:
            lora = LoraConfig(rank=config.lora_rank, seed=config.seed) if config.lora_rank else None
            client = service.create_training_client(config.model_name, lora, config.seed)
            if path:
                await client.load_state(path)
            await client.save_state("final")

    settings = {name: getattr(config, name) for name in ("model_name", "load_checkpoint_path", "lora_rank", "seed")}
    return Stage("warm_start", folder, settings, make, last="checkpoints/final")


def _imitation(config: Config, name: str, steps: int, stop_at_nll: float | None, needs: list[Stage]) -> Stage:
    seed = config.seed + len(needs)
    return warm_start(
        config,
        HumanSolutions(task=config.task, batch_size=config.warm_start_batch_size, seed=seed),
        config.folder / name,
        name,
        needs,
        **({} if needs else {"load_checkpoint_path": config.load_checkpoint_path}),
        lora_rank=config.lora_rank,
        learning_rate=config.warm_start_learning_rate,
        lr_schedule="constant" if stop_at_nll is not None else "linear",
        stop_at_nll=stop_at_nll,
        num_epochs=steps,
        max_steps=steps,
        eval_every=0,
        save_every=config.save_every,
        keep_checkpoints=1,
    )


def _prm_run(config: Config, task: Task, labels: Path, completer: Stage) -> train_prm.Config:
    test_size = max(1, len(task.prm) // 10)
    num_train = len(read_jsonl(labels)) - test_size * config.prm_solutions
    dataset = StepExamplesBuilder(
        path=str(labels),
        test_size=test_size,
        form=task.form,
        batch_size=min(config.prm_batch_size, max(1, num_train)),
        seed=config.seed,
        labels="soft",
        last_tokens=1,
        until_first_error=True,
    )
    return train_prm.Config(
        dataset=dataset,
        load_checkpoint_path=str(completer.result),
        lora_rank=config.lora_rank,
        learning_rate=config.prm_learning_rate,
        num_epochs=config.prm_epochs,
        eval_every=40,
        log_path=str(config.folder / "prm"),
        behavior_if_log_dir_exists="resume",
        **shared_settings(config),
    )
