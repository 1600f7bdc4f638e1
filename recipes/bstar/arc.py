"""ARC-Challenge: science questions with options, for a model that can already reason in words: there are no human solutions to imitate.

The reward is the outcome's alone, as in the paper: set reward=outcome. With `bare_answers`, answers without a reasoning count as human
solutions, for a model that was never taught to answer at all.
"""

from collections.abc import Sequence
from functools import partial
from itertools import islice

import chz

from envs.arc_challenge import ANSWER_PHRASE, ArcEnv, arc_question, read_arc
from envs.problem_env import ProblemEnv, fit_prompts
from posttrain.backend.ranges import COUNT
from posttrain.renderers.types import Renderer
from preference.steps import StepFormat
from recipes.bstar.fitting import as_queries, room_for_prompts
from recipes.bstar.tasks import Query, TaskBuilder

TRIGGER = f"\nThink step by step, and end with: {ANSWER_PHRASE} <letter>."


@chz.chz
class ArcBuilder(TaskBuilder):
    """ARC-Challenge, from `data_dir` or else from the hub."""

    data_dir: str | None = chz.field(
        default=None, doc="folder with train.jsonl and test.jsonl; None = allenai/ai2_arc of the hub"
    )
    trigger: str = chz.field(default=TRIGGER, doc="follows the options")
    bare_answers: bool = chz.field(default=False, doc="take the right answer without a reasoning for a human solution")
    max_prompt_tokens: int | None = chz.field(
        default=None, validator=COUNT, doc="drop longer prompts; None = those that leave no room for max_tokens"
    )
    form: StepFormat = chz.field(
        default_factory=lambda: StepFormat(separator="\n", answer_marker=ANSWER_PHRASE), doc="of solutions"
    )
    max_tokens: int = chz.field(default=256, validator=COUNT, doc="most tokens of a sampled solution")

    def train_queries(self, renderer: Renderer) -> Sequence[Query]:
        return self._queries("train", renderer, self.num_train)

    def test_queries(self, renderer: Renderer) -> Sequence[Query]:
        return self._queries("test", renderer, self.num_test)

    def _queries(self, split: str, renderer: Renderer, limit: int | None) -> list[Query]:
        rows = islice(read_arc(self.data_dir, split), limit)
        thunks = [partial(ArcEnv, arc_question(where, row), renderer, self.trigger) for where, row in rows]
        room = room_for_prompts(renderer, self.max_prompt_tokens, self.max_tokens)
        envs = [thunk() for thunk in fit_prompts(thunks, room, name=f"arc {split}")]
        return as_queries(split, envs, self._solution, self.max_tokens)

    def _solution(self, env: ProblemEnv) -> str | None:
        return f"{ANSWER_PHRASE} {env.reference_answer()}." if self.bare_answers else None
