"""One prompt, one answer, no verifier: the episode whose reward comes from someone who reads the
answer (pairwise.py, reward_model_env.py).

reward = what the group's judge or model says + format_coef * (format - 1), where format is 1 if the
answer ended by itself. Where a rule knows how good an answer truly is, its verdict is the metric
`gold` (the term of Gao et al. 2022), which no reward sees.
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
    """Keeps the answer for those who score it: `completion`, None until it is there."""

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
    found_G = [env.completion for env in envs_G if isinstance(env, CompletionEnv) and env.completion is not None]
    assert len(found_G) == len(envs_G), "only finished CompletionEnvs have answers to score"
    return found_G


@chz.chz
class PromptsBuilder:
    """Configuration that builds prompts: those to train on, and held-out ones."""

    def __call__(self) -> tuple[list[Prompt], list[Prompt]]:
        raise NotImplementedError

    def gold(self) -> GoldReward | None:
        """The rule that knows how good an answer is, if there is one."""
        return None


@chz.chz
class ComparisonPrompts(PromptsBuilder):
    """The prompts of a set of comparisons, each once. Where some are equal, a line says how
    many.
    """

    comparisons: ComparisonDatasetBuilder = chz.field(doc="builder of the comparisons; their answers are not read")

    def __call__(self) -> tuple[list[Prompt], list[Prompt]]:
        train_D, test_D = self.comparisons()
        return _distinct_prompts(train_D, "training"), _distinct_prompts(test_D, "held-out")


def _distinct_prompts(labeled_D: Sequence[LabeledComparison], name: str) -> list[Prompt]:
    prompts = {
        content_hash(list(one.comparison.prompt_conversation)): one.comparison.prompt_conversation for one in labeled_D
    }
    if len(prompts) < len(labeled_D):
        print(f"{len(labeled_D)} {name} comparisons are of {len(prompts)} different prompts: each is asked once")
    return list(prompts.values())
