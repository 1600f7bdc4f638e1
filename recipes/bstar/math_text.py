r"""MATH-style text: problems with a worked solution whose last \boxed{...} is the answer. Answers are compared as expressions.

A human solution is rewritten as the model is to write it: one sentence or line a step, and a last step "# Answer: \boxed{...}". The original has
blank lines between steps and a heading over the answer; the sets it is trained on come in that form, MATH itself does not.
Left out: diagrams ([asy] code stands in the text as it is).
"""

import re
from collections.abc import Sequence
from typing import Literal

import chz

from envs.math_word import MathWordBuilder, MathWordEnv
from posttrain.backend.ranges import COUNT
from posttrain.renderers.types import Renderer
from preference.steps import StepFormat
from recipes.bstar.fitting import as_queries, room_for_prompts
from recipes.bstar.tasks import Query, TaskBuilder

ANSWER = "# Answer:"
Split = Literal["train", "test"]
STEP_END = re.compile(r"\s*\n\s*|(?<=[.!?])\s+(?=[A-Z$\\])")  # a line, or a sentence: what follows a full stop begins like one


def in_steps(env: MathWordEnv) -> str:
    return "\n".join([*STEP_END.split(env.solution.strip()), f"{ANSWER} \\boxed{{{env.gold}}}"])


def word_problems(source: MathWordBuilder, renderer: Renderer, split: Split, limit: int | None) -> list[MathWordEnv]:
    """The first `limit` problems; those whose prompt or gold answer `source` does not take are dropped and counted."""
    train, test = source.rows()
    envs = [thunk() for thunk in source.problems(train if split == "train" else test or (), renderer, limit, split)]
    return [env for env in envs if isinstance(env, MathWordEnv)]


@chz.chz
class MathTextBuilder(TaskBuilder):
    """Problems in JSONL files. The fields' defaults are those of MATH."""

    train_path: str = chz.field(doc="JSONL file to train on")
    test_path: str = chz.field(doc="JSONL file of the test set")
    question_field: str = chz.field(default="problem", doc="field with the question")
    solution_field: str = chz.field(default="solution", doc="field with the worked solution")
    prompt_template: str = chz.field(default="{question}", doc="what the user says; {question} is replaced")
    max_prompt_tokens: int | None = chz.field(
        default=None, validator=COUNT, doc="drop longer prompts; None = those that leave no room for max_tokens"
    )
    form: StepFormat = chz.field(default_factory=lambda: StepFormat(separator="\n", answer_marker=ANSWER), doc="of solutions")
    max_tokens: int = chz.field(default=768, validator=COUNT, doc="most tokens of a sampled solution")

    def train_queries(self, renderer: Renderer) -> Sequence[Query]:
        return self._queries(renderer, "train", self.num_train)

    def test_queries(self, renderer: Renderer) -> Sequence[Query]:
        return self._queries(renderer, "test", self.num_test)

    def _queries(self, renderer: Renderer, split: Split, limit: int | None) -> list[Query]:
        return as_queries(split, word_problems(self._source(renderer), renderer, split, limit), in_steps, self.max_tokens)

    def _source(self, renderer: Renderer) -> MathWordBuilder:
        return MathWordBuilder(
            train_path=self.train_path,
            test_path=self.test_path,
            question_field=self.question_field,
            answer_field=self.solution_field,
            answer_styles=("boxed",),
            prompt_template=self.prompt_template,
            bad_gold="drop",
            max_prompt_tokens=room_for_prompts(renderer, self.max_prompt_tokens, self.max_tokens),
        )
