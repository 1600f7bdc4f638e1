"""The RL loop: groups of rollouts, advantages, one policy-gradient step, new weights into the sampler, again.

One core. Algorithms differ by data: an advantage estimator, a loss and what surrounds them (algorithms.py, train_step.py). Synchronous,
streaming and asynchronous training differ by two numbers (group_sources.py). Left out: a critic, several machines.
"""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import chz
import numpy as np

from posttrain.backend.alarms import (
    BATCHED,
    PROBE_SAMPLES,
    SAMPLED,
    Alarms,
    check_at_start,
    compare_with_sampler,
    least_certain,
    sampler_gaps,
)
from posttrain.backend.errors import DataError, NonFiniteError
from posttrain.backend.learning_rate import lr_multiplier
from posttrain.backend.models import PRESETS
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, Datum, LoraConfig
from posttrain.renderers import get_renderer
from posttrain.renderers.types import Tokenizer
from posttrain.tracking.checkpointing import Checkpointer, StopRequest
from posttrain.tracking.metrics_log import MetricsLog, print_last_metrics, read_last_metrics, timed
from posttrain.tracking.nonfinite import write_offending_data
from posttrain.tracking.progress import TrainingProgress, reported
from posttrain.tracking.run_folder import RunFolder, open_run_folder
from posttrain.tracking.timeline import Timeline, recording, span
from rl import step_checks
from rl.config import Config, check_config
from rl.evaluators import RLTestSetEvaluator, SamplesEvaluator
from rl.group_sources import GroupSource
from rl.kl import Reference, check_reference_tokenizer, other_model, starting_weights
from rl.metrics import compute_trajectory_metrics
from rl.train_step import Learner, StepOutcome, train_step
from rl.transcripts import write_rollouts
from rl.types import Metrics


@dataclass
class _Run:
    """What the loop holds on to."""

    config: Config
    folder: RunFolder
    tokenizer: Tokenizer
    learner: Learner
    evaluators: Sequence[RLTestSetEvaluator | SamplesEvaluator]
    timeline: Timeline
    alarms: Alarms

    @property
    def client(self) -> TrainingClient:
        return self.learner.client


async def main(config: Config) -> Metrics:
    """Trains; returns the last metrics. Everything that can be wrong with the input is raised before the model is loaded."""
    max_tokens = config.max_tokens or config.env.recommended_max_tokens()
    config = chz.replace(config, max_tokens=max_tokens)
    check_config(config)
    tokenizer = load_tokenizer(config.model_name, config.backend.max_length)
    if config.kl.coef and config.kl.reference_path:
        check_reference_tokenizer(config.kl.reference_path, tokenizer)
    renderer = get_renderer(config.renderer_name, tokenizer)
    dataset, test_dataset = step_checks.datasets(config.env, await config.env(renderer))
    num_steps = min(len(dataset) * config.num_epochs, config.max_steps or 2**62)
    if num_steps == 0:
        raise DataError("the dataset has no batch to train on")
    folder = open_run_folder(config.log_path, config.behavior_if_log_dir_exists, config)
    lora = LoraConfig(config.lora_rank, config.seed, config.lora_alpha) if config.lora_rank else None
    if config.model_name in PRESETS and not config.load_checkpoint_path and not folder.resumed:
        print(
            f"{config.model_name} begins with random weights: warm-start it with supervised/train_cli.py and load_checkpoint_path"
        )
    with ServiceClient(config.backend, folder.checkpoints) as service, recording(Timeline()) as timeline:
        learner = Learner(config, service.create_training_client(config.model_name, lora, config.seed), folder)
        if config.kl.coef:
            if path := config.kl.reference_path:
                frozen = other_model(service, path, learner.client)
            else:
                frozen = starting_weights(service, config.model_name, config.load_checkpoint_path, lora, config.seed)
            learner.reference = Reference(frozen)
        if config.batch_reward:
            learner.batch_reward = await config.batch_reward(service, learner.client, renderer)
        evaluators: list[RLTestSetEvaluator | SamplesEvaluator] = []
        if test_dataset is not None and config.eval_every:
            common = {"seed": config.seed, "limits": config.limits}
            evaluators.append(RLTestSetEvaluator(test_dataset, max_tokens, config.eval_temperature, **common))
            if config.eval_samples:
                evaluators.append(SamplesEvaluator(test_dataset, max_tokens, config.eval_samples, **common))
        source = GroupSource(
            dataset,
            num_steps,
            max_tokens,
            config.temperature,
            config.seed,
            config.limits,
            config.max_steps_off_policy,
            config.num_minibatches,
            config.concurrent_rollouts,
        )
        alarms = Alarms(learner.client.get_info(), config.backend.alarm)
        return await _loop(_Run(config, folder, tokenizer, learner, evaluators, timeline, alarms), source, num_steps)


