"""Labelled steps as training data of a process reward model; pointwise cross-entropy (B-STaR, Zeng
et al. 2024). Both sums are over a batch. A step's label is copied to all its tokens, or its last
few. Question tokens, and the last step of a malformed solution, have weight 0. Left out: ranking
losses.

  L = sum_t w_t BCE(logit_t, label of the step of t) / (sum_t w_t + 1e-6)
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import chz
import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.losses import Tensors
from posttrain.backend.ranges import COUNT, WHOLE
from posttrain.backend.types import Datum, ModelInput
from posttrain.renderers.types import Renderer, TrainOnWhat
from posttrain.tracking.datasets import DrawnDataset, ListDataset, held_out
from preference.prm_labels import StepRecord, read_records
from preference.scored_tokens import scored_tokens
from preference.steps import StepFormat, split_response
from supervised.examples import by_processes
from supervised.rows import exchange
from supervised.types import SupervisedDataset, SupervisedDatasetBuilder


def step_cross_entropy(scalars_N: torch.Tensor, inputs: Tensors) -> tuple[torch.Tensor, Tensors]:
    """w BCE(scalar, label), labels in [0, 1]; training_batches makes a batch's weights sum to 1."""
    loss_N = binary_cross_entropy_with_logits(scalars_N, inputs["labels"], reduction="none")
    right_N = ((scalars_N > 0) == (inputs["labels"] > 0.5)).float()
    return inputs["weights"] * loss_N, {"accuracy": right_N}


def training_batches(examples: Sequence[Datum], batch_size: int, seed: int = 0) -> DrawnDataset[Datum]:
    """Batches whose weights add up to 1."""
    examples_D = ListDataset(examples, batch_size, seed)

    def batch(epoch: int, index: int) -> list[Datum]:
        batch_D = examples_D.batch(epoch, index)
        total = sum(float(datum.loss_fn_inputs["weights"].array.sum()) for datum in batch_D) + 1e-6
        return [
            Datum(datum.model_input, {**datum.loss_fn_inputs, "weights": datum.loss_fn_inputs["weights"].array / total})
            for datum in batch_D
        ]

    return DrawnDataset(batch, len(examples_D))


def step_datum(record: StepRecord, renderer: Renderer, config: "StepExamplesBuilder") -> Datum | None:
    """`labels` and `weights` per token, and `step_ends`, 1 at the last token of a step. None if no
    step is left to train on."""
    form, last_tokens = config.form, config.last_tokens
    text = form.separator.join(record.output) if record.written is None else record.written
    messages = exchange({"prompt": record.input, "completion": text}, "prompt", "completion", config.prompt_template)
    tokens, weights = scored_tokens(renderer, messages)
    prompt = weights.index(1.0)
    steps = split_response(tokens[prompt:], renderer, form)
    if len(steps.strings) != len(record.output):
        raise DataError(
            f"{len(record.output)} steps, which read as {len(steps.strings)} with separator={form.separator!r}"
        )
    labels = record.soft if config.labels == "soft" else record.label
    if labels is None:
        raise DataError("no field 'soft': train on the hard labels, or label the steps again")
    arrays = {name: np.zeros(len(tokens), dtype=np.float32) for name in ("labels", "weights", "step_ends")}
    trained = len(labels) - bool(record.malformed)
    if config.until_first_error and 0 in record.label:
        trained = min(trained, record.label.index(0) + 1)
    for start, end, label in zip(steps.bounds[:trained], steps.bounds[1:], labels, strict=False):
        start = start if last_tokens is None else max(start, end - last_tokens)
        arrays["labels"][prompt + start : prompt + end] = label
        arrays["weights"][prompt + start : prompt + end] = 1
        arrays["step_ends"][prompt + end - 1] = 1
    return Datum(ModelInput.from_ints(tokens), arrays) if trained else None


