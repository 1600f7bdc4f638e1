"""Which questions and human solutions fit: a prompt leaves room for `max_tokens`, and no human writes more than the model may.

What does not fit is dropped and counted on a printed line, never cut.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from envs.problem_env import ProblemEnv
from posttrain.renderers.types import Renderer
from recipes.bstar.tasks import Query

E = TypeVar("E", bound=ProblemEnv)


def room_for_prompts(renderer: Renderer, asked: int | None, max_tokens: int) -> int:
    """Tokens that a prompt may have: as many as were asked for, or as the context has besides a solution."""
    return asked or renderer.tokenizer.model_max_length - max_tokens


def as_queries(split: str, envs: Sequence[E], write: Callable[[E], str | None], max_tokens: int) -> list[Query]:
    """Queries named after `split` and their place. `write` gives the human solution as the model is to write it, None where there is none."""
    queries, overlong = [], 0
    for n, env in enumerate(envs):
        solution = write(env)
        if solution is not None and len(env.renderer.tokenizer.encode(solution, add_special_tokens=False)) >= max_tokens:
            solution, overlong = None, overlong + 1
        queries.append(Query(f"{split}-{n}", env, solution))
    if overlong:
        print(f"{split}: {overlong} of {len(envs)} human solutions are longer than max_tokens={max_tokens}; left out")
    return queries
