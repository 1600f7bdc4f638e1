"""Star graphs G(d, l): the task on which next-token training fails (Bachmann and Nagarajan 2024).

d arms of l nodes, source included, leave a source s; the goal g is the end of an arm. The model
reads the directed edges in random order and (s, g), and writes the path from s to g. Only its
second node, the first hop, is a decision. Left out: arms of different length.

    prefix_T   a b | c d | ... | y z / s g =        3E + 3 tokens, E = d(l-1)
    target_T   s ... g                              l tokens
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from posttrain.backend.errors import ConfigError

Seed = int | tuple[int, ...]
CHUNK = 4096  # rows drawn at a time, few enough for the processor's cache


@dataclass(frozen=True)
class StarGraph:
    """The size of a graph and the layout of its rows: prefix and target in numeral ids. Node i is
    i; the symbols follow the N labels.
    """

    num_paths: int  # d
    path_length: int  # l: nodes of an arm with the source
    num_nodes: int  # N: labels to choose from

    def __post_init__(self) -> None:
        if self.num_paths < 1 or self.path_length < 2:
            raise ConfigError(
                f"a star graph has at least one path of two nodes: num_paths={self.num_paths}, "
                f"path_length={self.path_length}"
            )
        if self.nodes_used > self.num_nodes:
            raise ConfigError(
                f"{self.name} has {self.nodes_used} nodes, more than the num_nodes={self.num_nodes} labels there are: "
                f"raise num_nodes to {self.nodes_used} or more, or take fewer or shorter paths"
            )

    @property
    def name(self) -> str:
        return f"G({self.num_paths},{self.path_length})"

    @property
    def num_edges(self) -> int:
        return self.num_paths * (self.path_length - 1)

    @property
    def nodes_used(self) -> int:
        return 1 + self.num_edges

    @property
    def prefix_length(self) -> int:
        return 3 * self.num_edges + 3

    @property
    def target_length(self) -> int:
        return self.path_length

    @property
    def length(self) -> int:
        return self.prefix_length + self.target_length

    @property
    def bar(self) -> int:
        return self.num_nodes

    @property
    def equals(self) -> int:
        return self.num_nodes + 1

    @property
    def slash(self) -> int:
        return self.num_nodes + 2

    @property
    def dollar(self) -> int:
        """The dummy that replaces the path in teacherless training."""
        return self.num_nodes + 3

    @property
    def eos(self) -> int:
        return self.num_nodes + 4

    @property
    def pad(self) -> int:
        return self.num_nodes + 5

    @property
    def vocab_size(self) -> int:
        return self.num_nodes + 6

    @property
    def num_graphs(self) -> int:
        """Count of different graphs with goal, whatever the order of the edges."""
        return math.perm(self.num_nodes, self.nodes_used) // math.factorial(self.num_paths - 1)

    def rows(self, parents_B_E: np.ndarray, children_B_E: np.ndarray, paths_B_L: np.ndarray) -> np.ndarray:
        """Rows from edges in their final order and the paths."""
        end = self.prefix_length - 3
        tokens_B_T = np.empty((len(paths_B_L), self.length), dtype=np.int64)
        tokens_B_T[:, 0:end:3] = parents_B_E
        tokens_B_T[:, 1:end:3] = children_B_E
        tokens_B_T[:, 2:end:3] = self.bar
        tokens_B_T[:, end - 1] = self.slash
        tokens_B_T[:, end] = paths_B_L[:, 0]
        tokens_B_T[:, end + 1] = paths_B_L[:, -1]
        tokens_B_T[:, end + 2] = self.equals
        tokens_B_T[:, self.prefix_length :] = paths_B_L
        return tokens_B_T

    def edges(self, tokens_B_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """parents_B_E and children_B_E, in the order of the row."""
        end = self.prefix_length - 3
        return tokens_B_T[:, 0:end:3], tokens_B_T[:, 1:end:3]

    def first_fault(self, tokens_B_T: np.ndarray) -> tuple[int, str] | None:
        """Index and fault of the first row that is no star graph of this size with its path."""
        if tokens_B_T.ndim != 2 or tokens_B_T.shape[1] != self.length:
            return 0, f"the array has shape {tokens_B_T.shape}, but rows of {self.name} have {self.length} tokens"
        tokens_B_T = tokens_B_T.astype(np.int64)
        labels_BM = np.delete(tokens_B_T, [*range(2, self.prefix_length - 3, 3), self.prefix_length - 1], axis=1)
        unknown_B = ((labels_BM < 0) | (labels_BM >= self.num_nodes)).any(1)
        nodes_B_T = tokens_B_T % self.num_nodes  # valid indices for the tables below
        (parents_B_E, children_B_E), path_B_L = self.edges(nodes_B_T), nodes_B_T[:, self.prefix_length :]
        source_B, goal_B = nodes_B_T[:, self.prefix_length - 3], nodes_B_T[:, self.prefix_length - 2]
        row_B = np.arange(len(tokens_B_T))
        indegree_B_N, outdegree_B_N = np.zeros((2, len(tokens_B_T), self.num_nodes), dtype=np.int64)
        np.add.at(indegree_B_N, (row_B[:, None], children_B_E), 1)
        np.add.at(outdegree_B_N, (row_B[:, None], parents_B_E), 1)
        arms_B = outdegree_B_N[row_B, source_B]
        outdegree_B_N[row_B, source_B] = 0
        # a node without parent stays where it is
        parent_B_N = np.tile(np.arange(self.num_nodes), (len(tokens_B_T), 1))
        parent_B_N[row_B[:, None], children_B_E] = parents_B_E
        root_B_E, walk = children_B_E, [goal_B]
        for _ in range(self.path_length - 1):
            root_B_E = parent_B_N[row_B[:, None], root_B_E]
            walk.append(parent_B_N[row_B, walk[-1]])
        faults = [
            (f"a node is not one of the {self.num_nodes} labels 0 to {self.num_nodes - 1}", unknown_B),
            ("two edges lead to the same node", (indegree_B_N > 1).any(1)),
            ("an edge leads to the source", indegree_B_N[row_B, source_B] > 0),
            (f"the source does not have {self.num_paths} edges", arms_B != self.num_paths),
            ("two edges leave a node that is not the source", (outdegree_B_N > 1).any(1)),
            # d(l-1) edges that neither fork nor meet, within l-1 steps of the source: d arms of l nodes
            (f"an arm does not have {self.path_length} nodes", (root_B_E != source_B[:, None]).any(1)),
            ("the goal is not the end of an arm", (walk[-1] != source_B) | (walk[-2] == source_B)),
            ("the path after '=' is not that from source to goal", (np.stack(walk[::-1], 1) != path_B_L).any(1)),
            (
                "a separator is missing or misplaced",
                (self.rows(parents_B_E, children_B_E, path_B_L) != tokens_B_T).any(1),
            ),
        ]
        wrong_B = np.stack([fault_B for _, fault_B in faults]).any(0)
        if not wrong_B.any():
            return None
        row = int(np.argmax(wrong_B))
        return row, next(reason for reason, fault_B in faults if fault_B[row])


@dataclass(frozen=True)
class HeldOut:
    """Test rows of different graphs, which training never has, whatever the order of the edges."""

    graph: StarGraph
    tokens_B_T: np.ndarray

    @cached_property
    def keys(self) -> np.ndarray:
        return np.unique(graph_keys(self.graph, self.tokens_B_T))

    def contains(self, tokens_B_T: np.ndarray) -> np.ndarray:
        """bool_B: whether the row's graph, source and goal are those of a test row."""
        return np.isin(graph_keys(self.graph, tokens_B_T), self.keys)


