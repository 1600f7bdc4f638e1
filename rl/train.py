"""The RL loop: rollouts, advantages, a policy-gradient step, new weights into the sampler.
Algorithms are an estimator, a loss and the steps around them (algorithms.py, train_step.py).
Synchronous, streaming and asynchronous training are two numbers (group_sources.py).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import chz
import numpy as np

from posttrain.advise import warn_of_learning_rate
from posttrain.backend.alarms import (
    BATCHED,
    PROBE_SAMPLES,
    PROBE_TOKENS,
    SAMPLED,
    Alarms,
    check_at_start,
    compare_with_sampler,
    least_certain,
    sampler_gaps,
)
from posttrain.backend.errors import DataError, NonFiniteError
from posttrain.backend.memory_plan import check_fits, planned
from posttrain.backend.models import PRESETS
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import Datum
from posttrain.renderers.types import Renderer, Tokenizer
from posttrain.tracking.checkpointing import Checkpointed
from posttrain.tracking.metrics_log import timed
from posttrain.tracking.nonfinite import write_offending_data
from posttrain.tracking.progress import reported
from posttrain.tracking.run import Metrics, Run, finish
from posttrain.tracking.run_folder import RunFolder, open_run_folder
from posttrain.tracking.timeline import Timeline, recording, span
from posttrain.tracking.trainer_restarts import with_restarts
from rl import step_checks
from rl.config import Config, check_config
from rl.critic import POLICY, ActorCritic, Critic
from rl.distill import Teachers
from rl.evaluators import RLTestSetEvaluator, SamplesEvaluator
from rl.group_sources import GroupSource
from rl.kl import Reference, other_model, starting_weights
from rl.metrics import compute_trajectory_metrics
from rl.train_step import Learner, StepOutcome, train_step
from rl.transcripts import write_rollouts
from supervised.evaluators import Evaluated, RunEvaluators

HEADLINE = {
    "env/all/reward/total": "reward",
    "test/env/all/correct": "test",
    "teacher_kl": "teacher kl",
    "optim/logprob_gap_mean": "gap",
}


@with_restarts
async def main(config: Config) -> Metrics:
    """Trains; returns the last metrics. Input errors are raised before the model loads."""
    max_tokens = config.max_tokens or config.env.recommended_max_tokens()
    config = chz.replace(config, max_tokens=max_tokens)
    check_config(config)
    renderer = config.renderer()
    for models in (config.kl, config.distill, config.critic):
        models.check(renderer.tokenizer)
    dataset, test_dataset = await step_checks.datasets(config.env, renderer)
    custom = await config.build_evaluators(renderer)
    num_steps = config.num_steps(len(dataset))
    if num_steps == 0:
        raise DataError("the dataset has no batch to train on")
    if config.distill.paths():
        config.distill.check_groups(step_checks.batch(dataset, 0))
    if config.batch_reward:
        config.batch_reward.check_groups(step_checks.batch(dataset, 0))
    if notice := step_checks.short_batches(config.env, dataset):
        print(notice, flush=True)
    if notice := step_checks.beyond_context(max_tokens, renderer.tokenizer):
        print(f"WARNING {notice}", flush=True)
    second_copy = bool(config.kl.coef) and not config.kl.reference_path and not starts_at_base(config)
    check_fits(planned(config.model_name, config.backend, config.lora(), True, second_copy), config.model_name)
    warn_of_learning_rate("rl", config.model_name, config.lora_rank, config.learning_rate)
    folder = open_run_folder(config.log_path, config.behavior_if_log_dir_exists, config)
    if config.model_name in PRESETS and not config.load_checkpoint_path and not folder.resumed:
        print(
            f"{config.model_name} has random weights: train it with supervised/train_cli.py first, and give the "
            "checkpoint as load_checkpoint_path"
        )
    with ServiceClient(config.backend, folder.checkpoints) as service, recording(Timeline(service.spans)) as timeline:
        learner = await open_learner(config, service, folder, renderer)
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
            temperature=config.temperature,
            seed=config.seed,
            limits=config.limits,
            max_steps_off_policy=config.max_steps_off_policy,
            num_minibatches=config.num_minibatches,
            concurrent_rollouts=config.concurrent_rollouts,
            max_refills=config.max_refills,
        )
        loop = Loop(config, folder, renderer.tokenizer, learner, evaluators, custom, source, timeline)
        metrics = await loop.run(num_steps)
    timeline.plot(folder.plots / "timeline.png")
    finish(folder, metrics)
    return metrics


def starts_at_base(config: Config) -> bool:
    """Whether the policy without its adapter has the weights the run began with."""
    return config.lora() is not None and not config.load_checkpoint_path


async def open_learner(config: Config, service: ServiceClient, folder: RunFolder, renderer: Renderer) -> Learner:
    """The policy, and the models that its step needs: KL reference, teachers, critic, reward."""
    model_name, lora, seed = config.model_name, config.lora(), config.seed
    client = service.create_training_client(model_name, lora, seed)
    learner = Learner(config, client, folder)
    if config.kl.coef:
        if path := config.kl.reference_path:
            learner.reference = Reference(other_model(service, path, client))
        elif starts_at_base(config):
            learner.reference = Reference(client, without_adapter=True)
        else:
            start = starting_weights(service, model_name, config.load_checkpoint_path, lora, seed)
            learner.reference = Reference(start)
    if config.distill.paths():
        learner.teachers = Teachers(config.distill, service, client)
    if config.critic.model:
        rate = config.critic.learning_rate / config.learning_rate
        learner.critic = Critic(config.critic, config.critic.open(service, model_name, lora, seed), rate)
    if config.batch_reward:
        learner.batch_reward = await config.batch_reward(service, client, renderer)
    return learner


@dataclass
class Loop:
    """The state of a run, and its step."""

    config: Config
    folder: RunFolder
    tokenizer: Tokenizer
    learner: Learner
    evaluators: Sequence[RLTestSetEvaluator | SamplesEvaluator]
    custom: RunEvaluators
    source: GroupSource
    timeline: Timeline
    said_without_signal: bool = False

    async def run(self, num_steps: int) -> Metrics:
        """Runs the remaining steps; returns the last metrics."""
        config, client, source = self.config, self.learner.client, self.source
        self.num_steps, self.alarms = num_steps, Alarms(client.get_info(), config.backend.alarm)
        saved: Checkpointed = client
        if critic := self.learner.critic:
            folder = self.folder.path / "critic"
            saved = ActorCritic(client, critic.client, folder, critic.config.model == POLICY)
        run = Run(config=config, folder=self.folder, client=saved, name="rl", num_steps=num_steps, headline=HEADLINE)
        run.alarms, run.extra = self.alarms, lambda: {"rollouts": source.state()}
        if self.evaluators or self.custom.frequent:
            run.evaluate = self.evaluate
        if self.custom.infrequent:
            run.infrequent, run.infrequent_every = self.evaluate_infrequently, self.custom.infrequent_every
        if not run.start(config.load_checkpoint_path):
            return run.last_metrics()
        source.restore(run.resumed_extra.get("rollouts", []))
        self.sampling_client = await self.sync()
        if run.first_step < num_steps:
            await check_at_start(client, self.alarms, self.sampling_client, config.temperature)
        async with source:
            return await run.steps(self.step)

    async def step(self, step: int, metrics: Metrics) -> None:
        began = time.perf_counter() - metrics.get("time/eval", 0.0)
        adam = self.config.adam(step, self.num_steps)
        metrics |= {
            "progress/batch": step,
            "progress/done_frac": (step + 1) / self.num_steps,
            "optim/lr": adam.learning_rate,
        }
        self.source.set_policy(step, self.sampling_client)
        outcome = await train_step(self.learner, self.source, step, adam, metrics)
        metrics |= compute_trajectory_metrics(outcome.groups_P)
        self.warn_without_signal(outcome, step)
        self.compare_rollouts(outcome, metrics)
        with timed(metrics, "sync"):
            self.sampling_client = await self.sync(step, outcome.data_D)
        if outcome.data_D:
            with timed(metrics, "probe"):
                await self.probe(step, outcome.data_D[0], metrics)
        self.write_transcript(outcome, step)
        metrics |= self.timeline.metrics(began, time.perf_counter())

    async def sync(self, step: int = 0, data_D: Sequence[Datum] = ()) -> SamplingClient:
        """Syncs the sampler to the current weights. Asynchronous rollouts in flight continue under
        them. `data_D`: the data of the previous step, written to disk if the weights are not
        finite."""
        saved = self.learner.client.save_weights_and_get_sampling_client_async(
            follow=self.config.max_steps_off_policy > 0, keep=False
        )
        with span("sync"):
            try:
                return await reported(saved, "giving the sampler new weights")
            except NonFiniteError as error:
                if not data_D:
                    raise
                raise write_offending_data(self.folder, step, data_D, error) from error

    async def evaluate(self, step: int) -> Metrics:
        """Returns the evaluators' metrics. The transcript is the last evaluator's: several samples
        per problem where there are such."""
        metrics: Metrics = {}
        with span("eval"):
            for evaluator in self.evaluators:
                metrics |= await evaluator(self.sampling_client)
            metrics = await self.custom.frequent(Evaluated(self.learner.client, self.sampling_client), metrics)
        if self.evaluators:
            shown = self.evaluators[-1].groups[: self.config.num_groups_to_log]
            write_rollouts(self.folder.transcripts / "test", step, shown, None, self.tokenizer)
        return metrics

    async def evaluate_infrequently(self, step: int) -> Metrics:
        with span("eval"):
            return await self.custom.infrequent(Evaluated(self.learner.client, self.sampling_client))

    async def probe(self, step: int, datum: Datum, metrics: Metrics) -> None:
        """Compares sampler and trainer right after a sync, before rollouts; on a prompt of this
        step, which a stale prefix cache would still have."""
        client, temperature = self.sampling_client, self.config.temperature
        tokens = [*datum.model_input.to_ints(), int(datum.loss_fn_inputs["target_tokens"].array[-1])][
            : client.max_length - 1
        ]
        cut = min(least_certain(datum), len(tokens) - 1)
        try:
            whole, sampled = await sampler_gaps(
                self.learner.client, client, tokens, cut, temperature, PROBE_SAMPLES, PROBE_TOKENS, first_alone=True
            )
        except NonFiniteError as error:  # the step made the weights infinite
            infinite = NonFiniteError("after this step the policy's logprobs are not finite: its weights are no longer")
            raise write_offending_data(self.folder, step, [datum], infinite) from error
        metrics |= {"optim/probe_logprob_gap": whole.mean, "optim/probe_sampled_gap": sampled.mean}
        compare_with_sampler(self.alarms, whole, sampled, temperature)

    def warn_without_signal(self, outcome: StepOutcome, step: int) -> None:
        """Of the first step that teaches nothing."""
        config, learner = self.config, self.learner
        penalty_alone = config.kl.coef and not (config.entropy_coef or learner.teachers or learner.critic)
        of_rewards_P = outcome.advantages_P if penalty_alone and config.kl.where == "advantage" else None
        notice = step_checks.without_signal(outcome.groups_P, outcome.token_advantages_P, of_rewards_P)
        if notice and not self.said_without_signal:
            self.said_without_signal = True
            print(f"WARNING step {step + 1}: {notice}", flush=True)

    def compare_rollouts(self, outcome: StepOutcome, metrics: Metrics) -> None:
        """Compares on-policy rollouts only. Stale rollouts and later substeps differ by design."""
        if gap := outcome.on_policy_gap:
            metrics["optim/on_policy_logprob_gap"] = gap.mean
            temperature = self.config.temperature
            comparison = (
                f"rollouts sampled from the present weights (temperature={temperature:g}) and the trainer's "
                "logprobs of them"
            )
            self.alarms.compare("rollouts", gap, comparison, f"{SAMPLED}; or in the trainer, {BATCHED}", temperature)

    def write_transcript(self, outcome: StepOutcome, step: int) -> None:
        """The first groups, and as many groups that lost members."""
        count = self.config.num_groups_to_log
        if not self.config.transcript_every or step % self.config.transcript_every:
            return
        places = list(range(len(outcome.groups_P)))
        places = places[:count] + [p for p in places[count:] if outcome.groups_P[p].errors][:count]
        groups_P = [outcome.groups_P[p] for p in places]
        advantages_P = [outcome.advantages_P[p] for p in places]
        advantages_P_G = [
            np.zeros(len(g.trajectories_G)) if a is None else a for g, a in zip(groups_P, advantages_P, strict=True)
        ]
        token_advantages_P = [outcome.token_advantages_P[p] for p in places]
        write_rollouts(self.folder.transcripts, step, groups_P, advantages_P_G, self.tokenizer, token_advantages_P)
