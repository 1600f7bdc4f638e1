"""Untrained judges: rules, and any endpoint that speaks the OpenAI chat protocol. The endpoint sees
two answers and must end with a line that says A, B or Tie. A time-out, an HTTP error or another
reply is a JudgeError. Such judges prefer a side: ask in both orders, as win rates do. Left out:
logprobs, streaming, prices.
"""

import asyncio
import json
import os
import re
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import chz

from posttrain.backend.ranges import COUNT, POSITIVE, WHOLE
from posttrain.renderers.types import Tokenizer
from preference.label_model import question
from preference.reward_types import Judge, JudgeBuilder, JudgeError, PreferenceModel
from preference.types import Comparison

INSTRUCTION = (
    "Two answers to the same prompt follow. Which one is better? End with a line that holds one word: A, B or Tie."
)
SCORES = {"a": -1.0, "tie": 0.0, "b": 1.0}
MOST_BYTES = 1 << 20


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
        return RuleJudge(_brevity)


def _brevity(comparison: Comparison, answer: str) -> float:
    return -float(len(answer))


@chz.chz
class EndpointJudgeBuilder(JudgeBuilder):
    """A model at BASE_URL/chat/completions."""

    base_url: str = chz.field(doc="as http://localhost:8000/v1")
    model: str = chz.field(doc="the model's name at the endpoint")
    api_key_variable: str | None = chz.field(
        default=None, doc="environment variable that holds the key, if one is needed"
    )
    instruction: str = chz.field(default=INSTRUCTION, doc="the judge's instruction, before prompt and answers")
    max_tokens: int = chz.field(default=512, validator=COUNT, doc="most tokens of its answer")
    timeout: float = chz.field(default=60.0, validator=POSITIVE, doc="seconds for one judgement")
    retries: int = chz.field(
        default=2, validator=WHOLE, doc="times a request that failed is sent again, after 1, 2, 4 ... seconds"
    )
    max_concurrent: int = chz.field(default=16, validator=COUNT, doc="most requests in flight")

    def __call__(self, tokenizer: Tokenizer) -> Judge:
        return EndpointJudge(self)


class EndpointJudge:
    def __init__(self, config: EndpointJudgeBuilder):
        self.config, self.url = config, config.base_url.rstrip("/") + "/chat/completions"
        self._slots = asyncio.Semaphore(config.max_concurrent)

    async def __call__(self, comparison: Comparison) -> float:
        """`timeout` covers the whole request. No thread waits for it, so an endpoint that sends a
        byte now and then holds none."""
        import httpx  # a third of a second to import

        for attempt in count():
            try:
                async with self._slots, asyncio.timeout(self.config.timeout), httpx.AsyncClient(timeout=None) as client:
                    answer = await self._ask(client, comparison)
                return self._score(answer)
            except (TimeoutError, OSError, httpx.HTTPError, httpx.InvalidURL) as error:
                if attempt == self.config.retries:
                    timed_out = isinstance(error, TimeoutError)
                    failure = f"no answer in {self.config.timeout:g} s" if timed_out else str(error) or repr(error)
                    raise JudgeError(
                        f"judge {self.config.model} at {self.url}: {failure} (attempt {attempt + 1})"
                    ) from error
            await asyncio.sleep(2**attempt)
        raise AssertionError("unreachable")

    async def _ask(self, client: Any, comparison: Comparison) -> bytes:
        """The first MOST_BYTES of the endpoint's reply to `client`, an httpx.AsyncClient."""
        text = f"{self.config.instruction}\n\n{question(comparison)[0]['content']}"
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": self.config.max_tokens,
            "temperature": 0,
        }
        headers = {}
        if self.config.api_key_variable:
            headers["Authorization"] = f"Bearer {os.environ.get(self.config.api_key_variable, '')}"
        received = b""
        async with client.stream("POST", self.url, json=body, headers=headers) as response:
            response.raise_for_status()
            async for piece in response.aiter_bytes():
                received += piece
                if len(received) > MOST_BYTES:
                    break
        return received[:MOST_BYTES]

    def _score(self, answer: bytes) -> float:
        try:
            text = json.loads(answer)["choices"][0]["message"]["content"]
            verdict = re.fullmatch(r"\W*(a|b|tie)\W*", text.strip().splitlines()[-1], re.IGNORECASE)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise JudgeError(f"judge {self.config.model} at {self.url} sent no completion: {answer[:100]!r}") from error
        if verdict is None:
            raise JudgeError(f"judge {self.config.model} at {self.url} ended with {text[-60:]!r}, not with A, B or Tie")
        return SCORES[verdict[1].lower()]
