"""Several sampled and graded answers to each of many problems: what step labels are made for, and what best-of-n chooses from."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.types import ModelInput, SamplingParams
from posttrain.renderers.types import Renderer


class GradedProblem(Protocol):
    """A question with a verifier; every envs.problem_env.ProblemEnv is one."""

    renderer: Renderer

    def question(self) -> str: ...

    def build_prompt(self) -> ModelInput: ...

    def extract(self, text: str) -> str:
        """The answer in a response, "" where there is none."""
        ...

    async def check_answer_async(self, text: str) -> bool: ...


@dataclass(frozen=True)
class Solution:
    """A response to `question`: the tokens it was sampled from and as, and what the verifier says of it. JSON by dataclasses.asdict."""

    question: str
    prompt: list[int]
    tokens: list[int]
    answer: str
    correct: bool


async def sample_solutions(
    client: SamplingClient, problems_P: Sequence[GradedProblem], num_samples: int, params: SamplingParams
) -> list[list[Solution]]:
    """`num_samples` solutions of each problem, all in one engine call. They stop where the renderer says; problem p is sampled with the
    p-th seed that follows from params.seed. A verifier that fails raises its RolloutError: nothing is scored in its place.
    """
    seeds_P = np.random.SeedSequence(params.seed or 0).generate_state(len(problems_P), np.uint64) >> np.uint64(2)

    async def one(problem: GradedProblem, seed: int) -> list[Solution]:
        prompt = problem.build_prompt()
        seeded = replace(params, seed=seed, stop=problem.renderer.get_stop_sequences())
        response = await client.sample_async(prompt, num_samples, seeded)
        return [await grade(problem, prompt.to_ints(), sequence.tokens) for sequence in response.sequences]

    return await asyncio.gather(*(one(problem, int(seed)) for problem, seed in zip(problems_P, seeds_P, strict=True)))


async def grade(problem: GradedProblem, prompt: list[int], tokens: list[int]) -> Solution:
    """A response that did not stop by itself is wrong, whatever it says."""
    message, ended = problem.renderer.parse_response(tokens)
    text = message["content"]
    correct = ended and await problem.check_answer_async(text)
    return Solution(problem.question(), prompt, tokens, problem.extract(text) if ended else "", correct)
