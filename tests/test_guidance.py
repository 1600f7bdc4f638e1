"""Value guidance: its formulas against enumeration, cached decoding against none, the classifier's
training, and the whole on star graphs.
"""

import asyncio
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import chz
import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, softplus

from envs.star_graph import StarGraph, held_out, sample_graphs
from envs.star_graph_data import Batches, StarGraphTask
from envs.star_graph_tokens import Layout, layout_of
from posttrain.backend.errors import CheckpointError, ConfigError, ContextLengthError, ModelError
from posttrain.backend.models import load_model
from posttrain.tracking.metrics_log import read_metrics
from recipes.belief_state.star_graph import task_name
from recipes.libraries.belief_state.files import write_model
from recipes.libraries.belief_state.model import BeliefState, BeliefStateConfig
from recipes.libraries.value_guidance.guidance import Guidance, candidates, cd, cd_code, guided_logits, q_sharp
from recipes.libraries.value_guidance.guided_sampler import Reader, guided_sample, language_model
from recipes.star_graph import guided
from recipes.star_graph.classifier import (
    BeliefStateTrunk,
    Classifier,
    collect_pairs,
    load_classifier,
    new_trunk,
    value_loss,
)
from recipes.star_graph.guided_accuracy import decode
from recipes.star_graph.model import make_model
from recipes.star_graph.oracle import LOGIT, oracle, true_paths
from tests.architectures import save_random_model
from tests.conftest import rounded
from tests.star_graph_originals import gpt2_stand_in, numeral_layout

GRAPH = StarGraph(2, 3, 12)
CPU = torch.device("cpu")


def random_classifier(policy: Reader, kind: str, num_outputs: int = 1) -> Classifier:
    torch.manual_seed(1)
    if kind == "belief_state":
        trunk = BeliefStateTrunk(BeliefState(BeliefStateConfig(GRAPH.vocab_size, GRAPH.eos, 2, 2, 16)))
    else:
        trunk = new_trunk(policy.trunk, copy_weights=False, seed=1)  # type: ignore[arg-type]
    model = Classifier(trunk, num_outputs, "bilinear" if num_outputs == 1 else "linear")
    torch.nn.init.normal_(model.head.out.weight, std=2.0)
    return model


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    path = asyncio.run(
        make_model(GRAPH, tmp_path_factory.mktemp("policy") / "model", num_layers=2, num_heads=2, hidden=32)
    )
    model = load_model(str(path), 0, CPU, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # an untrained policy is all but uniform
    return language_model(model)


# --- formulas -----------------------------------------------------------------------------------


# Trap: kl_coef upside down.
def test_offsets_by_hand() -> None:
    values = torch.tensor([[[0.0], [math.log(3)]]], dtype=torch.float64)  # P(right) 1/2 and 3/4
    expected = {
        "q_sharp": [math.log((math.exp(2) + 1) / 2), math.log((3 * math.exp(2) + 1) / 4)],
        "cd": [1.0, 1.5],
        "cd_code": [math.log(0.5), math.log(0.75)],
    }
    for method, offsets in expected.items():
        guidance = Guidance(method=method, kl_coef=0.5)  # type: ignore[arg-type]
        torch.testing.assert_close(
            guidance.offsets(values), torch.tensor([offsets], dtype=torch.float64), rtol=1e-12, atol=0
        )
    z = torch.linspace(-30, 30, 41, dtype=torch.float64)[:, None]
    torch.testing.assert_close(q_sharp(z, 0.1), (softplus(z + 10) - softplus(z))[:, 0], rtol=1e-9, atol=1e-12)
    pmf = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)  # of the returns 0, 1/2, 1
    assert q_sharp(pmf.log(), 0.25).item() == pytest.approx(
        math.log(0.2 + 0.5 * math.exp(2) + 0.3 * math.exp(4)), rel=1e-12
    )
    assert cd(pmf.log(), 0.25).item() == pytest.approx(0.55 * 4, rel=1e-12)
    assert cd_code(pmf.log()).item() == pytest.approx(math.log(0.55), rel=1e-12)


