"""Untrained judges: rules, and any endpoint that speaks the OpenAI chat protocol. The endpoint sees
two answers and must end with a line that says A, B or Tie; another reply is a JudgeError. Such
judges prefer a side: ask in both orders, as win rates do. The client is endpoint.py.
"""

import re
from collections.abc import Callable, Sequence

import chz

from posttrain.renderers.types import Tokenizer
from preference.endpoint import ChatEndpoint
from preference.label_model import question
from preference.reward_types import Judge, JudgeBuilder, JudgeError, PreferenceModel
from preference.types import Comparison

INSTRUCTION = (
    "Two answers to the same prompt follow. Which one is better? End with a line that holds one word: A, B or Tie."
)
SCORES = {"a": -1.0, "tie": 0.0, "b": 1.0}


class RuleJudge(PreferenceModel):
    """Prefers the answer with the higher `quality(comparison, answer)`."""

    def __init__(self, quality: Callable[[Comparison, str], float]):
        self.quality = quality

    async def compare(self, comparisons_D: Sequence[Comparison]) -> list[float]:
        return [self._score(comparison) for comparison in comparisons_D]

    def _score(self, comparison: Comparison) -> float:
        a, b = (
            self.quality(comparison, side[-1]["content"]) for side in (comparison.completion_A, comparison.completion_B)
        )
        return float((b > a) - (b < a))


@chz.chz
class ShorterJudgeBuilder(JudgeBuilder):
    """The shorter answer is better: a judge for tests and demos."""

    def __call__(self, tokenizer: Tokenizer) -> Judge:
        return RuleJudge(lambda comparison, answer: -float(len(answer)))


@chz.chz
class EndpointJudgeBuilder(ChatEndpoint, JudgeBuilder):
    """A model at BASE_URL/chat/completions."""

    instruction: str = chz.field(default=INSTRUCTION, doc="the judge's instruction, before prompt and answers")

    def __call__(self, tokenizer: Tokenizer) -> Judge:
        return EndpointJudge(self)


class EndpointJudge:
    def __init__(self, config: EndpointJudgeBuilder):
        self.config, self.client = config, config.client

    async def __call__(self, comparison: Comparison) -> float:
        text = await self.client.complete(f"{self.config.instruction}\n\n{question(comparison)[0]['content']}")
        verdict = re.fullmatch(r"\W*(a|b|tie)\W*", text.splitlines()[-1], re.IGNORECASE)
        if verdict is None:
            raise JudgeError(f"{self.client.name} ended with {text[-60:]!r}, not with A, B or Tie")
        return SCORES[verdict[1].lower()]