async def _loop(run: _Run, source: GroupSource, num_steps: int) -> Metrics:
    config, client = run.config, run.client
    checkpointer = Checkpointer(run.folder, client, config.save_every, config.keep_checkpoints)
    start = checkpointer.start(config.load_checkpoint_path, num_steps)
    if checkpointer.nothing_left:
        return _nothing_to_do(run)
    source.restore(checkpointer.resumed_extra.get("rollouts", []))
    metrics: Metrics = {}
    headline: Metrics = {}
    sampling_client = await _sync(run)
    if start < num_steps:
        await check_at_start(client, run.alarms, sampling_client, config.temperature)
    async with source:
        with (
            closing(MetricsLog(run.folder, config.wandb_project, config.wandb_name, config)) as log,
            StopRequest() as stop,
            TrainingProgress(num_steps, start, "rl") as progress,
        ):
            for step in range(start, num_steps):
                metrics = {"progress/batch": step, "progress/done_frac": (step + 1) / num_steps}
                metrics["optim/lr"] = config.learning_rate * lr_multiplier(config.lr_schedule, step, num_steps)
                began = time.perf_counter()
                with timed(metrics, "total"):
                    if run.evaluators and step % config.eval_every == 0:
                        metrics |= await _evaluate(run, sampling_client, step, metrics)
                    source.set_policy(step, sampling_client)
                    outcome = await train_step(run.learner, source, step, _adam(config, metrics["optim/lr"]), metrics)
                    metrics |= compute_trajectory_metrics(outcome.groups_P)
                    _compare_rollouts(run, outcome, metrics)
                    with timed(metrics, "sync"):
                        sampling_client = await _sync(run, step, outcome.data_D)
                    if outcome.data_D:
                        with timed(metrics, "probe"):
                            await _probe(run, sampling_client, outcome.data_D[0], metrics)
                    _write_transcript(run, outcome, step)
                shares = run.timeline.shares(began, time.perf_counter())
                metrics |= {f"time/share/{kind}": share for kind, share in shares.items()}
                metrics |= run.alarms.metrics()
                log.log(metrics, step)
                run.alarms.decide(f"step {step}")
                checkpointer.after_step(step + 1, lambda: {"rollouts": source.state()})
                headline |= _headline(metrics)
                progress.update(step, headline)
                if stop and step + 1 < num_steps:
                    checkpointer.interrupted(step + 1, lambda: {"rollouts": source.state()})
            if run.evaluators:
                final = await _evaluate(run, sampling_client, num_steps, {})
                log.log(final, num_steps)
                metrics |= final
    checkpointer.save("final", num_steps)
    _finish(run, metrics)
    return metrics


def _nothing_to_do(run: _Run) -> Metrics:
    """A run that was resumed at or past its last step: nothing is written, and its last metrics are shown again."""
    metrics = read_last_metrics(run.folder.path)
    _finish(run, metrics)
    return metrics


def _adam(config: Config, learning_rate: float) -> AdamParams:
    return AdamParams(learning_rate, weight_decay=config.weight_decay, grad_clip_norm=config.grad_clip_norm, eps=1e-8)


