"""GSM8K: word problems in text, a line a step, the answer behind "####". The human solutions are the data set's own."""

from collections.abc import Sequence

import chz

from envs.math_word import Gsm8kBuilder as Gsm8kSource
from envs.math_word import MathWordEnv
from posttrain.backend.ranges import COUNT
from posttrain.renderers.types import Renderer
from preference.steps import StepFormat
from recipes.bstar.fitting import as_queries, room_for_prompts
from recipes.bstar.math_text import Split, word_problems
from recipes.bstar.tasks import Query, TaskBuilder


@chz.chz
class Gsm8kBuilder(TaskBuilder):
    """GSM8K, from `data_dir` or else from the hub."""

    data_dir: str | None = chz.field(default=None, doc="folder with train.jsonl and test.jsonl; None = openai/gsm8k of the hub")
    calculator_marks: bool = chz.field(default=False, doc="keep <<48/2=24>> in the human solutions")
    prompt_template: str = chz.field(default="{question}", doc="what the user says; {question} is replaced")
    max_prompt_tokens: int | None = chz.field(
        default=None, validator=COUNT, doc="drop longer prompts; None = those that leave no room for max_tokens"
    )
    form: StepFormat = chz.field(default_factory=lambda: StepFormat(separator="\n", answer_marker="####"), doc="of solutions")
    max_tokens: int = chz.field(default=320, validator=COUNT, doc="most tokens of a sampled solution")

    def train_queries(self, renderer: Renderer) -> Sequence[Query]:
        return self._queries(renderer, "train", self.num_train)

    def test_queries(self, renderer: Renderer) -> Sequence[Query]:
        return self._queries(renderer, "test", self.num_test)

    def _queries(self, renderer: Renderer, split: Split, limit: int | None) -> list[Query]:
        return as_queries(split, word_problems(self._source(renderer), renderer, split, limit), _solution, self.max_tokens)

    def _source(self, renderer: Renderer) -> Gsm8kSource:
        return Gsm8kSource(
            data_dir=self.data_dir,
            strip_marks=not self.calculator_marks,
            answer_styles=("hash",),
            prompt_template=self.prompt_template,
            max_prompt_tokens=room_for_prompts(renderer, self.max_prompt_tokens, self.max_tokens),
        )


def _solution(env: MathWordEnv) -> str:
    return env.solution.strip()
