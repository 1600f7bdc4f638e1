"""Off-policy distillation (Hinton et al. 2015): cross-entropy on a frozen teacher's K most likely
tokens at each trained position of any dataset. With `context` the teacher reads a system message that
the student does not: prompt distillation. Left out: logits on disk; the teacher reads each batch anew.

python -m supervised.distill dataset=chats.jsonl teacher=runs/teacher/checkpoints/final model_name=small
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import chz
import numpy as np
import torch

from posttrain.backend.errors import DataError
from posttrain.backend.losses import Tensors
from posttrain.backend.ranges import COUNT
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import check_vocabulary
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import Datum, ForwardBackwardOutput, ModelInput, SamplingParams
from posttrain.renderers import with_tools
from posttrain.renderers.types import Message, Renderer, ToolSpec, TrainOnWhat
from posttrain.tracking.command_line import run_command
from posttrain.tracking.run import Metrics, finish
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.run_folder import open_run_folder
from posttrain.tracking.trainer_restarts import with_restarts
from supervised.evaluators import EvaluatedRunConfig
from supervised.names import DATASETS, EVALUATOR_OPTIONS
from supervised.nll import NLLEvaluator
from supervised.train import Pass, training_loop
from supervised.types import SupervisedDataset, SupervisedDatasetBuilder, datasets_of

LEAST_REST = 1e-6  # a student's probability outside the K tokens, below which the loss is flat


@chz.chz
class Config(EvaluatedRunConfig):
    """Distillation of a teacher's most likely tokens."""

    dataset: SupervisedDatasetBuilder = chz.field(doc="the training data and the held-out data")
    teacher: str = chz.field(doc="a checkpoint or a model with the student's vocabulary")
    top_k: int = chz.field(
        default=8, validator=COUNT, doc="how many of the teacher's most likely tokens are targets at each position"
    )
    rest: bool = chz.field(
        default=True,
        doc="one more class for all other tokens; False: the K probabilities are divided by their sum, which teaches "
        "the student to give other tokens none",
    )
    context: str | None = chz.field(default=None, doc="a system message that only the teacher reads")
    log_path: str = log_path_field("runs/distill")


def top_k_cross_entropy(p_NK: torch.Tensor, inputs: Tensors) -> tuple[torch.Tensor, Tensors]:
    """w (-sum_k q_k p_k - r log(1 - sum_k exp p_k)), with the teacher's probabilities q (`teacher`,
    (N, K)) and r of all other tokens (`rest`, (N,)); w are `weights`. `teacher_kl` is KL(teacher ||
    student) over these K + 1 classes."""
    teacher_NK, rest_N = inputs["teacher"], inputs["rest"]
    outside_N = (1 - p_NK.exp().sum(-1)).clamp(min=LEAST_REST)
    loss_N = -(teacher_NK * p_NK).sum(-1) - rest_N * outside_N.log()
    entropy_N = -torch.xlogy(teacher_NK, teacher_NK).sum(-1) - torch.xlogy(rest_N, rest_N)
    return inputs["weights"] * loss_N, {"teacher_kl": loss_N - entropy_N}


class TopK:
    """The objective. `train_teacher_kl` is a mean over the trained tokens."""

    async def passes(self, client: TrainingClient, batch: list[Datum]) -> list[Pass]:
        return [(batch, client.forward_backward(batch, top_k_cross_entropy, all_logprobs=False))]

    def metrics(self, batch: list[Datum], outputs: Sequence[ForwardBackwardOutput]) -> Metrics:
        metrics = outputs[0].metrics
        return {"train_teacher_kl": metrics["teacher_kl:mean"], "num_loss_tokens": metrics["num_loss_tokens:sum"]}


@dataclass(frozen=True)
class ContextRenderer:
    """A renderer whose supervised examples begin with a system message."""

    renderer: Renderer
    context: str

    def build_supervised_example(
        self, messages: Sequence[Message], train_on_what: TrainOnWhat = TrainOnWhat.ALL_ASSISTANT_MESSAGES
    ) -> tuple[list[int], list[float]]:
        system = Message(role="system", content=self.context)
        return self.renderer.build_supervised_example([system, *messages], train_on_what)

    def with_tools(self, tools: Sequence[ToolSpec], list_tools: bool = True) -> Renderer:
        return with_context(with_tools(self.renderer, tools, list_tools), self.context)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.renderer, name)


def with_context(renderer: Renderer, context: str) -> Renderer:
    return cast(Renderer, ContextRenderer(renderer, context))


@dataclass
class TeacherTargets:
    """A dataset with the teacher's targets for the tokens that carry weight. `read` is the same
    dataset as the teacher reads it; `vocabulary` the student's, whose padding may be shorter."""

    dataset: SupervisedDataset
    read: SupervisedDataset
    teacher: SamplingClient
    config: Config
    vocabulary: int

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)
        self.read.set_epoch(epoch)

    def get_batch(self, index: int) -> list[Datum]:
        data_D, read_D = self.dataset.get_batch(index), self.read.get_batch(index)
        params = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
        # more, where it has ids that the student lacks: they may be among its most likely
        k = self.config.top_k + max(0, self.teacher.vocabulary - self.vocabulary)
        answers_D = [self.teacher.sample(_whole(datum), 1, params, topk_prompt_logprobs=k) for datum in read_D]
        entries_D = [answer.result().topk_prompt_logprobs for answer in answers_D]
        return [
            with_targets(datum, read, entries[1:], self.config.top_k, self.config.rest, self.vocabulary)
            for datum, read, entries in zip(data_D, read_D, entries_D, strict=True)
            if entries
        ]


