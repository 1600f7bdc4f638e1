"""One training step of the Belief State Transformer against the structure of the original's, in the
same run.

    python benchmarks/belief_state_step.py [--rounds 3]

The peer (belief_state.md B.3, written anew): both encoders read whole rows under an explicit mask;
then, a sequence at a time, the pair list is made, its states are gathered, the head is run and its
loss backpropagated into detached copies; one encoder backward. Ours makes one pair list for the
batch, runs the head in chunks of any rows, and reads only what some pair uses. Same weights, same
batch, fp32; the gradients are compared before anything is timed. A step is the passes and AdamW, on
one thread, in CPU seconds: what else the machine does counts for little. The peer's head is ours,
pair by pair.
"""

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass

if not __package__:  # run as a file: the packages are one folder up
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from benchmarks.report import alternate, over, spread, wait_until_quiet, write_report
from envs.star_graph import StarGraph, sample_graphs
from recipes.libraries.belief_state.losses import pair_pass
from recipes.libraries.belief_state.model import BeliefState, BeliefStateConfig
from recipes.libraries.belief_state.pairs import PairObjective, find_pairs


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    layers: int
    rows: int
    graph: StarGraph | None = None  # None: text, 64 tokens of 1,000


SHAPES = [
    Shape("G(2,3), the recipe's model", 96, 2, 64, StarGraph(2, 3, 12)),
    Shape("G(5,5), width 128", 128, 3, 64, StarGraph(5, 5, 50)),
    Shape("text of 64 tokens, width 384", 384, 2, 1),
]


def batch(shape: Shape) -> tuple[torch.Tensor, BeliefStateConfig, PairObjective, bool]:
    if shape.graph is None:
        tokens = np.random.default_rng(0).integers(2, 1000, (shape.rows, 64))
        tokens[:, ::32] = 1  # two documents a row
        return (
            torch.from_numpy(tokens),
            BeliefStateConfig(1000, 1, shape.layers, 4, shape.hidden),
            PairObjective(),
            True,
        )
    graph = shape.graph
    rows = np.concatenate([sample_graphs(graph, shape.rows, 0), np.full((shape.rows, 1), graph.eos)], axis=1)
    objective = PairObjective(context_length=graph.prefix_length - 1, min_gap=2)
    config = BeliefStateConfig(graph.vocab_size, graph.eos, shape.layers, 4, shape.hidden)
    return torch.from_numpy(rows), config, objective, False


def per_sequence_pass(model: BeliefState, tokens_B_T: torch.Tensor, objective: PairObjective) -> None:
    B = len(tokens_B_T)
    f_B_T_H, b_B_T_H = model.forward_states(tokens_B_T, packed=True), model.backward_states(tokens_B_T, packed=True)
    f_leaf, b_leaf = f_B_T_H.detach().requires_grad_(), b_B_T_H.detach().requires_grad_()
    for row in range(B):
        pairs = find_pairs(tokens_B_T[row : row + 1], model.config.eos_id, objective, packed=True)
        next_logits, prev_logits = model.text_head(f_leaf[row, pairs.i_N], b_leaf[row, pairs.j_N])
        loss = cross_entropy(next_logits, pairs.next_target_N) + cross_entropy(prev_logits, pairs.prev_target_N)
        (0.5 * loss / B).backward()
    torch.autograd.backward([f_B_T_H, b_B_T_H], [f_leaf.grad, b_leaf.grad])  # type: ignore[list-item]


def measure(shape: Shape, rounds: int) -> tuple[dict[str, float | str], list[float]]:
    tokens_B_T, config, objective, packed = batch(shape)
    model = BeliefState(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    passes = {
        "ours": lambda: pair_pass(model, tokens_B_T, objective, shape.rows, packed, 32768),
        "per sequence": lambda: per_sequence_pass(model, tokens_B_T, objective),
    }
    gradients = []
    for one_pass in passes.values():
        one_pass()
        gradients.append([p.grad for p in model.parameters()])
        optimizer.zero_grad()
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True) if a is not None and b is not None
    )

    def timed(name: str) -> float:
        start = time.process_time()
        passes[name]()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - start

    seconds = alternate({name: lambda name=name: timed(name) for name in passes}, rounds + 1)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    figures: dict[str, float | str] = {f"{shape.name}: {name}, CPU s/step": median for name, median in medians.items()}
    figures |= {f"{shape.name}: {name}, spread": spread(times[1:]) for name, times in seconds.items()}
    return figures, over(seconds["per sequence"][1:], seconds["ours"][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    load = wait_until_quiet()
    figures: dict[str, float | str] = {}
    ratios: dict[str, list[float]] = {}
    for shape in SHAPES:
        found, ratio = measure(shape, rounds)
        figures |= found
        ratios[f"{shape.name}: per sequence / ours"] = ratio
    write_report("belief_state_step", figures, {"rounds": rounds, "threads": 1}, load, ratios)


if __name__ == "__main__":
    main()
