"""Tokenizers for star graphs: numeral, GPT-2's or another of the hub.

A Layout turns the numeral ids of star_graph.py into the ids of any tokenizer with one token per
number and separator. With commas as tokens (GPT-2) prefix and target have 4E + 4 and 2l - 1 tokens,
without 3E + 3 and l. Left out: tokenizers that split numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from envs.star_graph import StarGraph, sample_graphs
from envs.star_graph_files import format_line
from posttrain.backend.errors import ModelError

SYMBOLS = ["|", "=", "/", "$"]
SPECIAL = ["<eos>", "<pad>"]


def numeral_tokenizer(graph: StarGraph) -> PreTrainedTokenizerFast:
    """Node i is i, then | = / $, EOS and padding: the ids of star_graph.py. Commas are skipped."""
    return word_tokenizer(graph.num_nodes, SYMBOLS, r"\d+|[|=/$]", graph.length + 1)


def word_tokenizer(num_nodes: int, symbols: list[str], words: str, max_length: int) -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate([*map(str, range(num_nodes)), *symbols, *SPECIAL])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(words), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[1],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Layout:
    """Rows in a tokenizer's ids: ids_V[v] is the id of numeral id v; `comma` None drops commas."""

    graph: StarGraph
    ids_V: np.ndarray
    comma: int | None = None

    @property
    def dollar(self) -> int:
        return int(self.ids_V[self.graph.dollar])

    @property
    def prefix_length(self) -> int:
        return self.graph.prefix_length + (self.graph.num_edges + 1 if self.comma is not None else 0)

    @property
    def nodes_L(self) -> np.ndarray:
        """Indices of the path's nodes in the target. The first hop is nodes_L[1]."""
        return np.arange(self.graph.path_length) * (1 if self.comma is None else 2)

    @property
    def target_length(self) -> int:
        return int(self.nodes_L[-1]) + 1

    @property
    def length(self) -> int:
        return self.prefix_length + self.target_length

    def encode(self, tokens_B_T: np.ndarray) -> np.ndarray:
        """Rows in the tokenizer's ids: (B, length) int64."""
        ids_B_T = self.ids_V[tokens_B_T]
        if self.comma is None:
            return ids_B_T
        # before the second node of each edge and of (s, g), and before each node of the path but the first
        prefix = self.graph.prefix_length
        commas = [*range(1, prefix, 3), *range(prefix + 1, self.graph.length)]
        return np.insert(ids_B_T, commas, self.comma, axis=1)

    def reversed(self, ids_B_T: np.ndarray) -> np.ndarray:
        """The same rows with the path written from the goal to the source."""
        return np.concatenate([ids_B_T[:, : self.prefix_length], ids_B_T[:, self.prefix_length :][:, ::-1]], axis=1)


def layout_of(tokenizer: PreTrainedTokenizerBase, graph: StarGraph) -> Layout:
    """The Layout of `tokenizer`. ModelError if some number or separator is not one token."""
    pieces = [*map(str, range(graph.num_nodes)), *SYMBOLS]
    ids = [_one_token(tokenizer, piece, graph) for piece in pieces]
    commas = tokenizer.encode(",", add_special_tokens=False)
    specials = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    rest = [token if isinstance(token, int) else -1 for token in specials]  # no row has these
    layout = Layout(graph, np.array([*ids, *rest]), _one_token(tokenizer, ",", graph) if commas else None)
    row_T = sample_graphs(graph, 1, 0)[0]
    if tokenizer.encode(format_line(row_T, graph), add_special_tokens=False) != layout.encode(row_T[None])[0].tolist():
        raise ModelError(
            "this tokenizer joins the numbers and separators of a star graph: the tokens of a line are not its pieces"
        )
    return layout


def _one_token(tokenizer: PreTrainedTokenizerBase, piece: str, graph: StarGraph) -> int:
    ids: Sequence[int] = tokenizer.encode(piece, add_special_tokens=False)
    if len(ids) != 1 or ids[0] in (tokenizer.unk_token_id, tokenizer.pad_token_id):
        raise ModelError(
            f"the tokenizer writes {piece!r} in {len(ids)} tokens, and star graphs over {graph.num_nodes} nodes need "
            "one for every number and separator: was it made for another number of nodes? Give the num_nodes of the "
            "graphs, or a model of recipes/star_graph/model.py"
        )
    return int(ids[0])
