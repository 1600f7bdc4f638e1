"""Samples and grades answers: several per problem, one engine call. Used by step labels, best-of-n
and B-STaR.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.types import ModelInput, SamplingParams
from posttrain.renderers.types import Renderer
from rl.types import RolloutError


class Graded(Protocol):
    """A verifier's result: the extracted answer, None if there is none, and whether it is right."""

    @property
    def answer(self) -> str | None: ...

    @property
    def correct(self) -> bool: ...


class GradedProblem(Protocol):
    """A question with a verifier, such as envs.problem_env.ProblemEnv."""

    renderer: Renderer

    def question(self) -> str: ...

    def build_prompt(self) -> ModelInput: ...

    async def grade(self, text: str) -> Graded: ...


class Response(NamedTuple):
    """A graded sample. A response that did not stop by itself has no answer and is wrong."""

    tokens: list[int]
    text: str
    ended: bool
    answer: str | None
    correct: bool


async def grade(problem: GradedProblem, tokens: list[int], tries: int = 1) -> Response:
    """Raises the verifier's RolloutError after `tries` failures; nothing is scored in its place."""
    message, ended = problem.renderer.parse_response(tokens)
    text = message["content"]
    if not ended:
        return Response(tokens, text, False, None, False)
    while True:
        try:
            graded = await problem.grade(text)
            return Response(tokens, text, True, graded.answer, graded.correct)
        except RolloutError:
            tries -= 1
            if tries < 1:
                raise


async def sample_and_grade(
    client: SamplingClient,
    problems_P: Sequence[GradedProblem],
    num_samples: int,
    params: SamplingParams,
    seeds_P: Sequence[int],
    tries: int = 1,
) -> list[list[Response]]:
    """`num_samples` responses to each problem, in one engine call, with the renderer's stops."""

    async def responses(problem: GradedProblem, seed: int) -> list[Response]:
        seeded = replace(params, seed=seed, stop=problem.renderer.get_stop_sequences())
        sampled = await client.sample_async(problem.build_prompt(), num_samples, seeded)
        return [await grade(problem, sequence.tokens, tries) for sequence in sampled.sequences]

    return await asyncio.gather(*(responses(problem, seed) for problem, seed in zip(problems_P, seeds_P, strict=True)))


def sampling_seeds(entropy: int | Sequence[int], count: int) -> list[int]:
    """A seed for each of `count` problems."""
    return (np.random.SeedSequence(entropy).generate_state(count, np.uint64) >> np.uint64(2)).tolist()


@dataclass(frozen=True)
class Solution:
    """A graded response to `question`, with its prompt and response tokens. JSON by
    dataclasses.asdict."""

    question: str
    prompt: list[int]
    tokens: list[int]
    answer: str
    correct: bool


def solution_of(problem: GradedProblem, response: Response) -> Solution:
    prompt = problem.build_prompt().to_ints()
    return Solution(problem.question(), prompt, response.tokens, response.answer or "", response.correct)


async def sample_solutions(
    client: SamplingClient, problems_P: Sequence[GradedProblem], num_samples: int, params: SamplingParams
) -> list[list[Solution]]:
    """`num_samples` solutions of each problem; problem p uses the p-th seed of params.seed."""
    seeds_P = sampling_seeds(params.seed or 0, len(problems_P))
    responses_P_G = await sample_and_grade(client, problems_P, num_samples, params, seeds_P)
    return [
        [solution_of(p, response) for response in group] for p, group in zip(problems_P, responses_P_G, strict=True)
    ]
