"""Star graphs to train on: supervised (path forward, reversed or teacherless), or by RL.

Training graphs are drawn for every batch, as a function of (seed, epoch, batch), or read from a
file. Held-out graphs are in no training batch. Only target tokens have a loss. Teacherless (Monea
et al. 2023; Bachmann and Nagarajan 2024, section 5): the model reads "$" in place of the path. Left
out: several graphs in one sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import chz
import numpy as np

from envs.star_graph import HeldOut, StarGraph, held_out, sample_graphs
from envs.star_graph_files import KeptRows, graph_of_path, read_rows, without
from envs.star_graph_tokens import Layout, layout_of
from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.ranges import COUNT, NUMBER, SEED, WHOLE
from posttrain.backend.types import Datum, ModelInput
from posttrain.renderers.types import Renderer
from posttrain.tracking.datasets import DrawnDataset
from posttrain.tracking.seeds import GRAPH_GROUPS, GRAPHS
from rl.types import Action, Env, EnvGroupBuilder, Observation, RLDataset, RLDatasetBuilder, StepResult, StopCondition
from supervised.types import SupervisedDataset, SupervisedDatasetBuilder

Targets = Literal["forward", "reversed", "teacherless"]


def path_accuracy(paths_B_L: np.ndarray, gold_B_L: np.ndarray) -> dict[str, float]:
    """Shares of rows with the first hop (second node), the whole path, and node k right, k from 1."""
    right_B_L = np.asarray(paths_B_L) == np.asarray(gold_B_L)
    nodes = {f"node_{k}": float(share) for k, share in enumerate(right_B_L.mean(0), start=1)}
    return {"first_hop": float(right_B_L[:, 1].mean()), "exact": float(right_B_L.all(1).mean()), **nodes}


@chz.chz
class StarGraphTask:
    """The graphs and their split: give the same values to all builders."""

    num_paths: int | None = chz.field(
        default=None, validator=COUNT, doc="arms of a graph, d; None = 2, or what the name of `path` says"
    )
    path_length: int | None = chz.field(
        default=None, validator=COUNT, doc="nodes of an arm with the source, l; None = 3, or as the name says"
    )
    num_nodes: int | None = chz.field(
        default=None,
        validator=COUNT,
        doc="labels a node may have, N; None = 12, or as the name says (50 for a name without it)",
    )
    num_test: int = chz.field(default=400, validator=WHOLE, doc="held-out graphs")
    test_seed: int = chz.field(
        default=0, validator=SEED, doc="seed of the choice of held-out graphs; the same for all compared methods"
    )
    path: str | None = chz.field(
        default=None,
        doc="training graphs from this file (.txt of an original, or .npy) instead of fresh ones; its name tells the "
        "size",
    )
    test_path: str | None = chz.field(
        default=None, doc="held-out graphs from this file; None = drawn, or the first of `path`"
    )

    def graph(self) -> StarGraph:
        configured = (self.num_paths, self.path_length, self.num_nodes)
        named = {path: graph_of_path(path, self.num_nodes) for path in (self.path, self.test_path) if path}
        sizes = {path: (graph.num_paths, graph.path_length, graph.num_nodes) for path, graph in named.items()}
        defaults = next(iter(sizes.values()), (2, 3, 12))
        graph = StarGraph(*(given or default for given, default in zip(configured, defaults, strict=True)))
        for path, held in named.items():
            if held != graph:
                raise ConfigError(
                    f"{path} holds {held.name} over {held.num_nodes} nodes, not {graph.name} over {graph.num_nodes}: "
                    "leave num_paths, path_length and num_nodes out, and give files of the same size"
                )
        return graph

    def check_measured(self) -> None:
        """For those who measure accuracy: ConfigError if no graph is to be held out."""
        if not self.num_test:
            raise ConfigError("num_test=0: accuracy is measured on held-out graphs; set it to 1 or more")

    def split(self) -> tuple[KeptRows | None, HeldOut]:
        """Training rows, without held-out graphs, and held-out rows. None: training rows are drawn."""
        graph = self.graph()
        rows_D_T = read_rows(self.path, graph) if self.path else None
        if self.test_path:
            test = HeldOut(graph, read_rows(self.test_path, graph, self.num_test))
        elif rows_D_T is not None:
            test = HeldOut(graph, rows_D_T[: self.num_test])
        else:
            test = held_out(graph, self.num_test, self.test_seed)
        if rows_D_T is None:
            return None, test
        kept = without(rows_D_T, test)
        if not len(kept):
            raise DataError(
                f"{self.path}: all {len(rows_D_T):,} graphs are held out (num_test={self.num_test}); none is left"
            )
        left_out = len(rows_D_T) - len(kept)
        print(f"{self.path}: {len(kept):,} graphs to train on; {left_out:,} left out that are among the held-out ones")
        return kept, test


@dataclass(frozen=True)
class Batches:
    """Training rows by batch: drawn, or `rows_D_T` in an order that depends on (seed, epoch)."""

    graph: StarGraph
    test: HeldOut
    rows_D_T: KeptRows | np.ndarray | None
    batch_size: int
    n_batches: int
    seed: tuple[int, ...]

    def __len__(self) -> int:
        return self.n_batches if self.rows_D_T is None else -(-len(self.rows_D_T) // self.batch_size)

    def rows(self, index: int, epoch: int = 0) -> np.ndarray:
        if self.rows_D_T is None:
            return sample_graphs(self.graph, self.batch_size, (*self.seed, epoch, index), self.test)
        order_D = np.random.default_rng((*self.seed, epoch)).permutation(len(self.rows_D_T))
        return self.rows_D_T[np.sort(order_D[index * self.batch_size : (index + 1) * self.batch_size])]


# --- supervised ---------------------------------------------------------------------------------


def supervised_datum(ids_T: np.ndarray, layout: Layout, targets: Targets = "forward") -> Datum:
    """A Datum from a row in the tokenizer's ids. The weights of a target sum to 1."""
    inputs_T, prefix = ids_T[:-1].copy(), layout.prefix_length
    if targets == "teacherless":
        inputs_T[prefix:] = layout.dollar
    weights_T = np.zeros(len(inputs_T), dtype=np.float32)
    weights_T[prefix - 1 :] = 1 / layout.target_length
    return Datum(ModelInput.from_ints(inputs_T.tolist()), {"target_tokens": ids_T[1:], "weights": weights_T})


