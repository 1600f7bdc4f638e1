"""Programs to write, judged by their tests in the sandbox of envs/code.py, whose files these are.

The reward is the outcome's alone, as in the paper: set reward=outcome. A human solution is the reference program in a fenced block; a step is
a line, and the answer step the line that closes the block. Left out: partial credit, which a verifier of right and wrong has no use for.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import chz

from envs.code import CodeBuilder, CodeEnv, CodeProblem
from envs.problem_env import ProblemEnv, fit_prompts
from envs.sandbox import SandboxLimits
from posttrain.backend.ranges import COUNT, WHOLE
from posttrain.renderers.types import Renderer
from preference.steps import StepFormat
from recipes.bstar.fitting import as_queries, room_for_prompts
from recipes.bstar.tasks import Query, TaskBuilder


@chz.chz
class CodeTaskBuilder(TaskBuilder):
    """Problems in JSONL files, or, without `train_path`, the generated ones of envs/code.py."""

    train_path: str | None = chz.field(default=None, doc="JSONL file to train on; None = generated problems")
    test_path: str | None = chz.field(default=None, doc="JSONL file of the test set")
    num_test: int | None = chz.field(
        default=20, validator=WHOLE, doc="use only the first so many test problems; None = all of a file"
    )
    prompt_template: str = chz.field(default="{question}", doc="what the user says; {question} is replaced")
    limits: SandboxLimits = chz.field(default_factory=SandboxLimits, doc="what one run of a program may use")
    max_prompt_tokens: int | None = chz.field(
        default=None, validator=COUNT, doc="drop longer prompts; None = those that leave no room for max_tokens"
    )
    form: StepFormat = chz.field(default_factory=lambda: StepFormat(separator="\n", answer_marker="```"), doc="of solutions")
    max_tokens: int = chz.field(
        default=80, validator=COUNT, doc="most tokens of a sampled program; some hundreds for problems that people wrote"
    )

    def train_queries(self, renderer: Renderer) -> Sequence[Query]:
        return self._queries("train", self._source().problems()[0][: self.num_train], renderer)

    def test_queries(self, renderer: Renderer) -> Sequence[Query]:
        return self._queries("test", self._source().problems()[1], renderer)

    def _source(self) -> CodeBuilder:
        return CodeBuilder(
            train_path=self.train_path, test_path=self.test_path, num_test=self.num_test, split_seed=self.split_seed
        )

    def _queries(self, split: str, problems: Iterable[CodeProblem], renderer: Renderer) -> list[Query]:
        thunks = [partial(CodeEnv, each, renderer, self.limits, prompt_template=self.prompt_template) for each in problems]
        room = room_for_prompts(renderer, self.max_prompt_tokens, self.max_tokens)
        envs = [thunk() for thunk in fit_prompts(thunks, room, name=f"code {split}")]
        return as_queries(split, envs, in_a_block, self.max_tokens)


def in_a_block(env: ProblemEnv) -> str | None:
    """The reference program, where there is one."""
    program = env.reference_answer().rstrip()
    return f"```python\n{program}\n```" if program else None
