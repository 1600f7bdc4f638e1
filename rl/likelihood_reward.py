"""The self-reward of LaTRO (arXiv 2411.04282): log p(answer | prompt, rationale), in nats, summed
over the answer's tokens. The score's forward pass keeps the rationales, and training goes backward
from it if all fits one micro-batch. Left out: dividing by the answer's length.

  grad = E[ A grad log p(rationale) + likelihood_coef grad log p(answer | rationale) ], both summed over a group
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import chz
import numpy as np

from posttrain.backend.errors import ConfigError
from posttrain.backend.loss_terms import LossTerm
from posttrain.backend.ranges import LARGEST, NON_NEGATIVE, Range
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import Datum, ForwardBackwardOutput, KeptRow, ModelInput
from posttrain.renderers.types import Renderer
from rl.data_processing import rows_of
from rl.types import Action, BatchReward, BatchRewardBuilder, EnvGroupBuilder, Metrics, TrajectoryGroup


@runtime_checkable
class HasAnswer(Protocol):
    """The interface of the group's builder."""

    @property
    def answer_tokens(self) -> list[int]:
        """Tokens of the gold answer, to follow the rationale."""
        ...

    def rationale(self, action: Action) -> tuple[list[int], bool]:
        """The rationale among the sampled tokens, and whether it stopped by itself."""
        ...


def answer_datum(context: Sequence[int], answer: Sequence[int], weight: float = 1.0) -> Datum:
    """`weight` on each answer token, 0 before. Position t predicts token t + 1."""
    tokens_T = np.array([*context, *answer], dtype=np.int64)
    weights_T = np.zeros(len(tokens_T) - 1, dtype=np.float32)
    weights_T[len(context) - 1 :] = weight
    return Datum(ModelInput.from_ints(tokens_T[:-1].tolist()), {"target_tokens": tokens_T[1:], "weights": weights_T})


async def answer_logprobs(client: TrainingClient, data_D: Sequence[Datum]) -> np.ndarray:
    """(D,) summed logprobs of the weighted tokens, under the client's current weights."""
    return _sums(data_D, await client.forward(data_D, "cross_entropy", all_logprobs=False))


def _sums(data_D: Sequence[Datum], output: ForwardBackwardOutput) -> np.ndarray:
    pairs = zip(output.loss_fn_outputs, (datum.loss_fn_inputs["weights"].array != 0 for datum in data_D), strict=True)
    return np.array([np.where(carries_T, out["logprobs"].array, 0).sum(dtype=np.float64) for out, carries_T in pairs])


class LikelihoodReward(BatchReward):
    """Adds log p(answer | prompt, rationale) to each member's reward, and the answer's
    cross-entropy to the loss."""

    def __init__(self, client: TrainingClient, config: "LikelihoodRewardBuilder", trains: bool = True):
        """`trains`: a backward pass follows. Otherwise no activations are kept for it."""
        self._client, self._config, self._trains = client, config, trains

    async def __call__(self, groups_P: Sequence[TrajectoryGroup]) -> Metrics:
        members = [
            (group, g)
            for group in groups_P
            for g, member in enumerate(group.trajectories_G)
            if member.num_sampled_tokens
        ]
        if not members:
            return {}
        parts = [_parts(group, g) for group, g in members]
        weight = self._config.likelihood_coef or 1.0  # any weight but 0 gives the score
        answers_D = [answer_datum(context, answer, weight) for context, answer, _ in parts]
        scores_D, kept_D = await self._scores(groups_P, answers_D)
        rewards_D = self._penalized(scores_D, np.array([finished for *_, finished in parts]))
        for (group, g), answer, kept, reward in zip(members, answers_D, kept_D, rewards_D, strict=True):
            group.final_rewards_G[g] += float(reward)
            if self._config.likelihood_coef:
                group.trajectories_G[g].supervised.append(answer)
                group.trajectories_G[g].kept_supervised += [kept] if kept else []
        tokens = sum(len(answer) for _, answer, _ in parts)
        return {
            "likelihood/answer_logprob": float(scores_D.mean()),
            "likelihood/answer_logprob_per_token": float(scores_D.sum() / tokens),
            "likelihood/finished": float(np.mean([finished for *_, finished in parts])),
        }

    async def _scores(
        self, groups_P: Sequence[TrajectoryGroup], answers_D: Sequence[Datum]
    ) -> tuple[np.ndarray, Sequence[KeptRow | None]]:
        """(D,) log p of the answers, and their rows in this forward pass, which training continues.
        Each trajectory keeps its rows."""
        rows = rows_of(groups_P)
        terms = [LossTerm(answers_D, "cross_entropy"), LossTerm([row.datum() for row in rows], "reinforce")]
        answers, rollouts = await self._client.forward_terms(terms, keep=self._trains)
        for row, kept in zip(rows, rollouts.kept_D or (), strict=False):
            p, g = row.origin
            groups_P[p].trajectories_G[g].kept.append(kept)
        return _sums(answers_D, answers), answers.kept_D or [None] * len(answers_D)

    def _penalized(self, scores_D: np.ndarray, finished_D: np.ndarray) -> np.ndarray:
        """A truncated rationale gets a multiple of the mean score, which is negative. As in the
        original, the mean is over all rationales of the call, and the answer is still trained on.
        """
        if not self._config.non_stop_penalty:
            return scores_D
        return np.where(finished_D, scores_D, self._config.penalty_reward_value * scores_D.mean())


def _parts(group: TrajectoryGroup, g: int) -> tuple[list[int], list[int], bool]:
    """Prompt with rationale, answer, and whether the rationale stopped by itself."""
    builder = _with_answer(group.builder)
    turn = group.trajectories_G[g].transitions[-1]
    rationale, finished = builder.rationale(turn.ac.tokens)
    return [*turn.ob.to_ints(), *rationale], builder.answer_tokens, finished


def _with_answer(builder: object) -> HasAnswer:
    if not isinstance(builder, HasAnswer):
        raise ConfigError(
            f"{type(builder).__name__} has no answer_tokens and rationale(action), and the likelihood reward reads "
            "both: take an environment with groups of them, such as recipes/latro/env.py's, or another batch_reward"
        )
    return builder


@chz.chz
class LikelihoodRewardBuilder(BatchRewardBuilder):
    """log p(gold answer | question, rationale) as reward."""

    likelihood_coef: float = chz.field(
        default=1.0, validator=NON_NEGATIVE, doc="weight of the answers' cross-entropy; 1 = true gradient, 0 = none"
    )
    non_stop_penalty: bool = chz.field(
        default=True, doc="rationales that never stop get penalty_reward_value * the mean reward"
    )
    penalty_reward_value: float = chz.field(
        default=2.0, validator=Range(1, LARGEST), doc="multiplies the mean reward, which is negative"
    )

    def check_groups(self, builders_P: Sequence[EnvGroupBuilder]) -> None:
        for builder in builders_P:
            _with_answer(builder)

    async def __call__(
        self, service: ServiceClient, training_client: TrainingClient, renderer: Renderer
    ) -> BatchReward:
        return LikelihoodReward(training_client, self)
