"""What selection goes by: the verifier's outcome, and what a model adds to it.

    r(x, y) = 1[answer right] + coef * min over the steps of the process reward model's logit        (B-STaR, section 3.1; coef 1/5)

A solution that is cut off or lacks its answer has the answer step's logit -5. With the outcome
alone r is 0 or 1; any RewardModel's score can take the place of the process reward model's. Equal
responses to one query are scored once.
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
        """The candidates with `reward`, and with `step_scores` where there are any."""
        ...


@chz.chz
class RewardBuilder:
    """The outcome alone: 1 if the answer is right, else 0."""

    def __call__(self, service: ServiceClient, renderer: Renderer, prm_path: str, form: StepFormat) -> Reward:
        """`prm_path` is where the stage prm leaves its model, `form` the task's."""
        return outcome

    @property
    def needs_prm(self) -> bool:
        return False


async def outcome(candidates: Sequence[Candidate], queries: Queries) -> list[Candidate]:
    return [replace(candidate, reward=float(candidate.correct)) for candidate in candidates]


@chz.chz
class PrmRewardBuilder(RewardBuilder):
    """The outcome, and the smallest step score of a process reward model."""

    coef: float = chz.field(
        default=0.2, validator=NON_NEGATIVE, doc="weight of the smallest step logit beside the outcome"
    )
    malformed_logit: float = chz.field(
        default=MALFORMED_LOGIT, validator=NUMBER, doc="score of the answer step of a solution without an answer"
    )
    path: str | None = chz.field(
        default=None, doc="a saved process reward model; None = the one that the stage prm trains"
    )

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
        distinct = {(candidate.query, tuple(candidate.tokens)): candidate for candidate in candidates}
        prompts = {query: queries[query].build_prompt().to_ints() for query, _ in distinct}
        responses = [(prompts[one.query], one.tokens) for one in distinct.values()]
        scores = []
        for start in range(0, len(responses), SCORED_AT_ONCE):
            scores += await self.model.score(responses[start : start + SCORED_AT_ONCE])
        found = dict(zip(distinct, scores, strict=True))
        scored = []
        for candidate in candidates:
            steps = found[candidate.query, tuple(candidate.tokens)]
            reward = float(candidate.correct) + self.coef * steps.aggregate("min", "logit")
            scored.append(replace(candidate, reward=reward, step_scores=steps.logits_S.tolist()))
        return scored


@chz.chz
class ModelRewardBuilder(RewardBuilder):
    """The outcome, and what a reward model says of the whole answer."""

    model: RewardModelBuilder = chz.field(doc="builder of the reward model")
    coef: float = chz.field(default=0.2, validator=NON_NEGATIVE, doc="weight of its score beside the outcome")

    def __call__(self, service: ServiceClient, renderer: Renderer, prm_path: str, form: StepFormat) -> Reward:
        return OutcomeAndModel(self.model(renderer.tokenizer), self.coef)


class OutcomeAndModel:
    def __init__(self, model: RewardModel, coef: float):
        self.model, self.coef = model, coef

    async def __call__(self, candidates: Sequence[Candidate], queries: Queries) -> list[Candidate]:
        distinct = {(candidate.query, candidate.text): candidate for candidate in candidates}
        found = dict(
            zip(
                distinct,
                await self.model.score([_conversation(one, queries) for one in distinct.values()]),
                strict=True,
            )
        )
        return [replace(c, reward=float(c.correct) + self.coef * found[c.query, c.text]) for c in candidates]


def _conversation(candidate: Candidate, queries: Queries) -> list[Message]:
    return replace(queries[candidate.query].problem, solution=candidate.text).messages(queries[candidate.query].prefix)
