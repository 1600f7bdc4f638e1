"""A language model's trunk with a linear row in place of the vocabulary head: a scalar per token,
for reward models (last token), process reward models (tokens of steps) and critics. Left out:
several scalars per token, a bias.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from posttrain.backend.batching import MicroBatch
from posttrain.backend.errors import ConfigError, ModelError
from posttrain.backend.loss_terms import LossTerm
from posttrain.backend.models import scalar_head_file
from posttrain.backend.trained_weights import SCALAR_HEAD
from posttrain.backend.trainer import CustomLoss, Trainer
from posttrain.backend.types import Datum, ForwardBackwardOutput, LoraConfig


class ScalarTrainer(Trainer):
    """A Datum's `model_input` is the whole sequence: the scalar at position t has read tokens 0 to
    t. The head starts at zero, and so does every scalar, but for a saved scalar model, which keeps its own.

    `weights` or `mask`, (T,), choose the positions of the loss; other arrays, such as `labels`,
    reach it as `inputs`. No `target_tokens`. `loss_fn_outputs[d]["scalars"]` has all positions.

      (scalars_N, inputs) -> (loss_N, diagnostics_N)   for forward and forward_backward
      (data_D, scalars_D) -> (loss, metrics)           for forward_backward_custom; scalars_D[d] is (T,)
    """

    output_name = "scalars"
    opens_trunks = True

    def _check_adapter(self, lora: LoraConfig) -> None:
        if lora.train_unembed:
            raise ModelError("train_unembed: a scalar model has no vocabulary head to put an adapter on")
        super()._check_adapter(lora)

    def _trainable_weights(self) -> dict[str, nn.Parameter]:
        head_1H = torch.zeros(1, self.hf_config.hidden_size)
        if file := scalar_head_file(self.model_name):
            head_1H.copy_(load_file(file)["weight"])
        self.scalar_head = nn.Parameter(head_1H.to(self.device))
        unused: Any = self.base.get_output_embeddings()
        if not self.hf_config.tie_word_embeddings:
            unused.requires_grad_(False)
        return super()._trainable_weights() | {SCALAR_HEAD: self.scalar_head}

    def run_terms(
        self, terms: Sequence[LossTerm], backward: bool = True, keep: bool = False
    ) -> list[ForwardBackwardOutput]:
        """As Trainer.run_terms, with callable losses only: named losses are of logprobs."""
        for term in terms:
            if isinstance(term.loss_fn, str):
                raise ConfigError(
                    f"loss_fn {term.loss_fn!r} is a loss of logprobs, and a scalar model has none: give it a callable"
                )
        return super().run_terms(
            [replace(term, data_D=[_with_targets(d) for d in term.data_D]) for term in terms], backward, keep
        )

    def run_custom(self, data_D: Sequence[Datum], fn: CustomLoss) -> ForwardBackwardOutput:
        return super().run_custom([_with_targets(datum) for datum in data_D], fn)

    def _logprobs(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 1) fp32 scalars of the positions with weight, and of the rest."""
        assert self.scalar_head is not None
        hidden_RH = self._hidden(batch)
        loss_MH, others_MH = (
            hidden_RH.index_select(0, at.rows_M).to(self.compute_dtype) for at in (batch.loss, batch.others)
        )
        head_H1 = self.scalar_head.T.float()  # FSDP gathers it in bf16
        return batch.loss.of_each(loss_MH.float() @ head_H1), batch.others.of_each(others_MH.float() @ head_H1)

    def _check_head(self) -> None:
        """A model's operations on its logits do not affect a scalar."""


def _with_targets(datum: Datum) -> Datum:
    """Batching needs a target for every position; these are not read."""
    nothing_T = np.zeros(datum.model_input.length, np.int64)
    return Datum(datum.model_input, {"target_tokens": nothing_T, **datum.loss_fn_inputs})
