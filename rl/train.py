"""The RL loop: groups of rollouts, advantages, one policy-gradient step, new weights into the sampler, again.

One core. Algorithms differ by data: an advantage estimator and a loss. Synchronous, streaming and asynchronous training differ by where
groups come from (group_sources.py). Left out so far: KL penalties, the last two group sources.
"""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chz

from backend.config import BackendConfig
from backend.data_checks import resolve_loss
from backend.errors import ConfigError, DataError, NonFiniteError
from backend.learning_rate import LRSchedule, lr_multiplier
from backend.models import PRESETS
from backend.sampling_client import SamplingClient
from backend.service_client import ServiceClient
from backend.tokenizers import load_tokenizer
from backend.training_client import TrainingClient
from backend.types import AdamParams, Datum, LoraConfig
from renderers import get_renderer
from renderers.types import Tokenizer
from rl.advantages import AdvantageEstimator, GroupMean
from rl.data_processing import TrainingData, assemble_training_data, compute_advantages, split_substeps, trainable_groups
from rl.evaluators import RLTestSetEvaluator
from rl.group_sources import GroupSource, SynchronousGroups
from rl.metrics import LOGPROB_GAP_ALARM, compute_sampling_metrics, compute_trajectory_metrics, probe_logprob_gap
from rl.transcripts import write_rollouts
from rl.types import Metrics, RLDatasetBuilder, TrajectoryGroup
from tracking.checkpointing import Checkpointer, StopRequest
from tracking.metrics_log import MetricsLog, print_metrics_table, timed
from tracking.nonfinite import write_offending_data
from tracking.progress import TrainingProgress
from tracking.run_folder import BehaviorIfExists, RunFolder, open_run_folder


@chz.chz
class Config:
    """Reinforcement learning of a language model on an environment."""

    env: RLDatasetBuilder = chz.field(doc="builder of the training and held-out environments")
    model_name: str = chz.field(default="tiny", doc="a preset, a local folder, or a Hugging Face hub name")
    load_checkpoint_path: str | None = chz.field(default=None, doc="start from the weights of this checkpoint (fresh optimizer)")
    renderer_name: str | None = chz.field(default=None, doc="role_colon, chat_template or plain; None = what suits the tokenizer")
    lora_rank: int = chz.field(default=0, doc="rank of a LoRA adapter; 0 trains all weights")
    seed: int = chz.field(default=0, doc="seed of a preset's weights, of the adapter and of sampling (the data's is env.seed)")

    max_tokens: int | None = chz.field(default=None, doc="most tokens sampled per turn; None = what the environment recommends")
    temperature: float = chz.field(default=1.0, doc="sampling temperature of rollouts; training uses the same distribution")
    advantage: AdvantageEstimator = chz.field(default_factory=GroupMean, doc="rewards of a group to advantages")
    remove_constant_reward_groups: bool = chz.field(default=False, doc="leave out groups whose members all got the same reward")
    loss_fn: str = chz.field(default="importance_sampling", doc="importance_sampling, ppo, cispo or dro")
    loss_fn_config: dict[str, Any] | None = chz.field(default=None, doc="options of the loss, e.g. loss_fn_config.beta=0.1")
    num_substeps: int = chz.field(default=1, doc="optimizer steps a batch is cut into; more than 1 is slightly off-policy")
    learning_rate: float = chz.field(
        default=1e-4, doc="at the first step; full training of big models wants 1e-6 to 1e-5, LoRA ten times that"
    )
    lr_schedule: LRSchedule = chz.field(default="constant", doc="how the learning rate falls to the last step")
    weight_decay: float = chz.field(default=0.0, doc="AdamW's, decoupled")
    grad_clip_norm: float = chz.field(default=0.0, doc="0 = no clipping")
    num_epochs: int = chz.field(default=1, doc="passes over the dataset")
    max_steps: int | None = chz.field(default=None, doc="total number of steps, if less than the epochs give")

    eval_every: int = chz.field(default=20, doc="evaluate before every this many steps, and at the end; 0 = never")
    eval_temperature: float = chz.field(default=0.0, doc="0 is greedy")
    save_every: int = chz.field(default=20, doc="checkpoint after every this many steps, and at the end; 0 = only at the end")
    keep_checkpoints: int | None = chz.field(
        default=None, doc="delete older checkpoints than the last this many; None = keep all"
    )
    transcript_every: int = chz.field(
        default=10, doc="write rollouts as HTML and JSONL every this many steps, and of every evaluation"
    )
    num_groups_to_log: int = chz.field(default=4, doc="groups per transcript")
    log_path: str = chz.field(default="runs/rl", munger=lambda _, path: str(Path(path).expanduser()), doc="the run folder")
    behavior_if_log_dir_exists: BehaviorIfExists = chz.field(default="ask", doc="what to do with an existing run folder")
    wandb_project: str | None = chz.field(default=None, doc="also log to this wandb project")
    wandb_name: str | None = chz.field(default=None, doc="name of the wandb run")
    backend: BackendConfig = chz.field(default_factory=BackendConfig, doc="how this machine trains and samples")


