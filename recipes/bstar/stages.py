"""What all methods of a run begin with: a policy, a process reward model, and what the policy is worth on the test set.

The warm start imitates human solutions and ends early, where the policy errs often (the original starts from the first epoch's checkpoint).
Trained on, it becomes the completer: it completes prefixes, and is the trunk of the process reward model, which it can only help to check
what it can do itself. The reward model's training set are answers of the policy whose steps are labelled by rollouts; it is trained once and
never moves. Each stage is passed over where its result is there.
"""

import json
from dataclasses import asdict
from pathlib import Path

from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import SamplingParams
from posttrain.renderers.types import Renderer
from posttrain.tracking.datasets import ListDataset
from posttrain.tracking.jsonl import as_dataclass, read_jsonl, write_atomically
from posttrain.tracking.run_folder import open_run_folder
from preference import train_prm
from preference.prm_labels import LabelConfig, label_solutions
from preference.solutions import Solution, sample_solutions
from preference.step_data import StepExamplesBuilder
from recipes.bstar.config import Config
from recipes.bstar.tasks import Task
from supervised import train as supervised_train
from supervised.data import conversation_to_datum
from supervised.types import SupervisedDatasetBuilder


def policy_path(config: Config) -> Path:
    return config.folder / "warm_start" / "checkpoints" / "final"


def completer_path(config: Config) -> Path:
    return config.folder / "completer" / "checkpoints" / "final" if config.completer_steps else policy_path(config)


def prm_path(config: Config) -> Path:
    return config.folder / "prm" / "checkpoints" / "final"


async def warm_start(config: Config, task: Task, renderer: Renderer, client: TrainingClient) -> None:
    start, steps = config.load_checkpoint_path, config.warm_start_steps
    await _imitate(config, "warm_start", task, renderer, client, start, steps, config.warm_start_nll, config.seed)


async def completer(config: Config, task: Task, renderer: Renderer, client: TrainingClient) -> None:
    if config.completer_steps:
        start, steps = str(policy_path(config)), config.completer_steps
        await _imitate(config, "completer", task, renderer, client, start, steps, config.completer_nll, config.seed + 1)


async def _imitate(
    config: Config,
    name: str,
    task: Task,
    renderer: Renderer,
    client: TrainingClient,
    start: str | None,
    steps: int,
    stop_at_nll: float | None,
    data_seed: int,
) -> None:
    if _is_there(config.folder / name / "checkpoints" / "final", name):
        return
    data = [conversation_to_datum(query.messages(), renderer) for query in task.warm_start]
    dataset = ListDataset(data, min(config.warm_start_batch_size, len(data)), data_seed)
    run = supervised_train.Config(
        dataset=SupervisedDatasetBuilder(batch_size=dataset.batch_size, seed=data_seed),
        model_name=config.model_name,
        load_checkpoint_path=start,
        renderer_name=config.renderer_name,
        lora_rank=config.lora_rank,
        seed=config.seed,
        learning_rate=config.warm_start_learning_rate,
        lr_schedule="constant" if stop_at_nll is not None else "linear",
        stop_at_nll=stop_at_nll,
        num_epochs=-(-steps // len(dataset)),
        max_steps=steps,
        eval_every=0,
        save_every=config.save_every,
        keep_checkpoints=1,
        log_path=str(config.folder / name),
        behavior_if_log_dir_exists="resume",
        backend=config.backend,
    )
    folder = open_run_folder(run.log_path, "resume", run)
    objective = supervised_train.CrossEntropy()
    await supervised_train.training_loop(run, folder, client, dataset, objective, None, stop_at_nll=stop_at_nll)


def _is_there(result: Path, name: str) -> bool:
    if result.exists():
        print(f"{name}: done already ({result})")
    return result.exists()


async def prm_data(config: Config, task: Task) -> None:
    """prm_data/solutions.jsonl, then labels.jsonl."""
    folder = config.folder / "prm_data"
    folder.mkdir(exist_ok=True)
    if _is_there(folder / "labels.jsonl", "prm_data"):
        return
    problems = task.prm
    if not (folder / "solutions.jsonl").exists():
        with ServiceClient(config.backend) as service:
            client = service.create_sampling_client(str(policy_path(config)))
            params = SamplingParams(task.max_tokens, seed=1000 * config.seed + 1)
            groups = await sample_solutions(client, problems, config.prm_solutions, params)
        lines = (json.dumps({"solutions": [asdict(solution) for solution in group]}) + "\n" for group in groups)
        write_atomically(folder / "solutions.jsonl", "".join(lines))
    lines_P = read_jsonl(folder / "solutions.jsonl", {"solutions": list})
    groups = [[as_dataclass(fields, Solution, str(folder)) for fields in line["solutions"]] for line in lines_P]
    pairs = [(problem, solution) for problem, group in zip(problems, groups, strict=True) for solution in group]
    labelling = LabelConfig(
        max_tokens=task.max_tokens, form=task.form, num_completions=config.prm_completions, seed=config.seed, chunk_size=256
    )
    unfinished = folder / "labels.unfinished.jsonl"
    with ServiceClient(config.backend) as service:
        client = service.create_sampling_client(str(completer_path(config)))
        _, counts = await label_solutions(client, pairs, labelling, unfinished)
    unfinished.rename(folder / "labels.jsonl")
    print("labels:", ", ".join(f"{count} {name}" for name, count in counts.items()))


async def prm(config: Config, task: Task) -> None:
    if _is_there(prm_path(config), "prm"):
        return
    labels = config.folder / "prm_data" / "labels.jsonl"
    test_size = max(1, len(task.prm) // 10)
    to_train_on = sum(1 for _ in read_jsonl(labels)) - test_size * config.prm_solutions
    dataset = StepExamplesBuilder(
        path=str(labels),
        test_size=test_size,
        form=task.form,
        batch_size=min(config.prm_batch_size, max(1, to_train_on)),
        seed=config.seed,
        labels="soft",
        last_tokens=1,
        until_first_error=True,
    )
    run = train_prm.Config(
        dataset=dataset,
        model_name=config.model_name,
        load_checkpoint_path=str(completer_path(config)),
        renderer_name=config.renderer_name,
        lora_rank=config.lora_rank,
        seed=config.seed,
        learning_rate=config.prm_learning_rate,
        num_epochs=config.prm_epochs,
        eval_every=40,
        log_path=str(config.folder / "prm"),
        behavior_if_log_dir_exists="resume",
        backend=config.backend,
    )
    await train_prm.main(run)
