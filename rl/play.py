"""A person plays an environment in the terminal, with the model's observations, rewards, metrics
and limits (rl/rollouts.py). One attempt per problem; the seats of a game take turns. A backslash at
the end of a line continues it; Ctrl-D ends. A saved model has the other seats of a game as the
environment's opponent. Left out: time limits on calls.

  python -m rl.play env=guess_number
  python -m rl.play env=textarena env.opponent=runs/multiplayer env.group_size=1 model_name=small
  python -m rl.play env=my_package.my_module:MyBuilder split=test limits.max_turns=5
"""

# run as a file, this folder is first on the path, and its types.py would shadow the standard one
if not __package__:
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Literal

import chz

from posttrain.backend.ranges import COUNT, WHOLE
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.types import ModelInput, SampledSequence, SampleResponse, SamplingParams
from posttrain.renderers import get_renderer
from posttrain.renderers.turns import decode, encode, eos
from posttrain.renderers.types import Tokenizer
from posttrain.tracking.command_line import by_name, run_command
from rl import step_checks
from rl.names import ENVS
from rl.rollouts import Policy, RolloutLimits, add_group_rewards, do_single_rollout, make_envs, raise_first
from rl.types import (
    Action,
    Env,
    EnvGroupBuilder,
    EpisodeEnd,
    Metrics,
    Observation,
    RLDatasetBuilder,
    RolloutError,
    StepResult,
    StopCondition,
    TrajectoryGroup,
)

PATIENCE = 1e9  # seconds that a call may take: a person thinks, and the other seat waits


@chz.chz
class Config:
    """Play an environment as the model would."""

    env: RLDatasetBuilder = chz.field(default_factory=by_name(ENVS["arithmetic"]), doc="builder of the environments")
    split: Literal["train", "test"] = chz.field(default="train", doc="training or held-out problems")
    batch: int = chz.field(default=0, validator=WHOLE, doc="batch of the dataset to begin with")
    episodes: int | None = chz.field(
        default=None, validator=COUNT, doc="end after so many problems or games; None = until the end of the input"
    )
    model_name: str = chz.field(default="tiny", doc="model of the tokenizer and context")
    max_length: int | None = chz.field(
        default=None, validator=COUNT, doc="context in tokens; None = the model's own, at most 4096"
    )
    renderer_name: str | None = chz.field(
        default=None, doc="role_colon, chat_template or plain; None = the model's own"
    )
    max_tokens: int | None = chz.field(
        default=None, validator=COUNT, doc="most tokens per turn; None = what the environment recommends"
    )
    limits: RolloutLimits = chz.field(default_factory=RolloutLimits, doc="when an episode is cut short")


class EndOfInput(Exception):
    """The person has left."""


class Person(SamplingClient):
    """A sampler that shows the prompt and reads the answer from the terminal. A prompt that fills
    the context raises, as for the model."""

    def __init__(self, tokenizer: Tokenizer, seat: str):
        self._tokenizer, self.max_length, self.seat = tokenizer, tokenizer.model_max_length, seat
        self.vocabulary = len(tokenizer)
        self.seen: list[int] = []  # the last prompt and the answer to it

    async def sample_async(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
    ) -> SampleResponse:
        tokens = prompt.to_ints()
        room = self._check(tokens, num_samples)
        limit = min(room, sampling_params.max_tokens or room)
        known = len(self.seen) if tokens[: len(self.seen)] == self.seen else 0
        print(f"\n--- {self.seat}{len(tokens)} tokens so far, answer in at most {limit} " + "-" * 20)
        print(decode(self._tokenizer, tokens[known:]))
        answer = answer_tokens(self._tokenizer, read_answer(), sampling_params.stop)
        if len(answer) > limit:
            print(f"(cut off: {len(answer)} tokens, the stop included)")
        self.seen = tokens + answer[:limit]
        stop_reason = "length" if len(answer) > limit else "stop"
        return SampleResponse([SampledSequence(answer[:limit], [0.0] * len(answer[:limit]), stop_reason)])


def read_answer() -> str:
    """Lines up to the first without a final backslash. Blocks the event loop, which is idle."""
    lines = [_line()]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\")
        lines.append(_line())
    return "\n".join(lines)


def _line() -> str:
    try:
        return input("> ")
    except EOFError:
        print()
        raise EndOfInput from None


def answer_tokens(tokenizer: Tokenizer, text: str, stop: StopCondition | str) -> list[int]:
    """The text as a model would have sampled it, with the stop; the text may already end with the
    stop's beginning ("]" of "]\\n")."""
    stops = eos(tokenizer) if stop is None else [stop] if isinstance(stop, str) else list(stop)
    if not stops:  # never stops
        return encode(tokenizer, text)
    ending = stops[0]
    if isinstance(ending, int):
        return [token for token in encode(tokenizer, text) if token != ending] + [ending]
    held = max(n for n in range(len(ending) + 1) if text.endswith(ending[:n]))
    return encode(tokenizer, text.split(ending)[0] + ending if ending in text else text + ending[held:])