@dataclass
class _Run:
    """What the loop holds on to."""

    config: Config
    folder: RunFolder
    tokenizer: Tokenizer
    training_client: TrainingClient
    evaluator: RLTestSetEvaluator | None


async def main(config: Config) -> Metrics:
    """Trains; returns the last metrics. Everything that can be wrong with the input is raised before the model is loaded."""
    max_tokens = config.max_tokens or config.env.recommended_max_tokens()
    config = chz.replace(config, max_tokens=max_tokens)
    _check(config)
    tokenizer = load_tokenizer(config.model_name, config.backend.max_length)
    dataset, test_dataset = await config.env(get_renderer(config.renderer_name, tokenizer))
    num_steps = min(len(dataset) * config.num_epochs, config.max_steps or 2**62)
    if num_steps == 0:
        raise DataError("the dataset has no batch to train on")
    folder = open_run_folder(config.log_path, config.behavior_if_log_dir_exists, config)
    lora = LoraConfig(rank=config.lora_rank, seed=config.seed) if config.lora_rank else None
    if config.model_name in PRESETS and not config.load_checkpoint_path and not folder.resumed:
        print(
            f"{config.model_name} begins with random weights: warm-start it with supervised/train_cli.py and load_checkpoint_path"
        )
    with ServiceClient(config.backend, folder.checkpoints) as service:
        training_client = service.create_training_client(config.model_name, lora, config.seed)
        evaluator = None
        if test_dataset is not None and config.eval_every:
            evaluator = RLTestSetEvaluator(test_dataset, max_tokens, config.eval_temperature, config.seed)
        source = SynchronousGroups(dataset, max_tokens, config.temperature, config.seed)
        return await _loop(_Run(config, folder, tokenizer, training_client, evaluator), source, num_steps)


def _check(config: Config) -> None:
    config.advantage.check_group_size(config.env.group_size)
    if "advantages" not in resolve_loss(config.loss_fn, config.loss_fn_config).required:
        raise ConfigError(f"loss_fn={config.loss_fn} does not use advantages: it is not a loss for reinforcement learning")
    for name in ("max_tokens", "num_substeps", "num_epochs"):
        if (getattr(config, name) or 0) < 1:
            raise ConfigError(f"{name}={getattr(config, name)} must be at least 1")
    if config.temperature <= 0:
        raise ConfigError(f"temperature={config.temperature}: rollouts that do not differ teach nothing; it must be above 0")


async def _loop(run: _Run, source: GroupSource, num_steps: int) -> Metrics:
    config, client = run.config, run.training_client
    checkpointer = Checkpointer(run.folder, client, config.save_every, config.keep_checkpoints)
    start = checkpointer.start(config.load_checkpoint_path)
    metrics: Metrics = {}
    headline: Metrics = {}
    sampling_client = await client.save_weights_and_get_sampling_client_async()
    with (
        closing(MetricsLog(run.folder, config.wandb_project, config.wandb_name, config)) as log,
        StopRequest() as stop,
        TrainingProgress(num_steps, start, "rl") as progress,
    ):
        for step in range(start, num_steps):
            learning_rate = config.learning_rate * lr_multiplier(config.lr_schedule, step, num_steps)
            metrics = {"progress/batch": step, "progress/done_frac": (step + 1) / num_steps, "optim/lr": learning_rate}
            with timed(metrics, "total"):
                if run.evaluator and step % config.eval_every == 0:
                    metrics |= await _evaluate(run, sampling_client, step, metrics)
                with timed(metrics, "sampling"):
                    groups = await source.next_groups(step, sampling_client)
                metrics |= compute_trajectory_metrics(groups)
                with timed(metrics, "train"):
                    training_data = await _train_step(run, groups, step, metrics)
                with timed(metrics, "sync"):
                    sampling_client = await client.save_weights_and_get_sampling_client_async()
                if training_data.data_D:
                    with timed(metrics, "probe"):
                        await _probe(run, sampling_client, training_data.data_D[0], metrics)
            log.log(metrics, step)
            checkpointer.after_step(step + 1)
            headline |= _headline(metrics)
            progress.update(step, headline)
            if stop and step + 1 < num_steps:
                checkpointer.interrupted(step + 1)
        if run.evaluator:
            final = await _evaluate(run, sampling_client, num_steps, {})
            log.log(final, num_steps)
            metrics |= final
    checkpointer.save("final", num_steps)
    _finish(run, metrics)
    return metrics


