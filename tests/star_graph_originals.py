"""What the original programs make of star graphs: BST's rows and files, and a stand-in for GPT-2's
tokenizer; with this project's layout of rows.
"""

import random
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from envs.star_graph import StarGraph
from envs.star_graph_files import _parse, format_line
from envs.star_graph_tokens import SYMBOLS, Layout, word_tokenizer


def bst_rows(graph: StarGraph, count: int, first: int = 0) -> np.ndarray:
    """tokens_B_T: lines `first` to `first + count` of the file that the Belief State Transformer's
    prepare.py writes, bit for bit; line k is seeded by k.
    """
    edges_B, paths_B = [], []
    for k in range(first, first + count):
        rng = random.Random(k)
        nodes = list(range(graph.num_nodes))
        rng.shuffle(nodes)
        source = nodes.pop()
        arms = [[source, *(nodes.pop() for _ in range(graph.path_length - 1))] for _ in range(graph.num_paths)]
        edges = [edge for arm in arms for edge in zip(arm[:-1], arm[1:], strict=True)]
        rng.shuffle(edges)
        edges_B.append(edges)
        paths_B.append(arms[0])
    edges_B_E_2 = np.array(edges_B)
    return graph.rows(edges_B_E_2[:, :, 0], edges_B_E_2[:, :, 1], np.array(paths_B))


def parse_line(line: str, graph: StarGraph) -> np.ndarray:
    """tokens_T of a line."""
    return _parse([line.rstrip("\n")], graph, lambda _: "line 1")[0]


def write_lines(path: str | Path, tokens_B_T: np.ndarray, graph: StarGraph) -> None:
    Path(path).write_text("".join(format_line(tokens_T, graph) + "\n" for tokens_T in tokens_B_T))


def gpt2_stand_in(graph: StarGraph, max_length: int | None = None) -> PreTrainedTokenizerFast:
    """One token per number and separator, commas too, as GPT-2's BPE for numbers of two digits."""
    return word_tokenizer(graph.num_nodes, [*SYMBOLS, ","], r"\d+|[|=/$,]", max_length or 4 * graph.length)


def numeral_layout(graph: StarGraph) -> Layout:
    return Layout(graph, np.arange(graph.vocab_size))
