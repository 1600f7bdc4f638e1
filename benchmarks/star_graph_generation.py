"""Star graphs a second on one core: `sample_graphs` against a straightforward generator that makes
one line at a time.

    python benchmarks/star_graph_generation.py

The peer draws as the originals do (random.seed(k), shuffle the labels, walk the arms, shuffle the
edges) and writes the line of text; ours makes rows of token ids, which training reads. Both alone
in one process, in turn, in CPU seconds: what else the machine does counts little. "with held-out"
leaves out 400 test graphs; "to .npy" also writes the rows to disk.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

if not __package__:  # run as a file: the packages are one folder up
    import os

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from benchmarks.report import alternate, over, spread, wait_until_quiet, write_report
from envs.star_graph import StarGraph, held_out, sample_graphs
from envs.star_graph_files import write_sampled

SIZES = (StarGraph(2, 5, 50), StarGraph(5, 5, 50), StarGraph(2, 10, 50), StarGraph(2, 3, 12))
LINES, ROWS = 20_000, 400_000


def straightforward_line(graph: StarGraph, k: int) -> str:
    random.seed(k)
    nodes = list(range(graph.num_nodes))
    random.shuffle(nodes)
    source = nodes.pop()
    edges, path = [], [source]
    for arm in range(graph.num_paths):
        node = source
        for _ in range(graph.path_length - 1):
            following = nodes.pop()
            edges.append((node, following))
            node = following
            if arm == 0:
                path.append(node)
    random.shuffle(edges)
    return "|".join(f"{a},{b}" for a, b in edges) + f"/{source},{path[-1]}=" + ",".join(map(str, path)) + "\n"


def rate(make: Callable[[], object], count: int) -> float:
    start = time.process_time()
    make()
    return count / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="the median counts")
    rounds = parser.parse_args().rounds
    load = wait_until_quiet()
    figures, ratios = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for graph in SIZES:
            test, file = held_out(graph, 400, 0), Path(folder) / "rows.npy"
            sides: dict[str, Callable[[], float]] = {
                "line by line": partial(
                    rate, lambda graph=graph: [straightforward_line(graph, k) for k in range(LINES)], LINES
                ),
                "ours": partial(rate, partial(sample_graphs, graph, ROWS, 0), ROWS),
                "ours with held-out": partial(rate, partial(sample_graphs, graph, ROWS, 0, test), ROWS),
                "ours to .npy": partial(rate, partial(write_sampled, file, graph, ROWS, 0, test), ROWS),
            }
            for run in sides.values():
                run()  # warm-up
            runs = alternate(sides, rounds)
            for side, rates in runs.items():
                name = f"{graph.name} N={graph.num_nodes}, {side}"
                figures[f"{name}: rows/s"], figures[f"{name}: spread"] = median(rates), spread(rates)
                if side != "line by line":
                    ratios[name] = over(rates, runs["line by line"])
    write_report(
        "star_graph_generation", figures, {"rounds": rounds, "lines": LINES, "rows": ROWS, "threads": 1}, load, ratios
    )


if __name__ == "__main__":
    main()