@chz.chz
class StepExamplesBuilder(SupervisedDatasetBuilder):
    """Labelled steps from a file of "prm-v4" records (prm_labels.py)."""

    path: str = chz.field(doc="JSONL file to train on")
    test_path: str | None = chz.field(default=None, doc="held-out JSONL file of the same form")
    test_size: int = chz.field(
        default=0, validator=WHOLE, doc="questions held out from the training file, with all their solutions; 0 = none"
    )
    form: StepFormat = chz.field(default_factory=StepFormat, doc="how solutions are written")
    labels: Literal["hard", "soft"] = chz.field(default="hard", doc="soft = the share of completions that were right")
    last_tokens: int | None = chz.field(
        default=None, validator=COUNT, doc="train on this many last tokens of each step; None = on all of them"
    )
    until_first_error: bool = chz.field(
        default=False, doc="drop steps after the first labelled 0 (Lightman et al. 2023); small models learn faster"
    )
    prompt_template: str = chz.field(default="{prompt}", doc="the user's message; {prompt} stands for the question")
    reduction: str = chz.field(default="sum", doc="'sum': each token weighs the same; 'mean': each solution does")

    def __call__(self, renderer: Renderer) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        if self.train_on_what != TrainOnWhat.ALL_ASSISTANT_MESSAGES or self.reduction not in ("sum", "mean"):
            raise ConfigError(
                "a process reward model trains on steps: leave train_on_what out, and reduction is 'sum' or 'mean'"
            )
        train, test = read_records(self.path), read_records(self.test_path) if self.test_path else []
        if self.test_size:
            train, test = self._split(train, test)
        questions = {record.input for record in test}
        if shared := sum(record.input in questions for record in train):
            print(f"{self.path}: {shared:,} solutions of held-out questions dropped from the training set")
            train = [record for record in train if record.input not in questions]
        train_set = training_batches(self._data(train, renderer, "training"), self.batch_size, self.seed)
        if not test:
            return train_set, None
        return train_set, held_out(self._data(test, renderer, "held-out"), self.batch_size)

    def _split(self, train: list[StepRecord], test: list[StepRecord]) -> tuple[list[StepRecord], list[StepRecord]]:
        questions = sorted({record.input for record in train})
        if test or not 0 < self.test_size < len(questions):
            raise ConfigError(
                f"test_size={self.test_size} of {len(questions)} questions: leave some to train on, and no test_path"
            )
        # of places: an array of texts takes the room of the longest for each
        chosen = np.random.default_rng(self.seed).permutation(len(questions))[: self.test_size]
        drawn = {questions[place] for place in chosen}
        return [record for record in train if record.input not in drawn], [r for r in train if r.input in drawn]

    def _data(self, records: Sequence[StepRecord], renderer: Renderer, kind: str) -> list[Datum]:
        """Prints one line: the number of solutions and the reasons for dropping others."""
        limit = self.max_length or renderer.tokenizer.model_max_length
        rows = [(f"{self.path}, {kind} record {number}", record) for number, record in enumerate(records)]
        data, overlong, empty = [], 0, 0
        for part in by_processes(partial(self._datums, renderer), rows, f"tokenizing {kind} solutions"):
            empty += part.count(None)
            whole = [datum for datum in part if datum is not None]
            fitting = [datum for datum in whole if datum.model_input.length <= limit]
            overlong += len(whole) - len(fitting)
            data += [Datum(ModelInput.kept(datum.model_input.to_ints()), datum.loss_fn_inputs) for datum in fitting]
        print(
            f"{self.path}: {len(data):,} {kind} solutions; dropped {overlong:,} longer than {limit} tokens, {empty:,} "
            "cut off in their only step, or without the answer in it"
        )
        if not data:
            advice = "sample longer solutions, of a policy that ends them as form says" if empty else "raise max_length"
            raise DataError(f"{self.path}: no {kind} solution is left to use: {advice}")
        return data

    def _datums(self, renderer: Renderer, rows: Sequence[tuple[str, StepRecord]]) -> list[Datum | None]:
        data = []
        for where, record in rows:
            try:
                datum = step_datum(record, renderer, self)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
            data.append(datum and self._reduced(datum))
        return data

    def _reduced(self, datum: Datum) -> Datum:
        weights_T = datum.loss_fn_inputs["weights"].array
        scale = weights_T.sum() if self.reduction == "mean" else 1.0
        return Datum(datum.model_input, {**datum.loss_fn_inputs, "weights": weights_T / scale})
