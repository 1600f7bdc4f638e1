"""A perfect classifier of star graphs: it follows the edges, and rates a prefix of the path as
right.
"""

import numpy as np
import torch

from envs.star_graph_tokens import Layout
from recipes.libraries.value_guidance.guided_sampler import ValueReader

LOGIT = 20.0  # P(right) is 1 - 2e-9 or 2e-9


def oracle(layout: Layout, vocab_size: int) -> ValueReader:
    """`vocab_size`: of the policy."""
    return ValueReader(OracleTrunk(layout, vocab_size), lambda before, after: after)


class OracleTrunk:
    """The state is the classifier's logit, the cache the tokens so far."""

    hidden_size = 1

    def __init__(self, layout: Layout, vocab_size: int):
        self.layout, self.vocab_size, self.max_length = layout, vocab_size, layout.length

    def read(self, tokens_B_T: torch.Tensor, cache: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        before, prefix = 0 if cache is None else cache.shape[1], self.layout.prefix_length
        ids_B_T = tokens_B_T if cache is None else torch.cat([cache, tokens_B_T], dim=1)
        right_B_T = torch.ones_like(ids_B_T, dtype=torch.bool)
        if ids_B_T.shape[1] > prefix:
            paths_B_L = torch.from_numpy(true_paths(ids_B_T[:, :prefix].cpu().numpy(), self.layout)).to(ids_B_T.device)
            written_B_L = ids_B_T[:, prefix:]
            right_B_T[:, prefix:] = (written_B_L == paths_B_L[:, : written_B_L.shape[1]]).cumprod(1).bool()
        return torch.where(right_B_T, LOGIT, -LOGIT)[:, before:, None], ids_B_T

    def select(self, cache: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return cache[rows]


def true_paths(prefixes_B_P: np.ndarray, layout: Layout) -> np.ndarray:
    """(B, target_length), in the tokenizer's ids; found by following edges back from the goal."""
    graph = layout.graph
    numeral = {int(token): v for v, token in enumerate(layout.ids_V)}
    tokens_B_P = np.array([[numeral[token] for token in row if token != layout.comma] for row in prefixes_B_P.tolist()])
    parents_B_E, children_B_E = graph.edges(np.pad(tokens_B_P, ((0, 0), (0, graph.target_length))))
    rows_B_1 = np.arange(len(tokens_B_P))[:, None]
    parent_B_N = np.zeros((len(tokens_B_P), graph.num_nodes), dtype=np.int64)
    parent_B_N[rows_B_1, children_B_E] = parents_B_E
    path = [tokens_B_P[:, graph.prefix_length - 2]]
    for _ in range(graph.path_length - 1):
        path.append(parent_B_N[rows_B_1[:, 0], path[-1]])
    rows_B_T = graph.rows(parents_B_E, children_B_E, np.stack(path[::-1], axis=1))
    return layout.encode(rows_B_T)[:, layout.prefix_length :]
