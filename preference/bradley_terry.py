"""The scalar reward model: a number r for a conversation, read at the last token of its answer. Bradley and
Terry: P(chosen is better) = sigmoid(r_chosen - r_rejected); the loss is -log of it (Ouyang et al.
2022 eq. 1), with a margin m -log sigmoid(r_chosen - r_rejected - m) (Touvron et al. 2023, eq. 2).
Ties are dropped and counted. Left out: centring r (only differences have a meaning), ensembles.
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain

import chz
import numpy as np
import torch
from torch.nn.functional import logsigmoid

from posttrain.backend.errors import ContextLengthError, DataError
from posttrain.backend.ranges import NON_NEGATIVE
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import Datum, ForwardBackwardOutput, LoraConfig, ModelInput
from posttrain.renderers.types import Message, Renderer, Tokenizer
from posttrain.tracking.datasets import DrawnDataset, ListDataset
from preference.reward_data import RewardExamplesBuilder
from preference.reward_types import (
    Judge,
    JudgeBuilder,
    PreferenceModel,
    RewardModel,
    RewardModelBuilder,
    SavedModel,
    drop_too_long,
    no_loss,
    too_long,
)
from preference.scored_tokens import scored_tokens
from preference.types import Comparison, LabeledComparison
from rl.types import BatchReward, BatchRewardBuilder, Metrics, RolloutError, TrajectoryGroup
from supervised.examples import by_processes
from supervised.train import Objective, Pass
from supervised.types import SupervisedDataset


def bradley_terry(data_D: list[Datum], scalars_D: list[torch.Tensor]) -> tuple[torch.Tensor, Metrics]:
    """Mean over pairs of -log sigmoid(r_chosen - r_rejected - m). Datum 2i is the chosen answer of
    pair i, 2i + 1 the rejected; r and m (`margins`) are read at a sequence's last position."""
    rewards_P2 = torch.stack([scalar_T[-1] for scalar_T in scalars_D]).reshape(-1, 2)
    margins_P = rewards_P2.new_tensor([float(datum.loss_fn_inputs["margins"].array[-1]) for datum in data_D[::2]])
    gaps_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    loss = -logsigmoid(gaps_P - margins_P).mean()
    return loss, {"accuracy": float((gaps_P > 0).float().mean()), "reward_gap": float(gaps_P.detach().mean())}


def last_token_datum(tokens: Sequence[int], margin: float = 0.0) -> Datum:
    """A sequence with its scalar at the last token; `margins` is read from a pair's chosen Datum."""
    at_last_T = np.zeros(len(tokens), dtype=np.float32)
    at_last_T[-1] = 1
    return Datum(ModelInput.kept(tokens), {"weights": at_last_T, "margins": margin * at_last_T})


class ScalarModel(RewardModel):
    """A trained scalar client. One forward pass scores all conversations of a call."""

    def __init__(self, client: TrainingClient, renderer: Renderer):
        self.client, self.renderer = client, renderer

    async def score(self, conversations_D: Sequence[Sequence[Message]]) -> list[float]:
        return await self.score_tokens(
            [scored_tokens(self.renderer, conversation)[0] for conversation in conversations_D]
        )

    async def score_each(self, conversations_D: Sequence[Sequence[Message]]) -> list[float | RolloutError]:
        tokens_D = [scored_tokens(self.renderer, conversation)[0] for conversation in conversations_D]
        errors_D = [too_long(len(tokens), self.max_length) for tokens in tokens_D]
        pairs = zip(tokens_D, errors_D, strict=True)
        scores = iter(await self.score_tokens([tokens for tokens, error in pairs if not error]))
        return [error or next(scores) for error in errors_D]

    @property
    def max_length(self) -> int:
        return self.client.get_info().max_length

    async def score_tokens(self, tokens_D: Sequence[Sequence[int]]) -> list[float]:
        """Scores of rendered conversations. ContextLengthError if one exceeds the context."""
        if not tokens_D:
            return []
        if error := too_long(max(map(len, tokens_D)), self.max_length):
            raise ContextLengthError(str(error))
        output = await self.client.forward([last_token_datum(tokens) for tokens in tokens_D], no_loss)
        return [float(out["scalars"].array[-1]) for out in output.loss_fn_outputs]


class BradleyTerryJudge(PreferenceModel):
    """A reward model as a judge: P(B is better) - P(A is better) = tanh((r_B - r_A) / 2), which
    does not depend on the order of the sides."""

    def __init__(self, model: RewardModel):
        self.model = model

    async def compare(self, comparisons_D: Sequence[Comparison]) -> list[float]:
        sides = [
            [*comparison.prompt_conversation, *side]
            for comparison in comparisons_D
            for side in (comparison.completion_A, comparison.completion_B)
        ]
        rewards_D2 = np.array(await self.model.score(sides)).reshape(-1, 2)
        return np.tanh((rewards_D2[:, 1] - rewards_D2[:, 0]) / 2).tolist()


@chz.chz
class ScalarModelBuilder(SavedModel, RewardModelBuilder):
    """A saved scalar reward model."""

    def __call__(self, tokenizer: Tokenizer) -> ScalarModel:
        return ScalarModel(*self.open(ServiceClient.create_scalar_client_from_state, tokenizer))


@chz.chz
class BradleyTerryJudgeBuilder(JudgeBuilder):
    """A reward model as a judge of pairs."""

    model: RewardModelBuilder = chz.field(doc="the reward model")

    def __call__(self, tokenizer: Tokenizer) -> Judge:
        return BradleyTerryJudge(self.model(tokenizer))


