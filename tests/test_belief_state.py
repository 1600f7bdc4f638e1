"""The Belief State Transformer: sizes, what each state may see, the pair lists, and the two-stage
backward against the naive joint one.
"""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from envs.star_graph import StarGraph, sample_graphs
from posttrain.backend.errors import ConfigError, DataError
from recipes.libraries.belief_state.blocks import SwiGLU
from recipes.libraries.belief_state.losses import empty_side_losses, pair_pass
from recipes.libraries.belief_state.model import BeliefState, BeliefStateConfig, NextToken, documents
from recipes.libraries.belief_state.pairs import PairObjective, find_pairs
from recipes.libraries.belief_state.trainer import BeliefStateTrainer, PassConfig, TokenBatch
from tests.conftest import rounded

EOS = 9
TINY = BeliefStateConfig(vocab_size=10, eos_id=EOS, num_layers=2, num_heads=2, hidden=16)
# two documents and the beginning of a third; one document from EOS to EOS; no EOS at all
PACKED = torch.tensor(
    [[EOS, 1, 2, 3, EOS, 4, 5, EOS, 6, 7], [EOS, 1, 2, 3, 4, 5, 6, 7, 8, EOS], [1, 2, 3, 4, 5, 6, 7, 8, 1, 2]]
)


def model(seed: int = 0) -> BeliefState:
    """In fp64, with weights large enough that every gradient is."""
    made = BeliefState(TINY, seed).double()
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(5 if p.ndim > 1 else 1)
    return made


def star_rows(num_rows: int = 4) -> tuple[StarGraph, torch.Tensor]:
    graph = StarGraph(2, 3, 12)
    rows_B_T = sample_graphs(graph, num_rows, 0)
    return graph, torch.from_numpy(np.concatenate([rows_B_T, np.full((num_rows, 1), graph.eos)], axis=1))


@pytest.mark.parametrize(("vocab", "layers", "total"), [(56, 6, 103_916_544), (1000, 8, 133_684_224)])
def test_the_papers_models_have_its_numbers_of_parameters(vocab: int, layers: int, total: int) -> None:
    with torch.device("meta"):
        made = BeliefState(BeliefStateConfig(vocab, 1, layers, 8, 768), seed=None)
    assert sum(p.numel() for p in made.parameters()) == total
    assert sum(p.numel() for p in made.text_head.parameters()) == {56: 18_918_912, 1000: 19_643_904}[vocab]


