"""The renderer protocol: messages to tokens for training and sampling, sampled tokens to a message."""

from collections.abc import Sequence
from enum import StrEnum
from typing import NotRequired, Protocol, TypedDict

from transformers import PreTrainedTokenizerBase

from posttrain.backend.types import ModelInput

Tokenizer = PreTrainedTokenizerBase


class Message(TypedDict):
    """`trainable` is read under TrainOnWhat.CUSTOMIZED and must be absent otherwise."""

    role: str
    content: str
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
