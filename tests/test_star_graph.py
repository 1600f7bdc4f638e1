"""Star graphs: rows, lines and files of the originals, held-out graphs, tokenizers, the datasets
made of them.
"""

import asyncio
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs.star_graph import HeldOut, StarGraph, held_out, sample_graphs
from envs.star_graph_data import StarGraphBuilder, StarGraphExamplesBuilder, path_accuracy, supervised_datum
from envs.star_graph_files import (
    format_line,
    graph_of_path,
    read_lines,
    read_rows,
    write_sampled,
)
from envs.star_graph_tokens import layout_of, numeral_tokenizer
from posttrain.backend.errors import ConfigError, DataError, ModelError
from posttrain.renderers import get_renderer
from tests.star_graph_originals import bst_rows, gpt2_stand_in, numeral_layout, parse_line, write_lines

SMALL = StarGraph(2, 3, 12)
G_2_5, G_5_5, G_2_10 = StarGraph(2, 5, 50), StarGraph(5, 5, 50), StarGraph(2, 10, 50)
# Lines that BST's prepare.py writes for these sizes (star_graph.md E.1).
BST_LINES = {
    G_2_5: [
        "25,19|32,31|31,25|48,26|26,2|2,16|24,32|24,48/24,16=24,48,26,2,16",
        "31,28|16,7|4,16|36,4|8,36|8,31|30,41|28,30/8,7=8,36,4,16,7",
    ],
    StarGraph(2, 3, 10): ["9,0|6,9|2,4|6,2/6,0=6,9,0", "2,0|0,3|2,1|1,4/2,4=2,1,4"],
    G_5_5: [
        "24,6|24,44|32,31|29,17|24,30|24,32|31,25|26,2|45,29|8,18|30,22|2,16|48,26|44,8|37,13|6,45|25,19|22,37|18,35|24,48"
        "/24,16=24,48,26,2,16"
    ],
}


# --- rows and lines -----------------------------------------------------------------------------


@pytest.mark.parametrize("graph", BST_LINES, ids=lambda graph: graph.name)
def test_bst_files_are_reproduced_line_for_line(graph: StarGraph):
    lines = BST_LINES[graph]
    assert [format_line(row_T, graph) for row_T in bst_rows(graph, len(lines))] == lines
    assert [parse_line(line + "\n", graph).tolist() for line in lines] == bst_rows(graph, len(lines)).tolist()
    assert bst_rows(graph, 1, first=5).tolist() == bst_rows(graph, 6)[5:].tolist()


def test_numeral_ids_by_hand():
    graph = StarGraph(2, 3, 10)
    assert bst_rows(graph, 1)[0].tolist() == [9, 0, 10, 6, 9, 10, 2, 4, 10, 6, 2, 12, 6, 0, 11, 6, 9, 0]
    assert format_line(bst_rows(G_2_10, 1)[0], G_2_10).endswith("/24,30=24,48,26,2,16,32,31,25,19,30")
    assert (graph.dollar, graph.eos, graph.pad, graph.vocab_size) == (13, 14, 15, 16)


def test_samples_are_graphs_and_functions_of_their_seed():
    for graph in (SMALL, G_5_5, StarGraph(3, 2, 4)):
        rows_B_T = sample_graphs(graph, 5000, (1, 2))
        assert (
            rows_B_T.dtype == np.int64
            and rows_B_T.shape == (5000, graph.length)
            and graph.first_fault(rows_B_T) is None
        )
        assert (rows_B_T == sample_graphs(graph, 5000, (1, 2))).all() and (
            rows_B_T != sample_graphs(graph, 5000, (1, 3))
        ).any()


# Trap: a fast sampler of another distribution.
def test_samples_are_distributed_as_the_originals():
    """Each token's distribution, and where the first hop's edge lies, against the line-by-line
    generator: chi-square over 20,000 rows each.
    """
    graph = StarGraph(2, 3, 6)
    fast, slow = sample_graphs(graph, 20_000, 0), bst_rows(graph, 20_000)
    first_hop_at = [
        np.argmax(graph.edges(rows)[1] == rows[:, [graph.prefix_length + 1]], axis=1)[:, None] for rows in (fast, slow)
    ]
    order = [np.argsort(graph.edges(rows)[1], axis=1) @ [64, 16, 4, 1] for rows in (fast, slow)]
    for a_B, b_B in zip(
        np.concatenate([fast, first_hop_at[0], order[0][:, None]], axis=1).T,
        np.concatenate([slow, first_hop_at[1], order[1][:, None]], axis=1).T,
        strict=True,
    ):
        a, b = (np.bincount(column_B, minlength=256).astype(float) for column_B in (a_B, b_B))
        seen = a + b > 0
        chi_square, freedom = ((a - b)[seen] ** 2 / (a + b)[seen]).sum(), seen.sum() - 1
        assert chi_square <= freedom + 5 * np.sqrt(2 * max(freedom, 1))