@pytest.mark.parametrize("num_returns", [2, 5])
def test_q_sharp_is_the_optimum_of_the_regularised_problem(num_returns: int) -> None:
    """All sequences of 3 tokens of 3: pi*(y) ~ pi_ref(y) exp(R(y) / kl_coef), and token by token
    the same. CD is below it.
    """
    rng, length, kl_coef = np.random.default_rng(num_returns), 3, 0.3
    sequences = list(itertools.product(range(3), repeat=length))
    reference = {s: rng.dirichlet(np.ones(3)) for n in range(length) for s in itertools.product(range(3), repeat=n)}
    returns = {y: int(rng.integers(num_returns)) for y in sequences}  # the number of the atom
    prob_ref = {y: math.prod(reference[y[:t]][y[t]] for t in range(length)) for y in sequences}

    def pmf(prefix: tuple[int, ...]) -> np.ndarray:
        weights_A = np.zeros(num_returns)
        for y in sequences:
            if y[: len(prefix)] == prefix:
                weights_A[returns[y]] += prob_ref[y]
        return weights_A / weights_A.sum()

    def objective(method: str) -> tuple[float, dict[tuple[int, ...], float]]:
        guidance = Guidance(method=method, kl_coef=kl_coef, top_k=None)  # type: ignore[arg-type]
        prob = dict.fromkeys(sequences, 1.0)
        for state, reference_V in reference.items():
            values_1_V_A = torch.from_numpy(np.log(np.stack([pmf((*state, a)) for a in range(3)]) + 1e-300))[None]
            logits_1_V = torch.from_numpy(np.log(reference_V))[None]
            ids_1_V = candidates(logits_1_V, guidance.top_k)
            offsets = guidance.offsets(values_1_V_A).gather(1, ids_1_V)
            guided_V = guided_logits(logits_1_V, ids_1_V, offsets, "dropped").softmax(-1)[0].tolist()
            for y in sequences:
                if y[: len(state)] == state:
                    prob[y] *= guided_V[y[len(state)]]
        gain = sum(p * returns[y] / (num_returns - 1) for y, p in prob.items())
        return gain - kl_coef * sum(p * math.log(p / prob_ref[y]) for y, p in prob.items()), prob

    weight = {y: prob_ref[y] * math.exp(returns[y] / (num_returns - 1) / kl_coef) for y in sequences}
    value, prob = objective("q_sharp")
    assert prob == pytest.approx({y: w / sum(weight.values()) for y, w in weight.items()}, rel=1e-10)
    assert value == pytest.approx(kl_coef * math.log(sum(weight.values())), rel=1e-10)
    assert objective("cd")[0] < value


