"""One prompt, one answer, no verifier: a judge or reward model scores it (pairwise.py,
reward_model_env.py).

reward = score of the group's judge or model + format_coef * (format - 1). format is 1 if the answer
was not truncated. Where a rule knows the true reward, it is the metric `gold` (the term of Gao et
al. 2022), which no reward reads.
"""

from collections.abc import Callable, Sequence

import chz

from posttrain.backend.types import ModelInput
from posttrain.renderers.types import Message, Renderer
from preference.comparisons import content_hash
from preference.types import ComparisonDatasetBuilder, LabeledComparison
from rl.types import Action, Env, Observation, StepResult, StopCondition

Prompt = Sequence[Message]
GoldReward = Callable[[Prompt, str], float]


class CompletionEnv(Env):
    """Keeps the answer for the judge as `completion`; None before the step."""

    def __init__(self, prompt: Prompt, renderer: Renderer, format_coef: float, gold: GoldReward | None = None):
        self.prompt, self.renderer, self.format_coef, self.gold = prompt, renderer, format_coef, gold
        self.completion: list[Message] | None = None

    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        return self.renderer.build_generation_prompt(self.prompt), self.renderer.get_stop_sequences()

    async def step(self, action: Action) -> StepResult:
        message, ended = self.renderer.parse_response(action)
        self.completion = [message]
        metrics = {"format": float(ended)}
        if self.gold is not None:
            metrics["gold"] = self.gold(self.prompt, message["content"])
        reward = self.format_coef * (float(ended) - 1)
        return StepResult(reward, True, ModelInput.empty(), metrics=metrics, logs={"answer": message["content"]})


def completions(envs_G: Sequence[Env]) -> list[list[Message]]:
    """The answers of a group's finished environments."""
    answers_G = [env.completion for env in envs_G if isinstance(env, CompletionEnv) and env.completion is not None]
    assert len(answers_G) == len(envs_G), "only finished CompletionEnvs have answers to score"
    return answers_G


@chz.chz
class PromptsBuilder:
    """Configuration that builds training and held-out prompts."""

    def __call__(self) -> tuple[list[Prompt], list[Prompt]]:
        raise NotImplementedError

    def gold(self) -> GoldReward | None:
        """The rule that knows the true reward, if there is one."""
        return None


@chz.chz
class ComparisonPrompts(PromptsBuilder):
    """The distinct prompts of a set of comparisons. Prints a line where some are equal."""

    comparisons: ComparisonDatasetBuilder = chz.field(doc="builder of the comparisons; their answers are not read")

    def __call__(self) -> tuple[list[Prompt], list[Prompt]]:
        train_D, test_D = self.comparisons()
        return _distinct_prompts(train_D, "training"), _distinct_prompts(test_D, "held-out")


def _distinct_prompts(labeled_D: Sequence[LabeledComparison], name: str) -> list[Prompt]:
    conversations_D = [labeled.comparison.prompt_conversation for labeled in labeled_D]
    prompts = {content_hash(list(conversation)): conversation for conversation in conversations_D}
    if len(prompts) < len(labeled_D):
        print(f"{len(labeled_D)} {name} comparisons are of {len(prompts)} different prompts: each is used once")
    return list(prompts.values())