@chz.chz
class StarGraphExamplesBuilder(StarGraphTask, SupervisedDatasetBuilder):
    """Paths to imitate. The held-out set is the held-out graphs, in one batch."""

    targets: Targets = chz.field(
        default="forward",
        doc="'forward': source to goal; 'reversed': goal to source; 'teacherless': all nodes at once, after dummies",
    )
    n_batches: int = chz.field(default=1000, validator=COUNT, doc="batches of an epoch, where graphs are drawn")

    def __call__(self, renderer: Renderer) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        train, test, _ = self.datasets(renderer)
        return train, test if self.num_test else None

    def datasets(self, renderer: Renderer) -> tuple[SupervisedDataset, SupervisedDataset, HeldOut]:
        """Training set, held-out set, and the held-out graphs."""
        rows_D_T, test = self.split()
        layout = layout_of(renderer.tokenizer, test.graph)

        def data(rows_B_T: np.ndarray) -> list[Datum]:
            ids_B_T = layout.encode(rows_B_T)
            if self.targets == "reversed":
                ids_B_T = layout.reversed(ids_B_T)
            return [supervised_datum(ids_T, layout, self.targets) for ids_T in ids_B_T]

        train = Batches(test.graph, test, rows_D_T, self.batch_size, self.n_batches, (self.seed, GRAPHS))
        return (
            DrawnDataset(lambda epoch, index: data(train.rows(index, epoch)), len(train)),
            DrawnDataset(lambda epoch, index: data(test.tokens_B_T), 1),
            test,
        )


# --- reinforcement learning ---------------------------------------------------------------------


class StarGraphEnv(Env):
    """One graph, one answer. Metrics are those of path_accuracy, with `correct` for `exact`."""

    def __init__(
        self, ids_T: Sequence[int], layout: Layout, wrong_reward: float = 0.0, renderer: Renderer | None = None
    ):
        self.prompt = ModelInput.from_ints(ids_T[: layout.prefix_length])
        self.target = list(ids_T[layout.prefix_length :])
        self.layout, self.wrong_reward, self.renderer = layout, wrong_reward, renderer

    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        return self.prompt, []  # the answer's length is known: no token ends it

    async def step(self, action: Action) -> StepResult:
        sampled = (list(action) + [-1] * len(self.target))[: len(self.target)]
        correct = sampled == self.target
        nodes_L = self.layout.nodes_L
        metrics = path_accuracy(np.array(sampled)[None, nodes_L], np.array(self.target)[None, nodes_L])
        del metrics["exact"]
        return StepResult(
            reward=1.0 if correct else self.wrong_reward,
            episode_done=True,
            next_observation=ModelInput.empty(),
            metrics={"correct": float(correct), **metrics},
            logs=self._logs(sampled),
        )

    def _logs(self, sampled: list[int]) -> dict[str, str]:
        if self.renderer is None:
            return {}
        gold, extracted = (
            str(self.renderer.tokenizer.decode(ids))
            for ids in (self.target, [token for token in sampled if token >= 0])
        )
        return {"gold": gold, "extracted": extracted}


@dataclass(frozen=True)
class StarGraphGroup(EnvGroupBuilder):
    ids_T: list[int]
    layout: Layout
    num_envs: int
    wrong_reward: float
    renderer: Renderer

    async def make_envs(self) -> list[StarGraphEnv]:
        return [StarGraphEnv(self.ids_T, self.layout, self.wrong_reward, self.renderer) for _ in range(self.num_envs)]


@chz.chz
class StarGraphBuilder(StarGraphTask, RLDatasetBuilder):
    """Graphs for RL: reward 1 for the whole path. Held out is one attempt at each held-out graph."""

    n_batches: int = chz.field(default=100, validator=COUNT, doc="batches of an epoch, where graphs are drawn")
    wrong_reward: float = chz.field(
        default=0.0, validator=NUMBER, doc="reward of a wrong path; -0.1 is that of Q#'s REINFORCE without baseline"
    )

    def recommended_max_tokens(self) -> int:
        return 2 * self.graph().path_length - 1  # with commas; whatever follows a path is not read

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        rows_D_T, test = self.split()
        layout = layout_of(renderer.tokenizer, test.graph)
        train = Batches(test.graph, test, rows_D_T, self.batch_size, self.n_batches, (self.seed, GRAPH_GROUPS))

        def groups(rows_B_T: np.ndarray, num_envs: int) -> list[StarGraphGroup]:
            ids_B_T = layout.encode(rows_B_T).tolist()
            return [StarGraphGroup(ids_T, layout, num_envs, self.wrong_reward, renderer) for ids_T in ids_B_T]

        held_out_rows = Batches(test.graph, test, test.tokens_B_T, self.batch_size, 1, (0,))
        return (
            DrawnDataset(lambda epoch, index: groups(train.rows(index, epoch), self.group_size), len(train)),
            DrawnDataset(lambda epoch, index: groups(held_out_rows.rows(index, epoch), 1), len(held_out_rows))
            if self.num_test
            else None,
        )