# Trap: p e^(1/kl_coef) over- or underflowing.
def test_nothing_underflows_or_cancels() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        z = torch.tensor([-2000.0, -80.0, 80.0, 1024.0], dtype=dtype)[:, None]
        torch.testing.assert_close(q_sharp(z, 0.01), torch.tensor([0.0, 20.0, 100.0, 100.0]), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(cd_code(z), torch.tensor([-2000.0, -80.0, 0.0, 0.0]))
    # p itself is 5e-42
    assert q_sharp(torch.tensor([-95.0]), 0.01).item() == pytest.approx(math.log1p(math.exp(5)), abs=1e-4)


def test_the_other_tokens_are_dropped_or_kept() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    ids = candidates(logits, 2)
    assert (
        ids.tolist() == [[0, 2]] and candidates(logits, None).shape == (1, 4) and candidates(logits, 9).shape == (1, 4)
    )
    offsets = torch.tensor([[5.0, 7.0]])
    assert guided_logits(logits, ids, offsets, "dropped").tolist() == [[8.0, -math.inf, 9.0, -math.inf]]
    assert guided_logits(logits, ids, offsets, "kept").tolist() == [[3.0, 1.0, 4.0, 0.0]]


@pytest.mark.parametrize("wrong", [{"kl_coef": 0.0}, {"kl_coef": math.inf}, {"top_k": 0}, {"temperature": 0.0}])
def test_impossible_guidance_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Guidance(**wrong)  # type: ignore[arg-type]


# --- decoding -----------------------------------------------------------------------------------


@torch.no_grad()
def sample_without_caches(
    policy: Reader, model: Classifier, guidance: Guidance, prompts_B_P: torch.Tensor, uniforms_B_T: torch.Tensor | None
) -> tuple[list[list[int]], list[list[float]]]:
    """One prompt at a time, everything read anew, one pass of the classifier for each candidate."""
    tokens_B, logprobs_B = [], []
    for b, prompt in enumerate(prompts_B_P.tolist()):
        tokens, logprobs = [], []
        for t in range(3):
            text = torch.tensor([prompt + tokens])
            logits_V = policy.head(policy.trunk.read(text)[0])[0, -1] / guidance.temperature
            ids = logits_V.topk(guidance.top_k or len(logits_V)).indices.tolist()
            states = [model.trunk.read(torch.tensor([prompt + tokens + [a]]))[0] for a in ids]
            values = [model.head(state[:, -2:-1], state[:, -1:]) for state in states]
            offsets = torch.cat([guidance.offsets(value)[0] for value in values])
            kept = {a: (logits_V[a] + o).item() for a, o in zip(ids, offsets, strict=True)}
            if guidance.others == "kept":
                kept = dict(enumerate(logits_V.tolist())) | {a: kept[a] - offsets.min().item() for a in ids}
            probs = torch.zeros(len(logits_V), dtype=torch.float64)
            probs[list(kept)] = torch.tensor(list(kept.values()), dtype=torch.float64).softmax(-1)
            if uniforms_B_T is None:
                tokens.append(int(probs.argmax()))
            else:
                tokens.append(int((probs.cumsum(0) <= uniforms_B_T[b, t]).sum()))
            logprobs.append(math.log(probs[tokens[-1]]))
        tokens_B.append(tokens)
        logprobs_B.append(logprobs)
    return tokens_B, logprobs_B


# Trap: a classifier's cache that keeps another candidate's tokens.
@pytest.mark.parametrize("kind", ["language_model", "belief_state"])
def test_cached_decoding_equals_reading_everything_anew(policy: Reader, kind: str) -> None:
    prompts_B_P = torch.from_numpy(sample_graphs(GRAPH, 5, 0))[:, : GRAPH.prefix_length]
    for seed, (num_outputs, top_k, others) in enumerate([(1, 4, "dropped"), (1, 3, "kept"), (5, None, "dropped")]):
        model = random_classifier(policy, kind, num_outputs)
        guidance = Guidance(kl_coef=0.3, top_k=top_k, others=others, temperature=0.7)  # type: ignore[arg-type]
        for uniforms in (None, torch.rand((5, 3), generator=torch.Generator().manual_seed(seed))):
            found = guided_sample(policy, prompts_B_P, 3, guidance, model.reader(), uniforms)
            tokens, logprobs = sample_without_caches(policy, model, guidance, prompts_B_P, uniforms)
            assert found.tokens_B_T.tolist() == tokens
            torch.testing.assert_close(
                found.logprobs_B_T, torch.tensor(logprobs), rtol=rounded(1e-4), atol=rounded(1e-5)
            )
            assert found.kl_B_T.mean() > 0.01  # the classifier had something to say


def test_a_row_depends_on_its_own_numbers_and_ends_at_eos(policy: Reader) -> None:
    prompts_B_P = torch.from_numpy(sample_graphs(GRAPH, 8, 3))[:, : GRAPH.prefix_length]
    uniforms = torch.rand((8, 3), generator=torch.Generator().manual_seed(0))
    model, guidance = random_classifier(policy, "language_model"), Guidance(kl_coef=0.5)
    together = guided_sample(policy, prompts_B_P, 3, guidance, model.reader(), uniforms)
    alone = [
        guided_sample(policy, prompts_B_P[b, None], 3, guidance, model.reader(), uniforms[b, None]) for b in range(8)
    ]
    assert together.tokens_B_T.tolist() == [one.tokens_B_T[0].tolist() for one in alone]
    eos = int(together.tokens_B_T[0, 1])
    ended = guided_sample(policy, prompts_B_P[:1], 3, guidance, model.reader(), uniforms[:1], eos_id=eos)
    first = together.tokens_B_T[0].tolist().index(eos)
    assert ended.tokens_B_T[0].tolist() == together.tokens_B_T[0, : first + 1].tolist()


# Trap: guidance by a classifier of another vocabulary, or a BST of another graph.
def test_models_that_do_not_fit_together(policy: Reader, tmp_path: Path) -> None:
    prompts_B_P = torch.from_numpy(sample_graphs(GRAPH, 1, 3))[:, : GRAPH.prefix_length]
    other = asyncio.run(make_model(StarGraph(2, 3, 20), tmp_path / "other", num_layers=1, num_heads=2, hidden=16))
    classifier = Classifier(new_trunk(language_model(load_model(str(other), 0, CPU, torch.float32)).trunk, True, 0))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="another vocabulary"):
        guided_sample(policy, prompts_B_P, 3, Guidance(), classifier.reader())
    with pytest.raises(ContextLengthError, match="20 tokens"):
        guided_sample(policy, prompts_B_P, 5, Guidance())
    with pytest.raises(CheckpointError, match="not a classifier"):
        load_classifier(other, CPU)
    # of the policy's vocabulary, but of longer paths
    bst = belief_state_folder(tmp_path / "bst", StarGraph(2, 3, 6))
    with pytest.raises(CheckpointError, match=re.escape("G(2,3) N=6")):
        asyncio.run(guided.main(options(tmp_path, trunk=bst, log_path=str(tmp_path / "run"))))
    assert not (tmp_path / "run").exists()


