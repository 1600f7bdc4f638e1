"""One forward pass for several losses: trees of sequences in a row, and a score's forward pass that
training goes backward from.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.backend.attention import dense_mask
from posttrain.backend.batching import MicroBatch, micro_batches
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import DataError, NonFiniteError
from posttrain.backend.loss_terms import LossTerm
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.trainer import Trainer
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, Datum, ModelInput
from posttrain.renderers.plain import PlainRenderer
from rl.data_processing import rows_of, with_advantages
from rl.likelihood_reward import LikelihoodReward, LikelihoodRewardBuilder
from rl.types import TrajectoryGroup
from tests.conftest import ROUNDING, random_tokens, rounded
from tests.test_latro import CHARACTERS, EOS, rationale_group

CPU = torch.device("cpu")


def groups(rng: np.random.Generator, temperature: float = 1.0) -> list[TrajectoryGroup]:
    """Ragged questions, with two equal rationales, an empty one, and one that begins as another."""
    out, renderer = [], PlainRenderer(CHARACTERS)
    for _ in range(4):
        long = random_tokens(rng, int(rng.integers(4, 12)))
        actions_G = [[*long, EOS], [*long, EOS], [EOS], [*long[:3], *random_tokens(rng, 2), EOS]]
        prompt, answer = random_tokens(rng, int(rng.integers(1, 9))), random_tokens(rng, 3)
        out.append(rationale_group(prompt, answer, renderer, actions_G, temperature))
    return out


def terms(groups_P: Sequence[TrajectoryGroup], rng: np.random.Generator) -> list[LossTerm]:
    """What a step of LaTRO trains on, once the groups have been scored."""
    rows = with_advantages(rows_of(groups_P), [rng.normal(size=len(group.trajectories_G)) for group in groups_P])
    answers_D, kept_D = zip(*(answer for row in rows for answer in row.supervised), strict=True)
    return [
        LossTerm([row.datum() for row in rows], "reinforce", kept_D=[row.kept for row in rows]),
        LossTerm(answers_D, "cross_entropy", kept_D=kept_D),
    ]


def kept(client: TrainingClient, terms: Sequence[LossTerm]) -> list[LossTerm]:
    """The terms after a forward pass that was kept, if it was."""
    outputs = client.forward_terms(terms, keep=True).result()
    return [replace(term, kept_D=output.kept_D) for term, output in zip(terms, outputs, strict=True)]


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in trainer.named_trainable.items() if p.grad is not None}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To rounding, relative to the largest entry; `expected` must not be trivial."""
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 0.1 and found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) < ROUNDING * largest, name


