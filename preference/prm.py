"""A process reward model in use: scores of the steps of sampled solutions, and rewards in RL. A
step's score is the logit at its last token; its sigmoid estimates the probability that the solution
still reaches the right answer. B-STaR (Zeng et al. 2024): reward += coef * aggregate(scores).
Per-step advantages (Setlur et al. 2024): tokens of step k get coef * (p_k - p_{k-1}), where p_{-1}
is the group's mean of p_0. Left out: solutions of several turns.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import chz
import numpy as np

from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import NON_NEGATIVE, NUMBER
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import Datum, ModelInput
from posttrain.renderers.types import Renderer, Tokenizer
from preference.reward_types import SavedModel, drop_too_long, no_loss
from preference.steps import Malformed, StepFormat, split_response
from rl.types import BatchReward, BatchRewardBuilder, Metrics, TrajectoryGroup, Transition

MALFORMED_LOGIT = -5.0
Aggregation = Literal["min", "product", "last", "mean"]
AGGREGATES = {"min": np.min, "product": np.prod, "last": lambda values_S: values_S[-1], "mean": np.mean}
Scale = Literal["logit", "probability"]


def check_aggregation(how: Aggregation, scale: Scale) -> None:
    """ConfigError for a product of logits, which means nothing."""
    if how == "product" and scale == "logit":
        raise ConfigError("aggregation=product is of probabilities: set scale=probability, or take min, last or mean")


@dataclass(frozen=True)
class StepScores:
    """`logits_S`: step s is the response's tokens `bounds[s]` to `bounds[s + 1]`; at least one
    step. The answer step of a malformed solution scores `malformed_logit`."""

    logits_S: np.ndarray
    bounds: list[int]
    malformed: Malformed | None

    @property
    def probabilities_S(self) -> np.ndarray:
        return 1 / (1 + np.exp(-self.logits_S))

    def aggregate(self, how: Aggregation, scale: Scale = "probability") -> float:
        """A number for the solution."""
        check_aggregation(how, scale)
        return float(AGGREGATES[how](self.probabilities_S if scale == "probability" else self.logits_S))


class ProcessRewardModel:
    """A trained scalar client. `form` must be the one it was trained with."""

    def __init__(
        self, client: TrainingClient, renderer: Renderer, form: StepFormat, malformed_logit: float = MALFORMED_LOGIT
    ):
        self.client, self.renderer, self.form, self.malformed_logit = client, renderer, form, malformed_logit

    @property
    def max_length(self) -> int:
        return self.client.get_info().max_length

    async def score(self, responses_D: Sequence[tuple[list[int], list[int]]]) -> list[StepScores]:
        """Scores of every step of (prompt tokens, response tokens), in one forward pass."""
        steps_D = [split_response(response, self.renderer, self.form) for _, response in responses_D]
        at_D = [
            len(prompt) + np.array(s.last_tokens, dtype=int)
            for (prompt, _), s in zip(responses_D, steps_D, strict=True)
        ]
        data = [
            _datum([*prompt, *response], at)
            for (prompt, response), at in zip(responses_D, at_D, strict=True)
            if len(at)  # a response without steps has nothing to read
        ]
        outputs = iter((await self.client.forward(data, no_loss)).loss_fn_outputs if data else ())
        scores_D = []
        for steps, at in zip(steps_D, at_D, strict=True):
            logits_S = next(outputs)["scalars"].array[at].astype(np.float64) if len(at) else np.zeros(1)
            if steps.malformed:
                logits_S[-1] = self.malformed_logit
            scores_D.append(StepScores(logits_S, steps.bounds, steps.malformed))
        return scores_D


def _datum(tokens: list[int], positions: np.ndarray) -> Datum:
    weights = np.zeros(len(tokens), dtype=np.float32)
    weights[positions] = 1
    return Datum(ModelInput.from_ints(tokens), {"weights": weights})


@chz.chz
class SavedPrm(SavedModel):
    """A process reward model by its path."""

    form: StepFormat = chz.field(default_factory=StepFormat, doc="how solutions are written: as the model was trained")
    malformed_logit: float = chz.field(
        default=MALFORMED_LOGIT,
        validator=NUMBER,
        doc="score of the answer step of a solution that is cut off or lacks its answer",
    )

    def load(self, tokenizer: Tokenizer, service: ServiceClient | None = None) -> ProcessRewardModel:
        client, renderer = self.open(ServiceClient.create_scalar_client_from_state, tokenizer, service)
        return ProcessRewardModel(client, renderer, self.form, self.malformed_logit)


# --- as a reward in RL --------------------------------------------------------------------------


# a member of a group, its only turn, and the turn's scores
Scored = tuple[int, Transition, StepScores]


class ProcessReward:
    """Scores all trajectories of a step in one forward pass. What exceeds the model's context leaves its
    group."""

    def __init__(self, model: ProcessRewardModel, config: "PrmReward"):
        self.model, self.config = model, config

    async def __call__(self, groups_P: Sequence[TrajectoryGroup]) -> Metrics:
        drop_too_long(groups_P, self.model.max_length)
        turns_P_G = [[_only_turn(t.transitions) for t in group.trajectories_G] for group in groups_P]
        asked_D = [(turn.ob.to_ints(), turn.ac.tokens) for turns_G in turns_P_G for turn in turns_G if turn]
        scores_D = await self.model.score(asked_D)
        scores = iter(scores_D)
        for group, turns_G in zip(groups_P, turns_P_G, strict=True):
            scored = [(g, turn, next(scores)) for g, turn in enumerate(turns_G) if turn]
            if self.config.per_step:
                self._add_advantages(group, scored)
            else:
                self._add_rewards(group, scored)
        return self._metrics(scores_D)

    def _add_rewards(self, group: TrajectoryGroup, scored: list[Scored]) -> None:
        for g, _, score in scored:
            value = score.aggregate(self.config.aggregation, self.config.scale)
            group.final_rewards_G[g] += self.config.coef * value
            group.metrics_G[g]["prm"] = value

    def _add_advantages(self, group: TrajectoryGroup, scored: list[Scored]) -> None:
        before = float(np.mean([score.probabilities_S[0] for _, _, score in scored])) if scored else 0.0
        for g, turn, score in scored:
            changes_S = self.config.coef * np.diff(score.probabilities_S, prepend=before)
            lengths_S = np.diff(score.bounds) if len(score.bounds) > 1 else [len(turn.ac.tokens)]
            changes_T = np.repeat(changes_S, lengths_S)
            turn.token_advantages = (changes_T + (turn.token_advantages or 0.0)).tolist()
            group.metrics_G[g]["prm"] = score.aggregate(self.config.aggregation, self.config.scale)

    def _metrics(self, scores_D: list[StepScores]) -> Metrics:
        if not scores_D:
            return {}
        values_D = [score.aggregate(self.config.aggregation, self.config.scale) for score in scores_D]
        kinds = Counter(score.malformed for score in scores_D)
        return {
            "prm/mean": float(np.mean(values_D)),
            "prm/steps": float(np.mean([len(score.logits_S) for score in scores_D])),
            **{f"prm/{kind}": kinds[kind] / len(scores_D) for kind in ("truncated", "empty", "no_answer")},
        }


def _only_turn(transitions: Sequence[Transition]) -> Transition | None:
    """None for a trajectory without a turn: it has no solution to score."""
    if len(transitions) > 1:
        raise ConfigError(
            f"a process reward model scores solutions of one turn, and a trajectory has {len(transitions)}"
        )
    return transitions[0] if transitions else None


@chz.chz
class PrmReward(SavedPrm, BatchRewardBuilder):
    """A saved process reward model as a reward. Its renderer must be the policy's."""

    coef: float = chz.field(default=0.2, validator=NON_NEGATIVE, doc="weight of the aggregated scores in the reward")
    aggregation: Aggregation = chz.field(
        default="min", doc="of the steps' scores to one number: min, product, last or mean"
    )
    scale: Scale = chz.field(default="logit", doc="'logit' as B-STaR has it, unbounded; 'probability' is its sigmoid")
    per_step: bool = chz.field(
        default=False, doc="per-step advantages instead: the change of the probability over each step"
    )

    async def __call__(
        self, service: ServiceClient, training_client: TrainingClient, renderer: Renderer
    ) -> BatchReward:
        check_aggregation(self.aggregation, self.scale)
        model = self.load(renderer.tokenizer, service)
        self.check_renderer(model.renderer, renderer)
        return ProcessReward(model, self)