def graph_keys(graph: StarGraph, tokens_B_T: np.ndarray) -> np.ndarray:
    """uint64_B: equal for equal graphs, whatever the order of the edges. Two different graphs share
    a key with probability 2^-64 (Zobrist 1970).
    """
    edge_NN, ends_NN = np.random.default_rng(0).integers(0, 2**64, (2, graph.num_nodes**2), dtype=np.uint64)
    parents_B_E, children_B_E = graph.edges(tokens_B_T.astype(np.int64))
    ends_B = tokens_B_T[:, [graph.prefix_length - 3, graph.prefix_length - 2]].astype(np.int64) @ [graph.num_nodes, 1]
    return edge_NN[parents_B_E * graph.num_nodes + children_B_E].sum(1, dtype=np.uint64) + ends_NN[ends_B]


def sample_graphs(graph: StarGraph, count: int, seed: Seed, exclude: HeldOut | None = None) -> np.ndarray:
    """tokens_B_T, int64, (count, length), without EOS: a pure function of the arguments. Nodes and
    the order of edges are uniform. May hold a graph twice.
    """
    rng = np.random.default_rng(seed)
    tokens_B_T = np.empty((count, graph.length), dtype=np.int64)
    done = 0
    while done < count:
        rows_B_T = _draw(graph, min(count - done, CHUNK), rng)
        if exclude:
            rows_B_T = rows_B_T[~exclude.contains(rows_B_T)]
        tokens_B_T[done : done + len(rows_B_T)] = rows_B_T
        done += len(rows_B_T)
    return tokens_B_T