def forwards(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[MicroBatch]:
    """The micro-batches that go through the model from here on."""
    seen, run = [], trainer._logprobs
    monkeypatch.setattr(trainer, "_logprobs", lambda batch: (seen.append(batch), run(batch))[1])
    return seen


# Trap: a shared pass with another gradient than separate ones.
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_score_and_training_share_one_forward(
    torch_service: ServiceClient, monkeypatch: pytest.MonkeyPatch, temperature: float
):
    """The gradient is that of a pass for each loss, which know nothing of each other."""
    groups_P = groups(np.random.default_rng(0), temperature)
    client = torch_service.create_training_client("tiny")
    trainer: Any = client._trainer
    seen = forwards(trainer, monkeypatch)
    asyncio.run(LikelihoodReward(client, LikelihoodRewardBuilder(likelihood_coef=0.5))(groups_P))
    both = terms(groups_P, np.random.default_rng(1))
    together = client.forward_backward_terms(both).result()
    assert len(seen) == 1
    shared = gradients(trainer)
    trainer.zero_grad()
    separate = [client.forward_backward(term.data_D, term.loss_fn).result() for term in both]
    assert len(seen) == 3
    assert_close(shared, gradients(trainer))
    for ours, theirs in zip(together, separate, strict=True):
        assert ours.metrics == pytest.approx(theirs.metrics, rel=rounded(1e-5))
        for a, b in zip(ours.loss_fn_outputs, theirs.loss_fn_outputs, strict=True):
            assert np.allclose(a["logprobs"].array, b["logprobs"].array, atol=rounded(5e-6))


# Trap: a kept forward used under other weights (fused AdamW does not raise torch's version
# counter).
def test_a_kept_forward_serves_part_of_its_data_once_and_under_its_own_weights(
    torch_service: ServiceClient, monkeypatch: pytest.MonkeyPatch
):
    groups_P = groups(np.random.default_rng(2))
    client = torch_service.create_training_client("tiny")
    trainer: Any = client._trainer
    asyncio.run(LikelihoodReward(client, LikelihoodRewardBuilder(), trains=False)(groups(np.random.default_rng(2))))
    assert trainer.kept is None  # an evaluation, after which no activations are held
    asyncio.run(LikelihoodReward(client, LikelihoodRewardBuilder())(groups_P))
    policy, answers = terms(groups_P, np.random.default_rng(3))
    assert policy.kept_D and answers.kept_D
    part = LossTerm(policy.data_D[3:9], "reinforce", kept_D=policy.kept_D[3:9])
    seen = forwards(trainer, monkeypatch)

    def trained(*given: LossTerm) -> tuple[int, dict[str, torch.Tensor]]:
        """Forward passes it took, and the gradient."""
        before = len(seen)
        client.forward_backward_terms(given).result()
        found = gradients(trainer)
        trainer.zero_grad()
        return len(seen) - before, found

    (first, shared), (second, plain) = trained(part), trained(part)
    assert first == 0 and second > 0
    assert_close(shared, plain)
    policy, answers = kept(client, [policy, answers])
    other = LossTerm(
        [Datum(ModelInput.from_ints([5, 6]), {"target_tokens": [6, 7], "weights": [1.0, 1.0]})], "cross_entropy"
    )
    assert trained(policy, other)[0] > 0  # something that was not in it
    policy, answers = kept(client, [policy, answers])
    assert trained(policy)[0] == 0
    policy, answers = kept(client, [policy, answers])
    client.optim_step(AdamParams(1e-3)).result()
    assert trained(policy)[0] > 0  # other weights
    monkeypatch.setattr(trainer, "config", BackendConfig(micro_batch_tokens=16))
    policy, answers = kept(client, [policy, answers])
    # more activations than one micro-batch's
    assert policy.kept_D is None and trained(policy)[0] > 0


# Trap: sequences of one row that see each other.
def test_rows_are_trees_in_which_each_token_sees_its_ancestors(monkeypatch: pytest.MonkeyPatch):
    """Sequences that part at several depths, one that is the beginning of another, equal ones: the
    logprobs of each on its own.
    """
    tokens_D = [
        [7, 8, 9, 5, 5],
        [7, 8, 9, 5, 6, 4],
        [7, 8, 9, 5, 6, 4, 11, 12],
        [7, 8, 30, 31],
        [7, 8, 9, 5, 5],
        [7, 8],
        [9, 9],
    ]
    data_D = []
    for d, tokens in enumerate(tokens_D):
        weights = np.arange(1, len(tokens) + 1, dtype=np.float32)
        weights[: min(d, len(tokens) - 1)] = 0  # loss begins at different places
        inputs: dict[str, Any] = {"target_tokens": [*tokens[1:], 20 + d], "weights": weights}
        inputs["temperature"] = np.full(len(tokens), 0.5 if d % 2 else 1.0, np.float32)
        data_D.append(Datum(ModelInput.from_ints(tokens), inputs))
    shared, alone = Trainer("tiny", BackendConfig()), Trainer("tiny", BackendConfig())
    (batch,) = micro_batches(data_D, range(7), 1000, CPU, share=True)
    assert batch.tokens_BT.tolist() == [[7, 8, 9, 5, 5, 6, 4, 11, 12, 30, 31], [9, 9] + [0] * 9]
    assert batch.ends_BT is not None and batch.positions_BT is not None
    mask_B1TT = dense_mask(batch.ends_BT, batch.positions_BT, None, torch.float32)
    seen_by_31 = [
        token
        for token, sees in zip(batch.tokens_BT[0].tolist(), mask_B1TT[0, 0, 10].tolist(), strict=True)
        if sees == 0
    ]
    assert seen_by_31 == [7, 8, 30, 31]
    outputs = shared.run(data_D, "cross_entropy").loss_fn_outputs
    expected = [alone.run([datum], "cross_entropy").loss_fn_outputs[0] for datum in data_D]
    for ours, theirs in zip(outputs, expected, strict=True):
        assert np.allclose(ours["logprobs"].array, theirs["logprobs"].array, atol=rounded(5e-6))
    assert_close(gradients(shared), gradients(alone))
    monkeypatch.setattr(
        "posttrain.backend.batching.SHARED_ROW_TOKENS", 8
    )  # rows that are full: their continuation begins with the prompt again
    shared.zero_grad()
    shared.run(data_D, "cross_entropy")
    assert_close(gradients(shared), gradients(alone))


def test_terms_that_do_not_go_together_are_refused_and_bad_data_numbered_through():
    trainer = Trainer("tiny", BackendConfig())
    one = Datum(ModelInput.from_ints([5]), {"target_tokens": [6], "weights": [1.0]})
    two = Datum(ModelInput.from_ints([5]), {"target_tokens": [[6, 7]], "weights": [[1.0, 1.0]]})
    with pytest.raises(DataError, match="different numbers of targets"):
        trainer.run_terms([LossTerm([one], "cross_entropy"), LossTerm([two], "cross_entropy")])

    def broken(p_N: torch.Tensor, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        return p_N / 0, {}

    with pytest.raises(NonFiniteError) as error:
        trainer.run_terms([LossTerm([one, one], "cross_entropy"), LossTerm([one], broken)])
    assert error.value.datum_indices == [2] and not gradients(trainer)
