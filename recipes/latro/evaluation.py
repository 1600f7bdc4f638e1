"""Evaluation of a LaTRO policy on held-out questions, and the choice of the best checkpoint.

    answer_logprob   mean log p(gold answer | question, rationale) in nats, rationales sampled at temperature 1
    correct          accuracy of one greedy response
    maj@k, pass@k    of k responses at temperature 1; ties go to the first answer, no answer has no vote

The best checkpoint is computed from metrics.jsonl and the saved checkpoints, so resuming keeps it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import DataError
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import LoraConfig
from posttrain.renderers import get_renderer
from posttrain.renderers.types import Renderer
from posttrain.tracking.datasets import ListDataset
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.run_folder import RunFolder
from posttrain.tracking.seeds import LIKELIHOOD
from recipes.latro.env import LatentRationales, responses
from recipes.latro.examples import example
from recipes.latro.tasks import Task
from rl.evaluators import RLTestSetEvaluator, SamplesEvaluator
from rl.likelihood_reward import LikelihoodReward, LikelihoodRewardBuilder, answer_logprobs
from rl.metrics import compute_trajectory_metrics
from rl.rollouts import Policy, do_rollouts
from rl.types import Metrics

VALIDATION_METRIC = "test/env/all/correct"


@dataclass(frozen=True)
class Best:
    step: int
    path: Path | None  # None = the initial weights
    value: float


def best_so_far(run: Path) -> Best | None:
    """The checkpoint with the highest greedy accuracy on the validation split; ties go to the
    latest. None before the first evaluation.
    """
    values = {record["step"]: record[VALIDATION_METRIC] for record in read_metrics(run) if VALIDATION_METRIC in record}
    paths: dict[int, Path | None] = {0: None} | {
        record.step: record.path for record in RunFolder(run).list_checkpoints()
    }
    checkpoints = [Best(step, paths[step], value) for step, value in sorted(values.items()) if step in paths]
    return max(checkpoints, key=lambda best: (best.value, best.step), default=None)


@dataclass(frozen=True)
class Evaluation:
    """Evaluates checkpoints with `env.group_size` rationales and responses per question."""

    model_name: str
    renderer_name: str | None
    env: LatentRationales
    lora_rank: int = 0
    seed: int = 0
    backend: BackendConfig = BackendConfig()

    async def __call__(self, checkpoint: str | Path | None, tasks: list[Task]) -> Metrics:
        """Metrics of `checkpoint`; None is the model without one."""
        renderer = self._renderer()
        with ServiceClient(self.backend) as service:
            client = self._client(service, checkpoint)
            sampler = client.save_weights_and_get_sampling_client()
            length, groups = self.env.response_length, self.env.groups(tasks, renderer)
            rollouts = await do_rollouts(groups, Policy(sampler, length), (self.seed, LIKELIHOOD))
            plain = LikelihoodRewardBuilder(likelihood_coef=0.0, non_stop_penalty=False)
            metrics = await LikelihoodReward(client, plain, trains=False)(rollouts)
            metrics |= compute_trajectory_metrics(rollouts)
            dataset = ListDataset(responses(groups), 64, shuffle=False)
            metrics |= await RLTestSetEvaluator(dataset, length, seed=self.seed)(sampler)
            metrics |= await SamplesEvaluator(dataset, length, self.env.group_size, seed=self.seed)(sampler)
            return metrics

    async def best_of(self, checkpoints: dict[int, str | Path | None], tasks: list[Task]) -> Best:
        """The checkpoint (by step) with the highest greedy accuracy; ties go to the latest."""
        renderer = self._renderer()
        dataset = ListDataset(responses(self.env.groups(tasks, renderer)), 64, shuffle=False)
        evaluator = RLTestSetEvaluator(dataset, self.env.response_length, seed=self.seed)
        results = []
        for step, checkpoint in sorted(checkpoints.items()):
            with ServiceClient(self.backend) as service:
                sampler = self._client(service, checkpoint).save_weights_and_get_sampling_client()
                value = (await evaluator(sampler))[VALIDATION_METRIC]
            results.append(Best(step, Path(checkpoint) if checkpoint else None, value))
        return max(results, key=lambda best: (best.value, best.step))

    async def diagnose(self, checkpoint: str | Path | None, tasks: list[Task]) -> Metrics:
        """log p(y|x) against log p(y|x, gold rationale), without sampling."""
        renderer = self._renderer()
        pairs = [
            (example(renderer, task, "", answer_only=True), example(renderer, task, task.solution, answer_only=True))
            for task in tasks
            if task.solution
        ]
        pairs = [(bare, full) for bare, full in pairs if full.model_input.length <= renderer.tokenizer.model_max_length]
        if not pairs:
            raise DataError(
                "method=diagnose needs gold rationales that fit the context, and the validation split has none"
            )
        print(f"{len(pairs)} of {len(tasks)} questions have a gold rationale that fits the context")
        with ServiceClient(self.backend) as service:
            client = self._client(service, checkpoint)
            without = float(np.mean(await answer_logprobs(client, [bare for bare, _ in pairs])))
            with_gold = float(np.mean(await answer_logprobs(client, [full for _, full in pairs])))
        return {"without_rationale": without, "with_gold_rationale": with_gold, "difference": with_gold - without}

    def _renderer(self) -> Renderer:
        return get_renderer(self.renderer_name, load_tokenizer(self.model_name, self.backend.max_length))

    def _client(self, service: ServiceClient, checkpoint: str | Path | None) -> TrainingClient:
        lora = LoraConfig(rank=self.lora_rank, seed=self.seed) if self.lora_rank else None
        client = service.create_training_client(self.model_name, lora, self.seed)
        if checkpoint:
            client.load_state(str(checkpoint)).result()
        return client
