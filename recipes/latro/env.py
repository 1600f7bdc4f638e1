"""LaTRO's environments: groups of rationales for a question (training), and graded whole responses
(evaluation).

The action in training is the whole sample, stop included; the rationale is a function of it. The
original gives the stop's tokens no gradient, so its policy gets no credit for where it stops.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import chz

from envs.problem_env import ProblemEnv, ProblemGroupBuilder
from posttrain.backend.errors import DataError
from posttrain.backend.ranges import COUNT
from posttrain.backend.types import ModelInput
from posttrain.renderers.turns import decode, encode
from posttrain.renderers.types import Message, Renderer, Tokenizer
from posttrain.tracking.datasets import ListDataset
from recipes.latro.tasks import Task, TaskBuilder
from rl.types import Action, Env, EnvGroupBuilder, Observation, RLDataset, RLDatasetBuilder, StepResult, StopCondition


def prompt_tokens(renderer: Renderer, task: Task) -> list[int]:
    """The prompt, rendered directly to ids so that it has at most one BOS."""
    return renderer.build_generation_prompt([Message(role="user", content=task.question)]).to_ints()


def answer_tokens(renderer: Renderer, answer: str) -> list[int]:
    """The answer and the end of the message, as tokens that follow the rationale."""
    end = renderer.get_stop_sequences()[0]
    return encode(renderer.tokenizer, answer) + (encode(renderer.tokenizer, end) if isinstance(end, str) else [end])


def tokens_before_stop(tokenizer: Tokenizer, tokens: Sequence[int], stops: Sequence[str]) -> tuple[int, bool]:
    """Number of `tokens` wholly before the earliest stop string, and whether there is one; all of
    them if not. Special tokens are stops by name, e.g. "<|endoftext|>"."""
    text = decode(tokenizer, tokens)
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    if not places:
        return len(tokens), False
    before, length = text[: min(places)], len(tokens)
    # few steps: the sampler stops right after a stop
    while not before.startswith(decode(tokenizer, tokens[:length])):
        length -= 1
    return length, True


def stop_strings(renderer: Renderer, stop_seqs: Sequence[str] = (), pad: bool = True) -> list[str]:
    """`stop_seqs`, the end of a message, EOS and, with `pad`, the padding token: distinct strings."""
    tokenizer = renderer.tokenizer
    ends = [stop if isinstance(stop, str) else decode(tokenizer, [stop]) for stop in renderer.get_stop_sequences()]
    special = [tokenizer.eos_token, tokenizer.pad_token if pad else None]
    return list(dict.fromkeys([*stop_seqs, *ends, *(str(token) for token in special if token)]))


@dataclass(frozen=True)
class RationaleGroup(EnvGroupBuilder):
    """`num_envs` rationales for one question; rl.likelihood_reward computes their rewards."""

    task: Task
    prompt: list[int]
    answer_tokens: list[int]
    stops: list[str]
    renderer: Renderer
    num_envs: int

    def rationale(self, action: Action) -> tuple[list[int], bool]:
        length, finished = tokens_before_stop(self.renderer.tokenizer, action, self.stops)
        return action[:length], finished

    async def make_envs(self) -> Sequence[Env]:
        return [RationaleEnv(self) for _ in range(self.num_envs)]


class RationaleEnv(Env):
    def __init__(self, group: RationaleGroup):
        self.group = group

    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        return ModelInput.from_ints(self.group.prompt), self.group.stops

    async def step(self, action: Action) -> StepResult:
        tokens, finished = self.group.rationale(action)
        text, task = decode(self.group.renderer.tokenizer, tokens), self.group.task
        metrics = {"finished": float(finished), "rationale_tokens": float(len(tokens)), **task.grader.describe(text)}
        logs = {"question": task.question, "gold": task.answer, "rationale": text}
        return StepResult(0.0, True, ModelInput.empty(), metrics=metrics, logs=logs)


class ResponseEnv(ProblemEnv):
    """One whole response. Reward 1 if right; `format` 1 if it has an answer."""

    async def step(self, action: Action) -> StepResult:
        result = await super().step(action)
        text = self.renderer.parse_response(action)[0]["content"]
        result.metrics["format"] = float(self.problem.grader.extract(text) is not None)
        del result.metrics["truncated"]
        result.reward = result.metrics["correct"]
        return result


@chz.chz
class LatentRationales(RLDatasetBuilder):
    """Groups of K rationales per question. Held out: the validation split of the training data."""

    tasks: TaskBuilder = chz.field(doc="the data set")
    response_length: int = chz.field(validator=COUNT, doc="maximum tokens of a rationale, and of an evaluated response")
    stop_seqs: tuple[str, ...] = chz.field(doc="texts that end a rationale, besides the end of the message")
    stop_at_pad: bool = chz.field(default=True, doc="the padding token ends a rationale too")

    def recommended_max_tokens(self) -> int:
        return self.response_length

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        train, validation = (self.groups(tasks, renderer) for tasks in self.tasks.split())
        held_out = ListDataset(responses(validation), 64, shuffle=False)
        return ListDataset(self.trained(train), self.batch_size, self.seed), held_out

    def trained(self, groups: list[RationaleGroup]) -> Sequence[EnvGroupBuilder]:
        return groups

    def groups(self, tasks: Sequence[Task], renderer: Renderer) -> list[RationaleGroup]:
        """A group per task whose prompt, longest rationale and answer fit the context. Prints the
        number dropped; DataError if none fits.
        """
        stops, limit = stop_strings(renderer, self.stop_seqs, self.stop_at_pad), renderer.tokenizer.model_max_length
        groups = [
            RationaleGroup(
                task,
                prompt_tokens(renderer, task),
                answer_tokens(renderer, task.answer),
                stops,
                renderer,
                self.group_size,
            )
            for task in tasks
        ]
        lengths = [len(group.prompt) + self.response_length + len(group.answer_tokens) for group in groups]
        kept = [group for group, length in zip(groups, lengths, strict=True) if length <= limit]
        needs = f"with response_length={self.response_length} and the answer"
        if not kept:
            raise DataError(
                f"no question fits: {needs} the shortest takes {min(lengths)} tokens of a context of {limit}"
            )
        if len(kept) < len(groups):
            print(
                f"{len(groups) - len(kept)} of {len(groups)} questions dropped: {needs} they take up to {max(lengths)} "
                f"of {limit} tokens"
            )
        return kept


@chz.chz
class VerifiedResponses(LatentRationales):
    """Groups of K whole responses per question instead, with reward 1 for the right answer."""

    def trained(self, groups: list[RationaleGroup]) -> Sequence[EnvGroupBuilder]:
        return responses(groups, self.group_size)


def responses(groups: Sequence[RationaleGroup], size: int = 1) -> list[ProblemGroupBuilder]:
    """The same questions, `size` whole responses each."""
    return [ProblemGroupBuilder(partial(ResponseEnv, group.task, group.renderer), size) for group in groups]