# Trap: a held-out graph met in training with its edges in another order.
def test_held_out_graphs_are_never_drawn_in_any_order_of_their_edges():
    graph = StarGraph(2, 2, 4)  # 24 graphs with goal, 2 orders each
    test = held_out(graph, 12, 3)
    assert len({(*sorted([tuple(row[:2]), tuple(row[3:5])]), row[-1]) for row in test.tokens_B_T.tolist()}) == 12
    drawn = sample_graphs(graph, 2000, 0, exclude=test)
    other_order = np.concatenate(
        [test.tokens_B_T[:, 3:5], test.tokens_B_T[:, 2:3], test.tokens_B_T[:, :2], test.tokens_B_T[:, 5:]], 1
    )
    assert len(drawn) == 2000 and test.contains(other_order).all() and not test.contains(drawn).any()
    known = {tuple(row) for row in [*test.tokens_B_T.tolist(), *other_order.tolist()]}
    counts = Counter(map(tuple, drawn.tolist()))
    # the other 12, in both orders
    assert not known & counts.keys() and len(counts) == 24 and min(counts.values()) > 40
    with pytest.raises(ConfigError, match="at most half"):
        held_out(graph, 13, 0)


def test_sizes_that_cannot_be():
    with pytest.raises(ConfigError, match=r"G\(5,5\) has 21 nodes, more than the num_nodes=20"):
        StarGraph(5, 5, 20)
    with pytest.raises(ConfigError, match="at least one path"):
        StarGraph(0, 5, 20)


# --- files --------------------------------------------------------------------------------------


# Trap: a line that is no star graph trained on.
@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("9,0|6,9|2,4|6,2/6,0=6,2,4", "the path after '=' is not that from source to goal"),
        ("9,0|6,9|2,4|6,2/6,0=0,9,6", "the path after '=' is not that from source to goal"),
        ("9,0|6,9|2,4|6,2/6,9=6,9,0", "the goal is not the end of an arm"),
        ("9,0|6,9|2,4|9,2/6,0=6,9,0", "the source does not have 2 edges"),
        ("9,0|6,9|2,9|6,2/6,0=6,9,0", "two edges lead to the same node"),
        ("9,6|6,9|2,4|6,2/6,0=6,9,0", "an edge leads to the source"),
        ("9,0|6,9|9,4|6,2/6,0=6,9,0", "two edges leave a node"),
        ("1,2|2,1|6,9|6,3/6,9=6,6,9", "an arm does not have 3 nodes"),
        ("9,0|6,9|2,4|6,12/6,0=6,9,0", "not one of the 10 labels"),
        ("9,0|6,9|2,4|6,2/6,999999999999999999999=6,9,0", "not one of the 10 labels"),
        ("9,0|6,9|2,4|6,2/6,0=6,9", "a path of 2 nodes, where G(2,3) has 4 edges and 3 nodes"),
        ("9,0|6,9|2,4 6,2/6,0=6,9,0", "not of the form"),
        ("", "not of the form"),
    ],
)
def test_lines_that_are_no_star_graph_are_named(tmp_path, line: str, wrong: str):
    graph, path = StarGraph(2, 3, 10), tmp_path / "deg_2_path_3_nodes_10_train.txt"
    path.write_text("9,0|6,9|2,4|6,2/6,0=6,9,0\n" + line + "\n9,0|6,9|2,4|6,2/6,0=6,9,0\n")
    with pytest.raises(DataError) as error:
        read_lines(path, graph)
    assert str(error.value).startswith(f"{path}, line 2: ") and wrong in str(error.value)


def test_text_and_binary_files_give_the_rows_back(tmp_path):
    rows_B_T = sample_graphs(G_2_5, 300, 0)
    text, binary = tmp_path / "graph_2_5_sample_300.txt", tmp_path / "deg_2_path_5_nodes_50_train.npy"
    write_lines(text, rows_B_T, graph_of_path(text))
    assert (read_lines(text, G_2_5) == rows_B_T).all() and len(read_rows(text, G_2_5, 7)) == 7
    test = held_out(G_2_5, 10, 1)
    write_sampled(binary, graph_of_path(binary), 300, 5, test)
    stored = read_rows(binary, G_2_5)
    assert stored.dtype == np.uint8 and isinstance(stored, np.memmap)
    assert (stored == sample_graphs(G_2_5, 300, (5, 0), test)).all()
    with pytest.raises(DataError, match="rows of G.2,3. have 18 tokens"):
        read_rows(binary, SMALL)
    with pytest.raises(DataError, match="cannot be read"):
        read_lines(tmp_path / "missing.txt", SMALL)