def _whole(datum: Datum) -> ModelInput:
    """The inputs and the last target."""
    return ModelInput.from_ints([*datum.model_input.to_ints(), int(datum.loss_fn_inputs["target_tokens"].array[-1])])


def with_targets(
    datum: Datum,
    read: Datum,
    entries_T: Sequence[list[tuple[int, float]] | None],
    top_k: int,
    rest: bool,
    vocabulary: int,
) -> Datum:
    """`entries_T`: (token, logprob) of the teacher for each position of `read`; ids from `vocabulary` on, which the
    student lacks, are among all other tokens. DataError if the teacher's trained tokens are not the student's."""
    at_N, read_at_N = (np.flatnonzero(d.loss_fn_inputs["weights"].array) for d in (datum, read))
    trained, trained_there = (
        d.loss_fn_inputs["target_tokens"].array[at] for d, at in ((datum, at_N), (read, read_at_N))
    )
    if not np.array_equal(trained, trained_there):
        raise DataError(
            "with context the teacher reads other trained tokens than the student: one of them was truncated or "
            "dropped (max_length), or train_on_what covers the context"
        )
    length = datum.model_input.length
    targets_TK, teacher_TK = np.zeros((length, top_k), np.int64), np.zeros((length, top_k), np.float32)
    for at, read_at in zip(at_N, read_at_N, strict=True):
        known = [entry for entry in entries_T[read_at] or [] if entry[0] < vocabulary]
        best = sorted(known, key=lambda entry: -entry[1])[:top_k]
        targets_TK[at, : len(best)] = [token for token, _ in best]
        teacher_TK[at, : len(best)] = np.exp([logprob for _, logprob in best])
    rest_T = np.zeros(length, np.float32)
    rest_T[at_N] = (1 - teacher_TK[at_N].sum(-1)).clip(min=0)
    if not rest:
        teacher_TK[at_N] /= teacher_TK[at_N].sum(-1, keepdims=True)
        rest_T[:] = 0
    inputs = {"target_tokens": targets_TK, "teacher": teacher_TK, "rest": rest_T}
    return Datum(datum.model_input, {**inputs, "weights": datum.loss_fn_inputs["weights"]})


class Evaluator:
    """`test/nll`, and `test/teacher_kl`."""

    def __init__(self, plain: SupervisedDataset, targets: TeacherTargets):
        self._nll, self._batches_B = NLLEvaluator(plain), [targets.get_batch(i) for i in range(len(targets))]

    async def __call__(self, client: TrainingClient) -> Metrics:
        submitted = [client.forward(batch, top_k_cross_entropy, all_logprobs=False) for batch in self._batches_B]
        parts = [(await future).metrics for future in submitted]
        tokens = sum(part["num_loss_tokens:sum"] for part in parts)
        total = sum(part["teacher_kl:mean"] * part["num_loss_tokens:sum"] for part in parts)
        return await self._nll(client) | {"test/teacher_kl": total / tokens}


def open_frozen(service: ServiceClient, teacher: str) -> SamplingClient:
    """A folder, or a model by name."""
    if Path(teacher).expanduser().is_dir():
        return service.create_sampling_client(teacher)
    return service.create_sampling_client(base_model=teacher)


@with_restarts
async def main(config: Config) -> Metrics:
    """Trains; returns the last metrics. Input errors are raised before a model loads."""
    renderer = config.renderer()
    check_vocabulary(f"teacher={config.teacher}", config.teacher, renderer.tokenizer)
    dataset, test_dataset = datasets_of(config.dataset, renderer)
    read, test_read = dataset, test_dataset
    if config.context:
        read, test_read = datasets_of(config.dataset, with_context(renderer, config.context))
    custom = await config.build_evaluators(renderer)
    folder = open_run_folder(config.log_path, config.behavior_if_log_dir_exists, config)
    with ServiceClient(config.backend, folder.checkpoints) as service:
        client = service.create_training_client(config.model_name, config.lora(), config.seed)
        teacher = open_frozen(service, config.teacher)
        evaluator = None
        if test_dataset is not None and test_read is not None and config.eval_every:
            evaluator = Evaluator(
                test_dataset, TeacherTargets(test_dataset, test_read, teacher, config, client.vocabulary)
            )
        targets = TeacherTargets(dataset, read, teacher, config, client.vocabulary)
        headline = {"train_teacher_kl": "kl", "test/teacher_kl": "test kl"}
        metrics = await training_loop(
            config, folder, client, targets, TopK(), evaluator, name="distill", headline=headline, custom=custom
        )
    finish(folder, metrics)
    return metrics


if __name__ == "__main__":
    run_command(main, Config, {"dataset": DATASETS} | EVALUATOR_OPTIONS)