class ShownEnv(Env):
    """Prints each step. Logs may give the answer away and are printed at the end."""

    def __init__(self, env: Env, seat: str):
        self.env, self.seat = env, seat
        self.logs: dict[str, str] = {}

    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        return await self.env.initial_observation()

    async def step(self, action: Action) -> StepResult:
        step: Callable[..., Awaitable[StepResult]] = self.env.step
        result = await step(
            action, **({"extra": {"stop_reason": "stop"}} if step_checks.takes_extra(type(self.env)) else {})
        )
        self.logs |= result.logs
        print(f"{self.seat}reward {result.reward:g}{_listed(result.metrics)}")
        if result.episode_done:
            self._end("done")
        return result

    async def cut_short(self, reason: EpisodeEnd) -> tuple[float, Metrics]:
        reward, metrics = await self.env.cut_short(reason)
        print(f"{self.seat}reward {reward:g} more{_listed(metrics)}")
        self._end(f"cut short: {reason}")
        return reward, metrics

    def _end(self, how: str) -> None:
        print(
            f"{self.seat}end of the episode ({how})" + "".join(f"; {name}: {text}" for name, text in self.logs.items())
        )

    async def close(self) -> None:
        await self.env.close()


def _listed(metrics: Metrics) -> str:
    return "".join(f", {name} {value:g}" for name, value in metrics.items())


async def play_group(
    builder: EnvGroupBuilder, tokenizer: Tokenizer, max_tokens: int, limits: RolloutLimits
) -> list[float]:
    """One problem, or one game with all its seats. Returns the total rewards."""
    try:
        return await _play_group(builder, tokenizer, max_tokens, limits)
    finally:
        await builder.cleanup()


async def _play_group(
    builder: EnvGroupBuilder, tokenizer: Tokenizer, max_tokens: int, limits: RolloutLimits
) -> list[float]:
    envs_G = await make_envs(builder, limits)
    if builder.members_are_independent:
        for env in envs_G[1:]:
            await env.close()
        envs_G = envs_G[:1]
    seats_G = [f"seat {g}: " if len(envs_G) > 1 else "" for g in range(len(envs_G))]
    try:
        async with asyncio.TaskGroup() as tasks:
            players = [
                tasks.create_task(
                    do_single_rollout(Policy(Person(tokenizer, seat), max_tokens), ShownEnv(env, seat), (g,), limits)
                )
                for g, (env, seat) in enumerate(zip(envs_G, seats_G, strict=True))
            ]
    except BaseExceptionGroup as errors:
        raise_first(errors)
    played_G = [player.result() for player in players]
    group = TrajectoryGroup([*played_G], [0.0] * len(envs_G), [{} for _ in envs_G], builder=builder)
    try:
        await add_group_rewards(group, envs_G, limits)
        if group.errors:
            raise group.errors[0]
    except RolloutError as error:
        if len(envs_G) > 1:
            raise
        print(f"without the group's rewards, of which a single attempt has none: {error}")
        group = TrajectoryGroup(played_G, [0.0], [{}])
    rewards_G = group.get_total_rewards()
    for seat, reward, metrics in zip(seats_G, rewards_G, group.metrics_G, strict=True):
        print(f"{seat}total reward {reward:g}{_listed(metrics)}")
    return rewards_G


async def play(config: Config) -> None:
    tokenizer = load_tokenizer(config.model_name, config.max_length)
    renderer = get_renderer(config.renderer_name, tokenizer)
    if config.split == "train":
        dataset, batches = (await step_checks.datasets(config.env, renderer))[0], count(config.batch)
    else:
        dataset = await step_checks.held_out(config.env, renderer)
        batches = range(config.batch, len(dataset))
    builders = (builder for batch in batches for builder in step_checks.batch(dataset, batch))
    limits = chz.replace(config.limits, env_seconds=PATIENCE, sampling_seconds=PATIENCE)
    rewards: list[float] = []
    try:
        for _, builder in zip(range(config.episodes or 2**62), builders, strict=False):
            rewards += await play_group(
                builder, tokenizer, config.max_tokens or config.env.recommended_max_tokens(), limits
            )
    except EndOfInput:
        pass
    mean = f", mean reward {sum(rewards) / len(rewards):g}" if rewards else ""
    print(f"{len(rewards)} episodes played{mean}")


def main() -> None:
    run_command(play, Config, {"env": ENVS})


if __name__ == "__main__":
    main()