async def _train_step(run: _Run, groups: list[TrajectoryGroup], step: int, metrics: Metrics) -> TrainingData:
    """One batch: advantages, then forward_backward and optim_step for each substep, submitted back to back."""
    config, client = run.config, run.training_client
    kept = trainable_groups(groups, config.advantage, config.remove_constant_reward_groups)
    metrics["train/groups_removed"] = len(groups) - len(kept)
    training_data = assemble_training_data(kept, advantages := compute_advantages(kept, config.advantage))
    if config.transcript_every and step % config.transcript_every == 0:
        write_rollouts(run.folder.transcripts, step, kept[: config.num_groups_to_log], advantages, run.tokenizer)
    if not training_data.data_D:  # every group was removed: there is nothing to learn from, and nothing moves
        return training_data
    adam = AdamParams(metrics["optim/lr"], weight_decay=config.weight_decay, grad_clip_norm=config.grad_clip_norm, eps=1e-8)
    submitted = [
        (substep_D, client.forward_backward(substep_D, config.loss_fn, config.loss_fn_config), client.optim_step(adam))
        for substep_D in split_substeps(training_data.data_D, config.num_substeps)
    ]
    logprobs_D = []
    for substep_D, forward_backward, optim_step in submitted:
        try:
            output = await forward_backward
            metrics |= {f"optim/{name.split(':')[0]}": value for name, value in output.metrics.items()}
            metrics |= {f"optim/{name}": value for name, value in (await optim_step).metrics.items()}
        except NonFiniteError as error:
            raise write_offending_data(run.folder, step, substep_D, error) from error
        logprobs_D += [out["logprobs"] for out in output.loss_fn_outputs]
    metrics |= compute_sampling_metrics(training_data.data_D, logprobs_D)
    _alarm("rollouts", metrics["optim/logprob_gap_mean"], step)
    return training_data


async def _evaluate(run: _Run, client: SamplingClient, step: int, metrics: Metrics) -> Metrics:
    assert run.evaluator
    with timed(metrics, "eval"):
        result = await run.evaluator(client)
    shown = run.evaluator.groups[: run.config.num_groups_to_log]
    write_rollouts(run.folder.transcripts / "test", step, shown, None, run.tokenizer)
    return result


async def _probe(run: _Run, client: SamplingClient, datum: Datum, metrics: Metrics) -> None:
    """Right after a sync, so that a wrong one is seen before anything is sampled from it."""
    sequence = datum.model_input.append_int(int(datum.loss_fn_inputs["target_tokens"].array[-1]))
    step = int(metrics["progress/batch"])
    try:
        gap = await probe_logprob_gap(run.training_client, client, sequence)
    except NonFiniteError as error:  # the step itself made the weights infinite
        raise write_offending_data(run.folder, step, [datum], error) from error
    metrics["optim/probe_logprob_gap"] = gap
    _alarm("probe", gap, step)


def _alarm(what: str, gap: float, step: int) -> None:
    if gap > LOGPROB_GAP_ALARM:
        print(
            f"WARNING step {step}, {what}: sampler and trainer logprobs differ by {gap:.3f} on average (alarm at {LOGPROB_GAP_ALARM})"
        )


def _headline(metrics: Metrics) -> Metrics:
    names = {"env/all/reward/total": "reward", "test/env/all/correct": "test", "optim/logprob_gap_mean": "gap"}
    return {short: metrics[name] for name, short in names.items() if name in metrics}


def _finish(run: _Run, metrics: Metrics) -> None:
    from tracking.plots import plot_run

    print_metrics_table({k: v for k, v in metrics.items() if not k.startswith("time/")}, f"{run.folder.path}: last step")
    print(
        f"plot: {plot_run(run.folder.path)}\ntranscripts: {run.folder.transcripts}\ncheckpoint: {run.folder.checkpoints / 'final'}"
    )
