"""Classic environments of the verifiers library (0.1: `load_environment`, vf.Environment, rubrics) in
this process. They run and score themselves; the policy is their client. Imported by
verifiers_adapter.py only, for it needs the library. Tested with 0.1.14.

Left out: rewards of a whole group, completion environments (`message_type="completion"`).
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# (verifiers is an extra, and usually the later version)

import importlib.util
import inspect
import json
import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import wraps
from typing import Any

import verifiers as vf
from openai.types.chat import ChatCompletion
from verifiers.clients.openai_chat_completions_client import OpenAIChatCompletionsClient

from envs.verifiers_calls import Answerer, EpisodeFailed, chat_completion

_RAISED: ContextVar[list[str]] = ContextVar("raised")  # by the rewards of this task's episode


class PolicyClient(OpenAIChatCompletionsClient):
    """Asks the Answerer of its episode."""

    def __init__(self, answerer: Answerer):
        super().__init__(None)  # type: ignore[arg-type]
        self.answerer = answerer

    async def get_native_response(
        self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **_: Any
    ) -> Any:
        message = await self.answerer(prompt, tools or [])
        if message is None:
            raise vf.OverlongPromptError("a limit of the run")
        return ChatCompletion.model_validate(chat_completion(message, model))

    async def raise_from_native_response(self, response: Any) -> None:
        """An empty answer is the policy's, and is scored."""


class ClassicHost:
    """An environment of the library with the first `limit` rows of its training data. Any exception
    of the library may come out of the constructor."""

    def __init__(self, environment: str, arguments: Mapping[str, Any], limit: int):
        logging.getLogger("verifiers").setLevel(logging.CRITICAL)
        name = environment.split("@")[0].split("/")[-1].replace("-", "_")
        if importlib.util.find_spec(name) is None:  # the library's own error does not tell it from a broken package
            raise ModuleNotFoundError(f"No module named {name!r}")
        self.env = vf.load_environment(name, **arguments)
        if getattr(self.env, "message_type", "chat") != "chat":
            raise ValueError("it completes texts; only chats are supported")
        if self.env.requires_group_rollouts:
            raise ValueError("it scores a group as a whole, which is not supported")
        self.tasks = self.env.get_dataset(limit).to_list()
        for rubric in _rubrics(self.env.rubric):
            rubric.funcs = [_noting(function) for function in rubric.funcs]

    def content(self, index: int) -> str:
        """The row without its number."""
        return json.dumps(self.tasks[index] | {"example_id": None}, sort_keys=True, default=str)

    async def open(self) -> None:
        """Nothing to start."""

    async def play(self, index: int, answerer: Answerer) -> tuple[float, dict[str, float]]:
        """One episode: its reward, and each reward function's value. EpisodeFailed where the
        environment or a reward function raised; the library would score 0."""
        _RAISED.set(raised := [])
        state = await self.env.rollout(self.tasks[index], PolicyClient(answerer), "policy", {})
        if state["error"] is not None:
            raise EpisodeFailed(f"{type(state['error']).__name__}: {state['error']}")
        try:
            await self.env.rubric.score_rollout(state)
        finally:
            await self.env.rubric.cleanup(state)
        if raised:
            raise EpisodeFailed("; ".join(raised[:2]))
        return float(state["reward"]), {name: float(value) for name, value in (state["metrics"] or {}).items()}


def _rubrics(rubric: Any) -> list[Any]:
    """The rubric and those it is composed of."""
    return [rubric, *(inner for part in getattr(rubric, "rubrics", []) for inner in _rubrics(part))]


def _noting(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reward function whose exceptions are remembered: the library scores them 0."""

    def note(error: Exception) -> None:
        _RAISED.get().append(f"the reward {getattr(function, '__name__', function)}: {type(error).__name__}: {error}")

    async def later(value: Any) -> Any:
        try:
            return await value
        except Exception as error:
            note(error)
            raise

    @wraps(function)
    def noted(*args: Any, **kwargs: Any) -> Any:
        try:
            value = function(*args, **kwargs)
        except Exception as error:
            note(error)
            raise
        return later(value) if inspect.isawaitable(value) else value

    return noted