def test_sizes_are_read_from_the_originals_names():
    assert graph_of_path("data/graph_5_5_sample_8000000.txt") == G_5_5
    assert graph_of_path("graph_2_3_sample_10.txt", 12) == SMALL
    assert graph_of_path("deg_2_path_5_nodes_50_200k_pretrain.txt") == G_2_5
    with pytest.raises(ConfigError, match="no size in the name"):
        graph_of_path("train.txt")
    with pytest.raises(ConfigError, match="over 50 nodes, but num_nodes=12"):
        graph_of_path("deg_2_path_5_nodes_50_20k_test.txt", 12)


# --- tokenizers ---------------------------------------------------------------------------------


# Trap: a tokenizer that joins or splits numbers.
@pytest.mark.parametrize(
    ("graph", "numeral", "gpt2"),
    [
        (StarGraph(2, 3, 50), (15, 3), (20, 5)),
        (G_2_5, (27, 5), (36, 9)),
        (G_2_10, (57, 10), (76, 19)),
        (G_5_5, (63, 5), (84, 9)),
        (StarGraph(3, 8, 50), (66, 8), (88, 15)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_lengths_and_the_token_of_the_decision(graph: StarGraph, numeral: tuple[int, int], gpt2: tuple[int, int]):
    """The table of star_graph.md A.2; the layouts against the tokenizers' own reading of the
    line.
    """
    row_T = sample_graphs(graph, 1, 0)[0]
    line = format_line(row_T, graph)
    for tokenizer, lengths, decision in ((numeral_tokenizer(graph), numeral, 1), (gpt2_stand_in(graph), gpt2, 2)):
        layout = layout_of(tokenizer, graph)
        assert (layout.prefix_length, layout.target_length) == lengths and layout.nodes_L[1] == decision
        ids_T = layout.encode(row_T[None])[0].tolist()
        assert ids_T == tokenizer.encode(line) and len(ids_T) == sum(lengths)
        first_hop = tokenizer.decode([ids_T[layout.prefix_length + decision]])
        assert first_hop == line.split("=")[1].split(",")[1]
    assert numeral_tokenizer(graph).encode(line) == row_T.tolist()


def test_tokenizers_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match="made for another number of nodes"):
        layout_of(numeral_tokenizer(SMALL), G_2_5)
    from posttrain.backend.tokenizers import character_tokenizer

    with pytest.raises(ModelError, match="'10' in 2 tokens"):
        layout_of(character_tokenizer(64), SMALL)


# --- datasets -----------------------------------------------------------------------------------


def test_targets_by_hand():
    graph = StarGraph(2, 3, 10)
    layout, ids_T = numeral_layout(graph), bst_rows(graph, 1)[0]
    prefix = [9, 0, 10, 6, 9, 10, 2, 4, 10, 6, 2, 12, 6, 0, 11]
    forward = supervised_datum(ids_T, layout)
    assert forward.model_input.to_ints() == [*prefix, 6, 9] and forward.loss_fn_inputs["target_tokens"].tolist() == [
        *prefix[1:],
        6,
        9,
        0,
    ]
    assert forward.loss_fn_inputs["weights"].tolist() == pytest.approx([0.0] * 14 + [1 / 3] * 3)
    backward = supervised_datum(layout.reversed(ids_T[None])[0], layout, "reversed")
    assert backward.model_input.to_ints() == [*prefix, 0, 9]
    teacherless = supervised_datum(ids_T, layout, "teacherless")
    assert teacherless.model_input.to_ints() == [*prefix, 13, 13]
    assert teacherless.loss_fn_inputs["target_tokens"].tolist()[-3:] == [6, 9, 0]


def test_batches_are_fresh_and_resume_by_their_index():
    renderer = get_renderer("plain", numeral_tokenizer(SMALL))
    train, test = StarGraphExamplesBuilder(num_test=30, batch_size=16, n_batches=3)(renderer)
    assert test is not None
    rows = []
    for epoch in (0, 1):
        train.set_epoch(epoch)
        rows += [tuple(datum.model_input.to_ints()) for index in (2, 0, 1) for datum in train.get_batch(index)]
    assert len(set(rows)) == len(rows) == 96 and len(test.get_batch(0)) == 30
    train.set_epoch(0)
    assert [tuple(datum.model_input.to_ints()) for datum in train.get_batch(2)] == rows[:16]
    assert not set(rows) & {tuple(datum.model_input.to_ints()) for datum in test.get_batch(0)}


def test_a_file_of_an_original_trains_without_conversion(tmp_path, capsys):
    """Two lines of BST's file, then twice the first once more: a copy of a held-out line is not
    trained on.
    """
    path = tmp_path / "graph_2_5_sample_8000000.txt"
    lines = BST_LINES[G_2_5]
    path.write_text("\n".join([lines[0], lines[1], lines[0]]) + "\n")
    task: dict[str, Any] = {"num_paths": 2, "path_length": 5, "num_nodes": 50}
    renderer = get_renderer("plain", numeral_tokenizer(G_2_5))
    builder = StarGraphExamplesBuilder(path=str(path), num_test=1, batch_size=8, **task)
    train, _ = builder(renderer)
    assert [datum.model_input.to_ints() for datum in train.get_batch(0)] == [parse_line(lines[1], G_2_5).tolist()[:-1]]
    assert "1 graphs to train on; 2 left out" in capsys.readouterr().out
    # the name tells the size
    as_it_is, _ = StarGraphExamplesBuilder(path=str(path), num_test=1, batch_size=8)(renderer)
    assert as_it_is.get_batch(0) == train.get_batch(0)
    with pytest.raises(ConfigError, match=r"holds G\(2,5\) over 50 nodes, not G\(3,5\)"):
        StarGraphExamplesBuilder(path=str(path), num_paths=3)(renderer)
    with pytest.raises(DataError, match="all 3 graphs are held out"):
        StarGraphExamplesBuilder(path=str(path), num_test=3, **task)(renderer)


def test_the_environment_rewards_whole_paths_only():
    renderer = get_renderer("plain", numeral_tokenizer(SMALL))
    builder = StarGraphBuilder(num_test=5, batch_size=4, group_size=3, n_batches=2, wrong_reward=-0.1)
    train, test = asyncio.run(builder(renderer))
    assert (
        test is not None and len(train.get_batch(0)) == 4 and sum(len(test.get_batch(i)) for i in range(len(test))) == 5
    )
    ids_T = train.get_batch(0)[0].ids_T  # type: ignore[attr-defined]

    async def play(answer: list[int]):
        env = (await train.get_batch(0)[0].make_envs())[0]
        prompt, stop = await env.initial_observation()
        assert prompt.to_ints() == ids_T[: SMALL.prefix_length] and stop == []
        return await env.step(answer)

    gold = ids_T[SMALL.prefix_length :]
    right, wrong, short = (asyncio.run(play(answer)) for answer in (gold, [gold[0], gold[2], gold[2]], gold[:1]))
    assert (right.reward, wrong.reward, short.reward) == (1.0, -0.1, -0.1)
    assert wrong.metrics == {"correct": 0.0, "first_hop": 0.0, "node_1": 1.0, "node_2": 0.0, "node_3": 1.0}
    assert right.logs["gold"] == right.logs["extracted"] == " ".join(map(str, gold))


def test_accuracy_by_hand():
    found = path_accuracy(
        np.array([[1, 2, 3], [1, 9, 3], [4, 5, 6], [4, 5, 7]]), np.array([[1, 2, 3], [1, 2, 3], [4, 5, 6], [4, 5, 6]])
    )
    assert found == {"first_hop": 0.75, "exact": 0.5, "node_1": 1.0, "node_2": 0.75, "node_3": 0.75}


def test_held_out_from_a_file_is_a_held_out_set():
    rows_B_T = bst_rows(SMALL, 4)
    assert HeldOut(SMALL, rows_B_T[:2]).contains(rows_B_T).tolist() == [True, True, False, False]


def test_memory_mapped_rows_are_not_copied(tmp_path: Path):
    graph = StarGraph(2, 3, 12)
    path = tmp_path / "deg_2_path_3_nodes_12_train.npy"
    write_sampled(path, graph, 200_000, 0)
    task = StarGraphExamplesBuilder(path=str(path), num_test=50)
    tracemalloc.start()
    rows, test = task.split()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows is not None and isinstance(rows.rows_D_T, np.memmap) and rows.rows_D_T.dtype == np.uint8
    assert kept < path.stat().st_size  # the indices of the rows that are trained on
    assert len(rows) < 200_000 and not test.contains(rows[:1000]).any()
    assert (rows[np.array([5, 7])] == rows.rows_D_T[rows.kept_K[[5, 7]]]).all()


def test_text_is_held_in_one_byte_a_token_and_blank_lines_at_its_end_are_no_graphs(tmp_path: Path):
    rows_B_T = sample_graphs(SMALL, 5, 0)
    path = tmp_path / "graph_2_3_sample_5.txt"
    write_lines(path, rows_B_T, SMALL)
    text = path.read_text()
    path.write_bytes(b"\xef\xbb\xbf" + (text + "\n  \n").replace("\n", "\r\n").encode())
    read = read_lines(path, SMALL)
    assert read.dtype == np.uint8 and (read == rows_B_T).all()
    path.write_text(text + "\n" + text)
    with pytest.raises(DataError, match="line 6: not of the form"):
        read_lines(path, SMALL)