async def _sync(run: _Run, step: int = 0, data_D: Sequence[Datum] = ()) -> SamplingClient:
    """The sampler gets the present weights. Rollouts that are under way go on under them, where training is asynchronous.

    `data_D` are those of the step before, to be written down if it made the weights infinite.
    """
    with span("sync"):
        following = run.config.max_steps_off_policy > 0
        try:
            return await reported(
                run.client.save_weights_and_get_sampling_client_async(follow=following), "giving the sampler new weights"
            )
        except NonFiniteError as error:
            if not data_D:
                raise
            raise write_offending_data(run.folder, step, data_D, error) from error


def _write_transcript(run: _Run, outcome: StepOutcome, step: int) -> None:
    """The first groups, and as many of those that lost members."""
    count = run.config.num_groups_to_log
    if not run.config.transcript_every or step % run.config.transcript_every:
        return
    places = list(range(len(outcome.groups_P)))
    places = places[:count] + [p for p in places[count:] if outcome.groups_P[p].errors][:count]
    groups_P = [outcome.groups_P[p] for p in places]
    advantages_P_G = [outcome.advantages_P[p] for p in places]
    advantages_P_G = [np.zeros(len(g.trajectories_G)) if a is None else a for g, a in zip(groups_P, advantages_P_G, strict=True)]
    write_rollouts(run.folder.transcripts, step, groups_P, advantages_P_G, run.tokenizer)


async def _evaluate(run: _Run, client: SamplingClient, step: int, metrics: Metrics) -> Metrics:
    """The last evaluator's groups are those with several samples of a problem, where there are such; they make the better transcript."""
    result: Metrics = {}
    with timed(metrics, "eval"), span("eval"):
        for evaluator in run.evaluators:
            result |= await evaluator(client)
    shown = run.evaluators[-1].groups[: run.config.num_groups_to_log]
    write_rollouts(run.folder.transcripts / "test", step, shown, None, run.tokenizer)
    return result


async def _probe(run: _Run, client: SamplingClient, datum: Datum, metrics: Metrics) -> None:
    """Right after a sync, so that a wrong one is seen before anything is sampled from it; behind a prompt of this step's rollouts, which a
    prefix cache that was not dropped still has."""
    tokens = [*datum.model_input.to_ints(), int(datum.loss_fn_inputs["target_tokens"].array[-1])][: client.max_length - 1]
    cut = min(least_certain(datum), len(tokens) - 1)
    temperature = run.config.temperature
    try:
        whole, sampled = await sampler_gaps(run.client, client, tokens, cut, temperature, PROBE_SAMPLES, max_tokens=1)
    except NonFiniteError as error:  # the step itself made the weights infinite
        infinite = NonFiniteError("after this step the policy's logprobs are not finite: its weights are no longer")
        raise write_offending_data(run.folder, int(metrics["progress/batch"]), [datum], infinite) from error
    metrics |= {"optim/probe_logprob_gap": whole.mean, "optim/probe_sampled_gap": sampled.mean}
    compare_with_sampler(run.alarms, whole, sampled)


def _compare_rollouts(run: _Run, outcome: StepOutcome, metrics: Metrics) -> None:
    """Rollouts of older weights, and those that a later substep trains on, differ by right; all others are on-policy."""
    if gap := outcome.on_policy_gap:
        metrics["optim/on_policy_logprob_gap"] = gap.mean
        what = f"rollouts sampled from the present weights (temperature={run.config.temperature:g}) and the trainer's logprobs of them"
        run.alarms.compare("rollouts", gap, what, f"{SAMPLED}; or in the trainer, {BATCHED}")


def _headline(metrics: Metrics) -> Metrics:
    names = {"env/all/reward/total": "reward", "test/env/all/correct": "test", "optim/logprob_gap_mean": "gap"}
    return {short: metrics[name] for name, short in names.items() if name in metrics}


def _finish(run: _Run, metrics: Metrics) -> None:
    from posttrain.tracking.plots import plot_run

    run.timeline.plot(run.folder.plots / "timeline.png")
    print_last_metrics(run.folder, metrics)
    print(
        f"plot: {plot_run(run.folder.path)}\ntranscripts: {run.folder.transcripts}\ncheckpoint: {run.folder.checkpoints / 'final'}"
    )