def _draw(graph: StarGraph, count: int, rng: np.random.Generator) -> np.ndarray:
    """Node 0 of a random permutation is the source, the next l-1 the first arm: edge e leads to
    e+1.
    """
    nodes_U_B = _permutations(graph.num_nodes, graph.nodes_used, count, rng)
    order_E_B = _permutations(graph.num_edges, graph.num_edges, count, rng).astype(np.intp)
    parent_E = np.where(np.arange(graph.num_edges) % (graph.path_length - 1) == 0, 0, np.arange(graph.num_edges))
    row_B = np.arange(count)
    parents_E_B = nodes_U_B.take(parent_E[order_E_B] * count + row_B)
    children_E_B = nodes_U_B.take((order_E_B + 1) * count + row_B)
    return graph.rows(parents_E_B.T, children_E_B.T, nodes_U_B[: graph.path_length].T)


def _permutations(size: int, length: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """(length, count): beginnings of uniform permutations of 0 to size - 1 (Fisher-Yates)."""
    dtype = np.uint8 if size <= 256 else np.int64
    drawn_N_B = np.repeat(np.arange(size, dtype=dtype)[:, None], count, axis=1)
    flat, row_B = drawn_N_B.reshape(-1), np.arange(count)
    for place in range(min(length, size - 1)):
        other_B = rng.integers(place, size, count, dtype=dtype).astype(np.intp) * count + row_B
        drawn_N_B[place], flat[other_B] = flat[other_B], drawn_N_B[place].copy()
    return drawn_N_B[:length]


def held_out(graph: StarGraph, count: int, seed: Seed) -> HeldOut:
    """`count` rows of different graphs, at most half of all. Raises ConfigError."""
    if count > graph.num_graphs // 2:
        raise ConfigError(
            f"{count:,} held-out graphs of the {graph.num_graphs:,} that {graph.name} over {graph.num_nodes} nodes "
            "has: take at most half"
        )
    rng = np.random.default_rng(seed)
    tokens_B_T = _draw(graph, 0, rng)
    while len(tokens_B_T) < count:
        tokens_B_T = np.concatenate([tokens_B_T, _draw(graph, count, rng)])
        _, first_B = np.unique(graph_keys(graph, tokens_B_T), return_index=True)
        tokens_B_T = tokens_B_T[np.sort(first_B)[:count]]
    return HeldOut(graph, tokens_B_T)
