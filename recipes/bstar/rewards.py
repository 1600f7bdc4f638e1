"""The reward of selection: the verifier's outcome plus a model's score.

    r(x, y) = 1[answer right] + coef * min over steps of the process reward model's logit    (B-STaR, section 3.1; coef 1/5)

A truncated solution, or one without an answer, has the answer step's logit -5.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import chz

from posttrain.backend.ranges import NON_NEGATIVE, NUMBER
from posttrain.backend.service_client import ServiceClient
from posttrain.renderers.types import Message, Renderer
from preference.prm import MALFORMED_LOGIT, ProcessRewardModel, SavedPrm
from preference.reward_types import RewardModel, RewardModelBuilder
from preference.steps import StepFormat
from recipes.bstar.records import Candidate
from recipes.bstar.tasks import Query

Queries = Mapping[str, Query]  # by id
SCORED_AT_ONCE = 2048  # responses in one forward pass


class Reward(Protocol):
    async def __call__(self, candidates: Sequence[Candidate], queries: Queries) -> list[Candidate]:
        """The candidates with `reward`, and with `step_scores` if the reward has them."""
        ...


@chz.chz
class RewardBuilder:
    """The outcome alone: 1 if the answer is right, else 0."""

    def __call__(self, service: ServiceClient, renderer: Renderer, prm_path: str, form: StepFormat) -> Reward:
        """`prm_path`: the stage prm's model. `form`: the task's step format."""
        return outcome

    @property
    def needs_prm(self) -> bool:
        return False


async def outcome(candidates: Sequence[Candidate], queries: Queries) -> list[Candidate]:
    return [replace(candidate, reward=float(candidate.correct)) for candidate in candidates]


@chz.chz
class PrmRewardBuilder(RewardBuilder):
    """The outcome plus the smallest step score of a process reward model."""

    coef: float = chz.field(default=0.2, validator=NON_NEGATIVE, doc="weight of the smallest step logit")
    malformed_logit: float = chz.field(
        default=MALFORMED_LOGIT, validator=NUMBER, doc="logit of the answer step of a solution without an answer"
    )
    path: str | None = chz.field(default=None, doc="a saved process reward model; None = that of the stage prm")

    @property
    def needs_prm(self) -> bool:
        return self.path is None

    def __call__(self, service: ServiceClient, renderer: Renderer, prm_path: str, form: StepFormat) -> Reward:
        saved = SavedPrm(path=self.path or prm_path, form=form, malformed_logit=self.malformed_logit)
        return OutcomeAndSteps(saved.load(renderer.tokenizer, service), self.coef)


class OutcomeAndSteps:
    def __init__(self, model: ProcessRewardModel, coef: float):
        self.model, self.coef = model, coef

    async def __call__(self, candidates: Sequence[Candidate], queries: Queries) -> list[Candidate]:
        # equal responses to a query are scored once
        distinct = {(candidate.query, tuple(candidate.tokens)): candidate for candidate in candidates}
        prompts = {query: queries[query].build_prompt().to_ints() for query, _ in distinct}
        responses = [(prompts[query], list(tokens)) for query, tokens in distinct]
        scores = []
        for start in range(0, len(responses), SCORED_AT_ONCE):
            scores += await self.model.score(responses[start : start + SCORED_AT_ONCE])
        scores_by_key = dict(zip(distinct, scores, strict=True))
        scored = []
        for candidate in candidates:
            steps = scores_by_key[candidate.query, tuple(candidate.tokens)]
            reward = float(candidate.correct) + self.coef * steps.aggregate("min", "logit")
            scored.append(replace(candidate, reward=reward, step_scores=steps.logits_S.tolist()))
        return scored


@chz.chz
class ModelRewardBuilder(RewardBuilder):
    """The outcome plus a reward model's score of the whole answer."""

    model: RewardModelBuilder = chz.field(doc="builder of the reward model")
    coef: float = chz.field(default=0.2, validator=NON_NEGATIVE, doc="weight of its score")

    def __call__(self, service: ServiceClient, renderer: Renderer, prm_path: str, form: StepFormat) -> Reward:
        return OutcomeAndModel(self.model(renderer.tokenizer), self.coef)


class OutcomeAndModel:
    def __init__(self, model: RewardModel, coef: float):
        self.model, self.coef = model, coef

    async def __call__(self, candidates: Sequence[Candidate], queries: Queries) -> list[Candidate]:
        distinct = {(candidate.query, candidate.text): candidate for candidate in candidates}
        scores_D = await self.model.score([_conversation(candidate, queries) for candidate in distinct.values()])
        score_by_key = dict(zip(distinct, scores_D, strict=True))
        return [replace(c, reward=float(c.correct) + self.coef * score_by_key[c.query, c.text]) for c in candidates]


def _conversation(candidate: Candidate, queries: Queries) -> list[Message]:
    return replace(queries[candidate.query].problem, solution=candidate.text).messages(queries[candidate.query].prefix)
