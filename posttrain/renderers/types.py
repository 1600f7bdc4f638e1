"""Messages and their parts, and the renderer protocol: messages to tokens for training and
sampling, sampled tokens to a message.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, NotRequired, Protocol, TypedDict

from posttrain.backend.types import ModelInput

if TYPE_CHECKING:  # commands answer before transformers is imported
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any


class TextPart(TypedDict):
    type: Literal["text"]
    text: str


class ThinkingPart(TypedDict):
    type: Literal["thinking"]
    thinking: str


class ToolCallPart(TypedDict):
    """`id` as the model wrote it, or one that counts the calls of a message."""

    type: Literal["tool_call"]
    id: str
    name: str
    arguments: dict[str, Any]


class UnparsedToolCallPart(TypedDict):
    """A call that cannot be read: its text, the reason, and the tool's name where that is known."""

    type: Literal["unparsed_tool_call"]
    id: str
    name: str
    text: str
    error: str


Part = TextPart | ThinkingPart | ToolCallPart | UnparsedToolCallPart


class ToolSpec(TypedDict):
    """A tool as the model sees it; `parameters` is the JSON schema of an object."""

    name: str
    description: str
    parameters: dict[str, Any]


class Message(TypedDict):
    """`content` of a sampled message is the text that the model wrote, markup included; `parts` is
    the same, taken apart, where it is more than text. A message written by hand may consist of
    parts alone, with an empty `content`. `name` and `tool_call_id` belong to a tool's answer.
    `trainable` is read under TrainOnWhat.CUSTOMIZED and must be absent otherwise."""

    role: str
    content: str
    parts: NotRequired[list[Part]]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]
    trainable: NotRequired[bool]


class TrainOnWhat(StrEnum):
    """Which tokens of a conversation get weight 1."""

    LAST_ASSISTANT_MESSAGE = "last_assistant_message"
    ALL_ASSISTANT_MESSAGES = "all_assistant_messages"
    ALL_MESSAGES = "all_messages"
    ALL_TOKENS = "all_tokens"
    ALL_USER_AND_SYSTEM_MESSAGES = "all_user_and_system_messages"
    CUSTOMIZED = "customized"


class Renderer(Protocol):
    """The contract of tinker_semantics 2.6."""

    tokenizer: Tokenizer

    @property
    def has_extension_property(self) -> bool:
        """Whether every prompt of turn k+1 starts with the prompt and action of turn k."""
        ...

    def build_generation_prompt(
        self, messages: Sequence[Message], role: str = "assistant", prefill: str | None = None
    ) -> ModelInput:
        """The tokens to sample from, up to the text of `role`, plus `prefill`."""
        ...

    def build_supervised_example(
        self, messages: Sequence[Message], train_on_what: TrainOnWhat = TrainOnWhat.ALL_ASSISTANT_MESSAGES
    ) -> tuple[list[int], list[float]]:
        """Tokens and their weights. DataError if all weights are 0."""
        ...

    def get_stop_sequences(self) -> list[str] | list[int]:
        """Stop sequences of a sampled message."""
        ...

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        """The sampled message, and whether it ended with its stop. Raises for two stops."""
        ...