def test_documents_of_packed_rows_begin_at_their_eos() -> None:
    document_B_T, position_B_T = documents(PACKED, EOS)
    assert document_B_T[0].tolist() == [1, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert position_B_T[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2]
    assert position_B_T[2].tolist() == list(range(1, 11))
    _, from_the_right_B_T = documents(PACKED.flip(1), EOS)
    assert from_the_right_B_T.flip(1)[0].tolist() == [0, 3, 2, 1, 0, 2, 1, 0, 2, 1]


# Trap: states that see the other side, or another document.
@pytest.mark.parametrize("packed", [True, False])
def test_no_state_sees_the_other_side(packed: bool) -> None:
    rows_B_T, m = PACKED[2:], model()
    f, b = m.forward_states(rows_B_T, packed), m.backward_states(rows_B_T, packed)
    for place in range(10):
        later, earlier = rows_B_T.clone(), rows_B_T.clone()
        later[:, place + 1 :] = 8 - later[:, place + 1 :]
        earlier[:, :place] = 8 - earlier[:, :place]
        assert torch.equal(m.forward_states(later, packed)[:, : place + 1], f[:, : place + 1])
        assert torch.equal(m.backward_states(earlier, packed)[:, place:], b[:, place:])
        if 0 < place < 9:
            assert not torch.allclose(m.forward_states(earlier, packed)[:, place], f[:, place])
            assert not torch.allclose(m.backward_states(later, packed)[:, place], b[:, place])


def test_documents_of_a_packed_row_are_as_if_alone() -> None:
    m = model()
    f, b = m.forward_states(PACKED)[0], m.backward_states(PACKED)[0]
    alone = torch.tensor([[EOS, 4, 5, EOS]])
    assert torch.allclose(f[4:7], m.forward_states(alone, packed=False)[0, :3], atol=1e-12)
    assert torch.allclose(b[5:8], m.backward_states(alone, packed=False)[0, 1:], atol=1e-12)
    for eos in (0, 4, 7):  # an EOS is the empty prefix and the empty suffix wherever it stands
        assert torch.allclose(f[eos], m.empty_prefix(), atol=1e-12) and torch.allclose(
            b[eos], m.empty_suffix(), atol=1e-12
        )


def normed(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain


def swiglu(x: torch.Tensor, mlp: SwiGLU) -> torch.Tensor:
    gate, up = (x @ mlp.gate_up.weight.T).chunk(2, -1)
    return (gate / (1 + (-gate).exp()) * up) @ mlp.down.weight.T


def naive_states(m: BeliefState, tokens: list[int]) -> torch.Tensor:
    """(T, H) of a document without an EOS, whose first position is 1: a head and a query at a time; pairs of
    dimensions are complex numbers, turned by their position."""
    x, size = m.embedding.weight[tokens], TINY.hidden // TINY.num_heads
    angle = torch.arange(1, len(tokens) + 1)[:, None] * 1e4 ** (-torch.arange(0, size, 2) / size)
    turn = torch.polar(torch.ones_like(angle), angle)
    block: Any
    for block in m.forward_encoder.blocks:
        parts = (normed(x, block.attention_norm.weight) @ block.attention.qkv.weight.T).split(size, -1)
        heads = []
        for q, k, v in zip(parts[:2], parts[2:4], parts[4:], strict=True):
            q, k = (torch.complex(*z.chunk(2, -1)) * turn for z in (q, k))
            scores = (q[:, None] * k[None].conj()).sum(-1).real / size**0.5
            heads.append(torch.stack([scores[t, : t + 1].softmax(-1) @ v[: t + 1] for t in range(len(tokens))]))
        x = x + torch.cat(heads, -1) @ block.attention.out.weight.T
        x = x + swiglu(normed(x, block.mlp_norm.weight), block.mlp)
    return normed(x, m.forward_encoder.norm.weight)


def test_states_and_logits_are_those_of_a_second_implementation() -> None:
    m = model()
    with torch.no_grad():
        for name, p in m.named_parameters():
            if "norm" in name:
                p.copy_(torch.rand_like(p) + 0.5)
        expected, f = naive_states(m, PACKED[2].tolist()), m.forward_states(PACKED[2:])[0]
        assert torch.allclose(f, expected, atol=1e-5)
        b = m.backward_states(PACKED[2:])[0]
        both = torch.cat([f, b], -1)
        u = normed(both + swiglu(both, m.text_head.mlp), m.text_head.norm.weight)
        for logits, half in zip(m.text_head(f, b), u.chunk(2, -1), strict=True):
            assert torch.allclose(logits, half @ m.text_head.unembedding.weight.T, atol=1e-10)


def naive_pairs(tokens: list[int], objective: PairObjective) -> list[tuple[int, int, int, int]]:
    """(i, j, next target, previous target) by the definition."""
    found = []
    for i, j in itertools.combinations(range(len(tokens)), 2):
        gap_fits = objective.min_gap <= j - i and (objective.max_gap is None or j - i <= objective.max_gap)
        if i >= objective.context_length and gap_fits and EOS not in tokens[i + 1 : j]:
            nothing = j - i == 1 and objective.single_gap == "eos"
            found.append((i, j, EOS, EOS) if nothing else (i, j, tokens[i + 1], tokens[j - 1]))
    return found


OBJECTIVES = [
    PairObjective(),
    PairObjective(min_gap=2),
    PairObjective(min_gap=2, max_gap=4, context_length=3),
    PairObjective(single_gap="next_token", max_gap=1),
]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_pairs_are_those_of_the_definition(objective: PairObjective) -> None:
    pairs = find_pairs(PACKED, EOS, objective, packed=True)
    columns = (pairs.row_N, pairs.i_N, pairs.j_N, pairs.next_target_N, pairs.prev_target_N)
    found = list(zip(*(column.tolist() for column in columns), strict=True))
    naive = [(row, *pair) for row, tokens in enumerate(PACKED.tolist()) for pair in naive_pairs(tokens, objective)]
    assert found == naive and pairs.num_valid == len(naive)
    weights = torch.zeros(3, dtype=torch.float64).index_add(0, pairs.row_N, pairs.weight_N)
    assert torch.allclose(weights, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(("d", "length", "count"), [(2, 3, 6), (5, 5, 15), (2, 10, 55)])
def test_star_graphs_have_l_times_l_plus_1_over_2_pairs(d: int, length: int, count: int) -> None:
    graph = StarGraph(d, length, 50)
    tokens = torch.from_numpy(sample_graphs(graph, 1, 0))
    row = torch.cat([tokens, torch.tensor([[graph.eos]])], dim=1)
    assert (
        len(find_pairs(row, graph.eos, PairObjective(context_length=graph.prefix_length - 1, min_gap=2), packed=False))
        == count
    )
    m = length + 2  # "=", the path, EOS
    assert (
        len(find_pairs(row, graph.eos, PairObjective(context_length=graph.prefix_length - 1), packed=False))
        == m * (m - 1) // 2
    )


def naive_loss(m: BeliefState, tokens_B_T: torch.Tensor, objective: PairObjective) -> torch.Tensor:
    """One graph of all pairs, every state from its own document alone: mean over rows of the mean
    over pairs.
    """
    rows = []
    for tokens in tokens_B_T.tolist():
        eos = [k for k, token in enumerate(tokens) if token == EOS]
        start_T = [max((k for k in eos if k <= i), default=0) for i in range(len(tokens))]
        end_T = [min((k for k in eos if k >= j), default=len(tokens) - 1) for j in range(len(tokens))]
        f_T = [
            m.forward_states(torch.tensor([tokens[start : i + 1]]), packed=False)[0, -1]
            for i, start in enumerate(start_T)
        ]
        b_T = [
            m.backward_states(torch.tensor([tokens[j : end + 1]]), packed=False)[0, 0] for j, end in enumerate(end_T)
        ]
        i_P, j_P, next_P, prev_P = zip(*naive_pairs(tokens, objective), strict=True)
        next_logits, prev_logits = m.text_head(torch.stack([f_T[i] for i in i_P]), torch.stack([b_T[j] for j in j_P]))
        next_loss, prev_loss = (
            cross_entropy(logits, torch.tensor(targets))
            for logits, targets in ((next_logits, next_P), (prev_logits, prev_P))
        )
        rows.append(0.5 * (next_loss + prev_loss))
    return torch.stack(rows).mean()


# Trap: a two-stage backward that is not the joint gradient; a loss that depends on chunks or
# passes.
@pytest.mark.parametrize(
    ("objective", "pairs_per_chunk"), [(OBJECTIVES[0], 7), (OBJECTIVES[1], 1000), (OBJECTIVES[2], 1000)]
)
def test_the_two_stage_backward_is_the_joint_one(objective: PairObjective, pairs_per_chunk: int) -> None:
    m, naive = model(), model()
    sums = pair_pass(m, PACKED, objective, len(PACKED), packed=True, pairs_per_chunk=pairs_per_chunk)
    loss = naive_loss(naive, PACKED, objective)
    loss.backward()
    assert float(sums["loss"]) == pytest.approx(loss.item(), abs=1e-10)
    for (name, p), q in zip(m.named_parameters(), naive.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert torch.allclose(p.grad, q.grad, atol=1e-10, rtol=0) and q.grad.abs().max() > 1e-6, name


def test_a_chunk_weighs_as_much_as_its_pairs() -> None:
    """Spec E.3: pair losses 1, 2, 3, 4, 9 in chunks of 2 are 3.8 on average, not 4.67."""
    graph, rows_B_T = star_rows()
    m = BeliefState(BeliefStateConfig(graph.vocab_size, graph.eos, 1, 2, 16))
    objective = PairObjective(context_length=graph.prefix_length - 1, min_gap=2)
    losses = [float(pair_pass(m, rows_B_T, objective, 4, False, chunk)["loss"]) for chunk in (1, 2, 5, 1000)]
    assert losses == pytest.approx([losses[0]] * 4, rel=rounded(1e-6))
    assert losses[0] == pytest.approx(math.log(graph.vocab_size), rel=0.02)


def gradients(trainer: BeliefStateTrainer) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", [BeliefState, NextToken])
def test_gradients_do_not_depend_on_how_a_batch_is_cut(kind: Any) -> None:
    mask = np.random.default_rng(0).random(PACKED.shape) < 0.6
    batch = TokenBatch(PACKED.numpy(), loss_mask_B_T=mask if kind is NextToken else None)
    objective = PairObjective(subsample=0.5)
    whole = BeliefStateTrainer(kind(TINY), objective)
    cut = BeliefStateTrainer(kind(TINY), objective, PassConfig(rows_per_pass=1, pairs_per_chunk=5))
    head_rows = []
    if isinstance(cut.model, BeliefState):  # memory: the head never holds more than a chunk
        cut.model.text_head.mlp.down.register_forward_pre_hook(lambda _, inputs: head_rows.append(len(inputs[0])))
    one, other = whole.forward_backward(batch, (1,)), cut.forward_backward(batch, (1,))
    assert one == pytest.approx(other, rel=rounded(1e-5)) and max(head_rows, default=0) <= 5
    for name, gradient in gradients(whole).items():
        assert torch.allclose(gradient, gradients(cut)[name], atol=rounded(1e-6)), name


# Trap: subsampled pairs that favour the EOS, 0/0.
def test_subsampling_keeps_eos_pairs_and_is_unbiased() -> None:
    rows_B_T = PACKED[:1]
    full = find_pairs(rows_B_T, EOS, PairObjective(), packed=True)
    some = PairObjective(subsample=0.25)
    total, draws = torch.zeros(10, 10, dtype=torch.float64), 1500
    for seed in range(draws):
        pairs = find_pairs(rows_B_T, EOS, some, packed=True, seeds_B=[seed])
        total[pairs.i_N, pairs.j_N] += pairs.weight_N / draws
    expected = torch.zeros(10, 10, dtype=torch.float64)
    expected[full.i_N, full.j_N] = full.weight_N
    eos_i, eos_j = (torch.tensor([0, 0, 4, 5]), torch.tensor([1, 4, 7, 7]))
    assert torch.allclose(total[eos_i, eos_j], expected[eos_i, eos_j], atol=1e-12)
    standard_error = expected * math.sqrt((1 / 0.25 - 1) / draws)
    assert ((total - expected).abs() <= 4.5 * standard_error + 1e-12).all()
    # every pair touches an EOS: the original divides 0 by 0 here
    only_eos = torch.tensor([[EOS, 1, EOS]])
    assert len(find_pairs(only_eos, EOS, some, packed=True, seeds_B=[0])) == 3


@pytest.mark.parametrize("objective", [PairObjective(), PairObjective(min_gap=2), PairObjective(context_length=2)])
def test_with_the_empty_suffix_it_is_a_next_token_model(objective: PairObjective) -> None:
    """An EOS is no target with a min_gap above 1; with a context nothing is read from the right."""
    m, c = model(), objective.context_length
    losses = empty_side_losses(m, PACKED, objective, packed=True, pairs_per_chunk=4)
    f, b = m.forward_states(PACKED), m.backward_states(PACKED)
    per_next = [
        cross_entropy(m.text_head(f[row, i], m.empty_suffix())[0], PACKED[row, i + 1])
        for row in range(3)
        for i in range(c, 9)
        if objective.min_gap == 1 or PACKED[row, i + 1] != EOS
    ]
    per_prev = [
        cross_entropy(m.text_head(m.empty_prefix(), b[row, j])[1], PACKED[row, j - 1])
        for row in range(3)
        for j in range(1, 10)
        if objective.min_gap == 1 or PACKED[row, j - 1] != EOS
    ]
    expected = {"loss_next_token": torch.stack(per_next).mean().item()}
    expected |= {} if c else {"loss_prev_token": torch.stack(per_prev).mean().item()}
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, abs=1e-10)


def test_bad_input_is_a_typed_error() -> None:
    trainer = BeliefStateTrainer(BeliefState(TINY), PairObjective(context_length=8, min_gap=2))
    with pytest.raises(DataError, match="no pair with i >= 8"):
        trainer.forward_backward(TokenBatch(PACKED.numpy()))
    with pytest.raises(DataError, match=r"row 1, position 2: token 10 is not one of the model's 10"):
        trainer.forward_backward(TokenBatch(np.array([[1, 2, 3], [1, 2, 10]])))
    short = TokenBatch(
        np.array([[1, EOS, 2, EOS], [1, 2, 3, 4]])
    )  # of the first row, no document has two tokens between its ends
    far = BeliefStateTrainer(BeliefState(TINY), PairObjective(min_gap=3))
    assert far.forward_backward(short)["num_pairs"] == 1
    with pytest.raises(DataError, match="none of the 1 rows has a pair"):
        far.forward_backward(TokenBatch(short.tokens_B_T[:1]))
    with pytest.raises(ConfigError, match="no pair fits"):
        PairObjective(min_gap=3, max_gap=2)
    with pytest.raises(ConfigError, match="rotary"):
        BeliefStateConfig(10, 9, hidden=18, num_heads=2)