# --- training -----------------------------------------------------------------------------------


class BradleyTerry:
    async def passes(self, client: TrainingClient, batch: list[Datum]) -> list[Pass]:
        return [(batch, client.forward_backward_custom(batch, bradley_terry))]

    def metrics(self, batch: list[Datum], outputs: Sequence[ForwardBackwardOutput]) -> Metrics:
        names = {"loss:sum": "train_loss", "accuracy": "train_accuracy", "reward_gap": "train_reward_gap"}
        found = outputs[0].metrics
        return {ours: found[name] for name, ours in names.items()} | {"num_pairs": len(batch) // 2}


@chz.chz
class PreferencePairsBuilder(RewardExamplesBuilder):
    """Comparisons to train a scalar reward model on."""

    margin_coef: float = chz.field(
        default=0.0,
        validator=NON_NEGATIVE,
        doc="the loss's margin, as a multiple of the data's own margin; 0 = no margins",
    )

    def examples(self, renderer: Renderer, labeled_D: Sequence[LabeledComparison]) -> SupervisedDataset:
        decided_D = [labeled for labeled in labeled_D if labeled.label != "Tie"]
        if not decided_D:
            raise DataError(
                f"all of {len(labeled_D)} comparisons are ties: there is nothing to train a scalar reward model on"
            )
        if len(decided_D) < len(labeled_D):
            print(
                f"preference pairs: {len(labeled_D) - len(decided_D):,} ties of {len(labeled_D):,} comparisons dropped"
            )
        margins_D = [self._margin(labeled) for labeled in decided_D]
        parts = by_processes(partial(_sides, renderer), decided_D, "tokenizing comparisons")
        pairs_D = [
            [last_token_datum(tokens_T.tolist(), margin) for tokens_T in sides]
            for sides, margin in zip(chain.from_iterable(parts), margins_D, strict=True)
        ]
        pairs = ListDataset(pairs_D, min(self.batch_size, len(pairs_D)), self.seed)
        # The units of a batch are pairs: chosen and rejected, side by side.
        sides = chain.from_iterable
        return DrawnDataset(lambda epoch, index: list(sides(pairs.batch(epoch, index))), len(pairs))

    def _margin(self, labeled: LabeledComparison) -> float:
        if self.margin_coef and labeled.margin is None:
            raise DataError(
                f"{labeled.where or 'comparison'}: no margin, and margin_coef={self.margin_coef} needs one; set it to 0"
            )
        return self.margin_coef * (labeled.margin or 0.0)

    def length(self, renderer: Renderer, labeled: LabeledComparison) -> int:
        comparison = labeled.comparison
        sides = (comparison.completion_A, comparison.completion_B)
        return max(len(scored_tokens(renderer, [*comparison.prompt_conversation, *side])[0]) for side in sides)

    def create_client(
        self, service: ServiceClient, model_name: str, lora: LoraConfig | None, seed: int
    ) -> TrainingClient:
        return service.create_scalar_client(model_name, lora, seed)

    def model(self, client: TrainingClient, renderer: Renderer) -> PreferenceModel:
        return BradleyTerryJudge(ScalarModel(client, renderer))

    def objective(self) -> Objective[list[Datum]]:
        return BradleyTerry()


def _sides(renderer: Renderer, labeled_D: Sequence[LabeledComparison]) -> list[list[np.ndarray]]:
    """Tokens of the chosen and the rejected answer of each, after their prompt."""
    prompts_D = [list(labeled.comparison.prompt_conversation) for labeled in labeled_D]
    return [
        [np.array(scored_tokens(renderer, [*prompt, *side])[0], np.int32) for side in labeled.chosen_and_rejected()]
        for prompt, labeled in zip(prompts_D, labeled_D, strict=True)
    ]


# --- as a reward in RL --------------------------------------------------------------------------


class ScalarBatchReward:
    """Adds coef * r to every finished trajectory of a step, by one forward pass over its last
    prompt and the tokens sampled after it. What exceeds the model's context leaves its group."""

    def __init__(self, model: ScalarModel, coef: float):
        self.model, self.coef = model, coef

    async def __call__(self, groups_P: Sequence[TrajectoryGroup]) -> Metrics:
        drop_too_long(groups_P, self.model.max_length)
        members = [
            (group, g) for group in groups_P for g, member in enumerate(group.trajectories_G) if member.transitions
        ]
        last_D = [group.trajectories_G[g].transitions[-1] for group, g in members]
        scores_D = await self.model.score_tokens([[*turn.ob.to_ints(), *turn.ac.tokens] for turn in last_D])
        for (group, g), score in zip(members, scores_D, strict=True):
            group.final_rewards_G[g] += self.coef * score
            group.metrics_G[g]["reward_model"] = score
        return (
            {"reward_model/mean": float(np.mean(scores_D)), "reward_model/std": float(np.std(scores_D))}
            if scores_D
            else {}
        )


@chz.chz
class RewardModelReward(SavedModel, BatchRewardBuilder):
    """A saved scalar reward model as a reward. Its renderer must be the policy's."""

    coef: float = chz.field(default=1.0, validator=NON_NEGATIVE, doc="weight of the model's reward")

    async def __call__(
        self, service: ServiceClient, training_client: TrainingClient, renderer: Renderer
    ) -> BatchReward:
        client, own_renderer = self.open(ServiceClient.create_scalar_client_from_state, renderer.tokenizer, service)
        self.check_renderer(own_renderer, renderer)
        return ScalarBatchReward(ScalarModel(client, own_renderer), self.coef)