class ShortcutPolicy:
    """The cheat itself, as a table: the source, then any of its neighbours, each with probability
    1/d, then the successor.
    """

    max_length = None

    def __init__(self, graph: StarGraph):
        self.graph, self.hidden_size, self.vocab_size = graph, graph.vocab_size, graph.vocab_size

    def read(self, tokens_B_T: torch.Tensor, cache: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        ids_B_T = tokens_B_T if cache is None else torch.cat([cache, tokens_B_T], dim=1)
        logits_B_1_V = torch.full((len(ids_B_T), 1, self.vocab_size), -40.0)
        for row, logits_V in zip(ids_B_T.tolist(), logits_B_1_V[:, 0], strict=True):
            edges = [(row[3 * e], row[3 * e + 1]) for e in range(self.graph.num_edges)]
            written = row[self.graph.prefix_length :]
            nodes = (
                [child for parent, child in edges if parent == written[-1]]
                if written
                else [row[self.graph.prefix_length - 3]]
            )
            logits_V[nodes] = 0.0
        return logits_B_1_V, ids_B_T

    def select(self, cache: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return cache[rows]


def test_a_perfect_classifier_lifts_the_shortcut_from_half_to_one() -> None:
    test, layout = held_out(GRAPH, 200, 0), numeral_layout(GRAPH)
    ids_B_T = torch.from_numpy(test.tokens_B_T)
    cheat, perfect = Reader(ShortcutPolicy(GRAPH), lambda states: states), oracle(layout, GRAPH.vocab_size)
    alone = decode(cheat, None, Guidance(), ids_B_T, layout, seed=0)
    assert 0.4 < alone["exact"] < 0.6 and alone["exact"] == alone["first_hop"] and alone["kl"] == 0
    p = 1 / (1 + math.exp(-LOGIT))
    odds = {
        "q_sharp": (p * math.exp(10) + 1 - p) / ((1 - p) * math.exp(10) + p),
        "cd": math.exp((2 * p - 1) / 0.1),
        "cd_code": p / (1 - p),
    }
    prefix = GRAPH.prefix_length
    for method, odds_of_right in odds.items():
        guidance = Guidance(method=method, top_k=3)  # type: ignore[arg-type]
        assert decode(cheat, perfect, guidance, ids_B_T, layout)["exact"] == 1.0
        assert decode(cheat, perfect, guidance, ids_B_T, layout, seed=0)["exact"] == 1.0
        sample = guided_sample(cheat, ids_B_T[:, :prefix], 3, guidance, perfect)
        assert sample.logprobs_B_T[:, 1].tolist() == pytest.approx(
            [-math.log1p(1 / odds_of_right)] * 200, abs=rounded(1e-6)
        )
        assert sample.kl_B_T[:, 1].tolist() == pytest.approx([math.log(2)] * 200, abs=1e-3)


@pytest.mark.parametrize(
    "layout", [numeral_layout(GRAPH), layout_of(gpt2_stand_in(GRAPH), GRAPH)], ids=["numeral", "gpt2"]
)
def test_the_oracle_reads_the_path_off_the_edges(layout: Layout) -> None:
    ids_B_T = layout.encode(sample_graphs(GRAPH, 50, 1))
    assert np.array_equal(true_paths(ids_B_T[:, : layout.prefix_length], layout), ids_B_T[:, layout.prefix_length :])


# --- the classifier -----------------------------------------------------------------------------


def test_losses_equal_torchs() -> None:
    z, returns_B = torch.randn(6, 4, 1, dtype=torch.float64), torch.tensor([1.0, 0, 0, 1, 1, 0])
    bce = binary_cross_entropy_with_logits(z[..., 0], returns_B.double()[:, None].expand(6, 4), reduction="none")
    torch.testing.assert_close(value_loss(z, returns_B), bce)
    values, returns_B = torch.randn(6, 4, 11, dtype=torch.float64), torch.tensor([0.0, 0.1, 0.26, 0.5, 0.94, 1.0])
    labels = torch.tensor([0, 1, 3, 5, 9, 10])[:, None].expand(6, 4)
    torch.testing.assert_close(
        value_loss(values, returns_B), cross_entropy(values.transpose(1, 2), labels, reduction="none")
    )


@pytest.mark.parametrize("kind", ["language_model", "belief_state"])
def test_paths_behind_one_prompt_are_read_as_if_each_had_its_own(policy: Reader, kind: str) -> None:
    ids_B_T = torch.from_numpy(sample_graphs(GRAPH, 4, 2))
    prefixes_B_P, right_B_L = ids_B_T[:, : GRAPH.prefix_length], ids_B_T[:, GRAPH.prefix_length :]
    paths_2B_L = torch.cat([right_B_L, right_B_L.roll(1, 0)])
    model = random_classifier(policy, kind).double()
    values_2B_L_1, before_2B_L_H = model(prefixes_B_P, paths_2B_L)
    rows_2B_T = torch.cat([prefixes_B_P.repeat(2, 1), paths_2B_L], dim=1)
    states_2B_T_H = (
        model.trunk.model.forward_states(rows_2B_T, packed=False)
        if isinstance(model.trunk, BeliefStateTrunk)
        else model.trunk.model.base_model(rows_2B_T).last_hidden_state
    )
    anew_2B_L_1 = model.head(states_2B_T_H[:, GRAPH.prefix_length - 1 : -1], states_2B_T_H[:, GRAPH.prefix_length :])
    torch.testing.assert_close(values_2B_L_1, anew_2B_L_1, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(before_2B_L_H, states_2B_T_H[:, GRAPH.prefix_length - 1 : -1], rtol=1e-9, atol=1e-9)
    base: Any = model.trunk.model
    embedding = base.embedding if isinstance(model.trunk, BeliefStateTrunk) else base.get_input_embeddings()
    shared, separate = (
        torch.autograd.grad(v.square().sum(), embedding.weight)[0] for v in (values_2B_L_1, anew_2B_L_1)
    )
    torch.testing.assert_close(shared, separate, rtol=rounded(1e-7), atol=rounded(1e-7))


def test_pairs_are_the_truth_and_the_first_failure() -> None:
    layout, rows_B_T = numeral_layout(GRAPH), sample_graphs(GRAPH, 64, 5)
    cheat = Reader(ShortcutPolicy(GRAPH), lambda states: states)
    prefixes_B_P, paths_2B_L = collect_pairs(cheat, layout, rows_B_T, (0,), CPU, max_tries=2)
    right_B_L, wrong_B_L = paths_2B_L.chunk(2)
    assert 36 <= len(prefixes_B_P) < 64  # a quarter is never failed on
    whole_B_T = torch.cat([prefixes_B_P, right_B_L], dim=1).numpy()
    assert GRAPH.first_fault(whole_B_T) is None and {tuple(r) for r in whole_B_T} <= {tuple(r) for r in rows_B_T}
    assert bool((wrong_B_L[:, 0] == right_B_L[:, 0]).all()) and bool((wrong_B_L[:, 1:] != right_B_L[:, 1:]).all())


def options(tmp_path: Path, **changes: object) -> guided.Config:
    defaults = {
        "num_steps": 4,
        "batch_size": 16,
        "warmup_steps": 0,
        "eval_every": 2,
        "save_every": 100,
        "learning_rate": 3e-3,
        "behavior_if_log_dir_exists": "resume",
        "task": StarGraphTask(path_length=2, num_nodes=6, num_test=20),
        "kl_coefs": [0.1],
        "guidance": Guidance(top_k=None),
    }
    graph = StarGraph(2, 2, 6)
    policy_path = asyncio.run(make_model(graph, tmp_path / "policy", num_layers=2, num_heads=2, hidden=32))
    return guided.Config(policy_path=str(policy_path), **{**defaults, **changes})  # type: ignore[arg-type]


class CarelessPolicy(ShortcutPolicy):
    """On paths of two nodes: the source, then the goal or a bar, each half of the time."""

    def read(self, tokens_B_T: torch.Tensor, cache: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        logits_B_1_V, ids_B_T = super().read(tokens_B_T, cache)
        if ids_B_T.shape[1] > self.graph.prefix_length:
            goal_B = ids_B_T[:, self.graph.prefix_length - 2]
            logits_B_1_V.fill_(-40.0)[:, :, self.graph.bar] = 0.0
            logits_B_1_V.scatter_(2, goal_B[:, None, None], 0.0)
        return logits_B_1_V, ids_B_T


# Trap: a limit of 0, which is none, as a limit: the gradient times 0.
def test_a_classifier_without_clipping_learns_as_one_whose_limit_is_never_met(tmp_path: Path) -> None:
    graph, config = StarGraph(2, 2, 6), options(tmp_path)
    layout, test = numeral_layout(graph), held_out(graph, 60, 0)
    careless, biases = Reader(CarelessPolicy(graph), lambda states: states), []
    for limit in (0.0, 1e6):
        trunk = new_trunk(language_model(load_model(config.policy_path, 0, CPU, torch.float32)).trunk, True, 0)  # type: ignore[arg-type]
        settings, model = chz.replace(config, grad_clip_norm=limit), Classifier(trunk)
        guided.Trainer(settings, layout, careless, model, Batches(graph, test, None, 16, 100, (0,))).step(0)
        biases.append(model.head.out.bias.tolist())
    assert biases[0] == biases[1] and Classifier(trunk).head.out.bias.tolist() != biases[0]


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_a_trained_classifier_guides(tmp_path: Path, num_outputs: int) -> None:
    graph = StarGraph(2, 2, 6)
    config, layout, test = options(tmp_path), numeral_layout(graph), held_out(graph, 60, 0)
    trunk = new_trunk(language_model(load_model(config.policy_path, 0, CPU, torch.float32)).trunk, True, 0)  # type: ignore[arg-type]
    careless, model = Reader(CarelessPolicy(graph), lambda states: states), Classifier(trunk, num_outputs)
    trainer = guided.Trainer(config, layout, careless, model, Batches(graph, test, None, 16, 100, (0,)))
    ids_B_T = torch.from_numpy(test.tokens_B_T)
    for method in ("q_sharp", "cd", "cd_code"):
        assert decode(careless, model.reader(), Guidance(method=method), ids_B_T, layout, seed=0)["exact"] < 0.7  # type: ignore[arg-type]
    losses = [trainer.step(step)["classifier/nll"] for step in range(60)]
    assert losses[0] == pytest.approx(math.log(num_outputs if num_outputs > 1 else 2), abs=0.3)
    for method in ("q_sharp", "cd", "cd_code"):
        assert decode(careless, model.reader(), Guidance(method=method), ids_B_T, layout, seed=0)["exact"] > 0.9  # type: ignore[arg-type]


def belief_state_folder(path: Path, graph: StarGraph) -> str:
    path.mkdir()
    write_model(BeliefState(BeliefStateConfig(graph.vocab_size, graph.eos, 2, 2, 16, task=task_name(graph))), path)
    return str(path)


@pytest.mark.parametrize("trunk", ["scratch", "belief_state"])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path: Path, trunk: str) -> None:
    start = belief_state_folder(tmp_path / "bst", StarGraph(2, 2, 6)) if trunk == "belief_state" else trunk
    config = options(tmp_path, trunk=start, num_outputs=3)
    asyncio.run(guided.main(chz.replace(config, log_path=str(tmp_path / "whole"))))
    for num_steps in (2, 4):
        asyncio.run(guided.main(chz.replace(config, log_path=str(tmp_path / "parts"), num_steps=num_steps)))
    whole, parts = (
        load_classifier(tmp_path / name / "classifier/checkpoints/final", CPU) for name in ("whole", "parts")
    )
    for (name, mine), theirs in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    for name in ("qsharp", "cd"):
        lines = read_metrics(tmp_path / "parts" / name)
        assert [line["step"] for line in lines] == [0, 2, 4] and {
            "test/first_hop",
            "test/exact",
            "test/node_2",
        } <= lines[-1].keys()
    rows = json.loads((tmp_path / "whole" / "guidance.json").read_text())
    assert [row["exact_greedy"] for row in rows if row["classifier"] == "oracle"] == [1.0, 1.0, 1.0]
    other = chz.replace(config, log_path=str(tmp_path / "parts"), num_outputs=1)
    with pytest.raises(ConfigError, match=r"num_outputs=3 \(now 1\)"):
        asyncio.run(guided.main(other))
    with pytest.raises(CheckpointError, match="num_outputs"):
        asyncio.run(guided.main(chz.replace(other, behavior_if_log_dir_exists="resume_changed")))


def test_policies_of_other_families_are_sampled_right_or_refused(tmp_path: Path) -> None:
    """Granite scales its logits; caches of windows and of convolutions cannot be copied for the
    candidates.
    """
    model = load_model(str(save_random_model("Granite", tmp_path / "granite")), 0, CPU, torch.float32)
    policy, tokens_B_T = language_model(model), torch.arange(20)[None] + 4
    with torch.no_grad():
        logits_V = policy.head(policy.trunk.read(tokens_B_T)[0][:, -1])[0]
        assert torch.allclose(logits_V, model(input_ids=tokens_B_T).logits[0, -1], atol=rounded(1e-5))
    for family in ("Gemma 3", "LFM 2", "Qwen 3.5"):
        other = load_model(str(save_random_model(family, tmp_path / family)), 0, CPU, torch.float32)
        with pytest.raises(ModelError, match="attention over all tokens"):
            language_model(other)
