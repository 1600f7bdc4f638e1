"""Star graphs for the Belief State Transformer and its GPT baseline, with the accuracy of decoded
paths, which the original does not measure.

A row is graph, path, EOS. Prefixes end at "=" or later and pairs are at least two apart: l (l + 1)
/ 2 pairs for a path of l nodes. The baseline is trained on every token, also of the random edges, or
on the path alone, as the BST is.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import chz
import numpy as np
import torch

from envs.star_graph import HeldOut, StarGraph
from envs.star_graph_data import Batches, StarGraphTask, path_accuracy
from recipes.belief_state.source import TokenSourceBuilder
from recipes.libraries.belief_state.decoding import greedy_tokens
from recipes.libraries.belief_state.model import BeliefState, NextToken
from recipes.libraries.belief_state.trainer import BeliefStateTrainer, Metrics, TokenBatch

EVAL_ROWS = 1024  # graphs per batch


@chz.chz
class StarGraphBuilder(StarGraphTask, TokenSourceBuilder):
    loss_on: Literal["all", "path"] = chz.field(
        default="all", doc="targets of the GPT: all tokens, as in the original, or the path and EOS"
    )

    def __call__(self, batch_size: int, seed: int) -> "StarGraphSource":
        self.check_measured()
        rows_D_T, test = self.split()
        n_batches = 1 if rows_D_T is None else -(-len(rows_D_T) // batch_size)
        return StarGraphSource(Batches(self.graph(), test, rows_D_T, batch_size, n_batches, (seed,)), self.loss_on)


def task_name(graph: StarGraph) -> str:
    return f"{graph.name} N={graph.num_nodes}"


class StarGraphSource:
    def __init__(self, batches: Batches, loss_on: Literal["all", "path"]):
        self.batches, self.graph, self.loss_on = batches, batches.graph, loss_on
        self.vocab_size, self.eos_id, self.task = self.graph.vocab_size, self.graph.eos, task_name(self.graph)
        self.context_length = self.graph.prefix_length - 1

    def get_batch(self, step: int) -> TokenBatch:
        epoch, index = divmod(step, len(self.batches))
        return self.batch(self.batches.rows(index, epoch))

    def evaluate(self, trainer: BeliefStateTrainer) -> Metrics:
        losses = held_out_losses(trainer, self.batch(self.batches.test.tokens_B_T), EVAL_ROWS)
        return losses | {f"test/{name}": value for name, value in accuracy(trainer.model, self.batches.test).items()}

    def batch(self, tokens_B_T: np.ndarray) -> TokenBatch:
        batch = with_eos(self.graph, tokens_B_T)
        if self.loss_on == "all":
            return batch
        on_path_T = np.arange(batch.tokens_B_T.shape[1]) >= self.graph.prefix_length
        return replace(batch, loss_mask_B_T=np.broadcast_to(on_path_T, batch.tokens_B_T.shape))

    def save(self, folder: Path) -> None:
        """Nothing to write: the ids are the node labels."""


def with_eos(graph: StarGraph, tokens_B_T: np.ndarray) -> TokenBatch:
    eos_B_1 = np.full((len(tokens_B_T), 1), graph.eos)
    return TokenBatch(np.concatenate([tokens_B_T, eos_B_1], axis=1), packed=False)


def accuracy(model: BeliefState | NextToken, test: HeldOut) -> Metrics:
    """first_hop, exact and node_k (envs/star_graph_data.py) of l greedily decoded tokens, empty
    suffix.
    """
    graph, device = test.graph, model.embedding.weight.device
    prefixes_B_T = torch.from_numpy(test.tokens_B_T[:, : graph.prefix_length].astype(np.int64)).to(device)
    paths = [greedy_tokens(model, rows, graph.target_length) for rows in prefixes_B_T.split(EVAL_ROWS)]
    return path_accuracy(torch.cat(paths).cpu().numpy(), test.tokens_B_T[:, graph.prefix_length :])


def held_out_losses(trainer: BeliefStateTrainer, batch: TokenBatch, rows: int) -> Metrics:
    """Losses of a large batch, `rows` at a time, averaged over rows, or over targets if masked."""
    totals: Metrics = {}
    mask_B_T = batch.loss_mask_B_T
    weight_B = np.ones(len(batch.tokens_B_T)) if mask_B_T is None else mask_B_T[:, 1:].sum(1)
    for start in range(0, len(batch.tokens_B_T), rows):
        part = slice(start, start + rows)
        if not weight_B[part].any():
            continue
        losses = trainer.evaluate(
            TokenBatch(batch.tokens_B_T[part], batch.packed, None if mask_B_T is None else mask_B_T[part])
        )
        for name, value in losses.items():
            if name.startswith("loss"):
                share = float(weight_B[part].sum() / weight_B.sum())
                totals[f"test/{name}"] = totals.get(f"test/{name}", 0.0) + share * value
    return totals
