"""Shared by the renderers: the messages that are trained on, their weights, and the end of a
sampled message. A message is a header (the role) and an output (the text and its end). Outputs
carry loss; headers only under ALL_TOKENS.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

from posttrain.backend.errors import ConfigError, DataError
from posttrain.renderers.parts import get_text_content
from posttrain.renderers.types import Message, Tokenizer, TrainOnWhat


@dataclass(frozen=True)
class Turn:
    """One message in tokens."""

    header: list[int]
    output: list[int]


ANCHORS = ("\n", ".", "0")  # what a continued text may follow


def encode(tokenizer: Tokenizer, text: str, begins: bool = False) -> list[int]:
    """Tokens of a part of a text: no BOS or EOS, no truncation. Some tokenizers (Llama 2, Mistral) put a
    space before each text: here only before one that `begins`, not before its continuation."""
    if text and not begins and _puts_space(tokenizer):
        for before in ANCHORS:
            start, whole = _alone(tokenizer, before), _alone(tokenizer, before + text)
            if whole[: len(start)] == start:
                return whole[len(start) :]
    return _alone(tokenizer, text)


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a whole text, after BOS if the tokenizer's texts begin with it; not after two."""
    tokens, start = encode(tokenizer, text, begins=True), bos(tokenizer)
    return tokens if tokens[: len(start)] == start else start + tokens


@lru_cache(maxsize=16)
def _puts_space(tokenizer: Tokenizer) -> bool:
    """As SentencePiece and GPT-2 write a space in a token."""
    first = "".join(tokenizer.convert_ids_to_tokens(_alone(tokenizer, "a"))[:1])
    return first.startswith(("▁", "Ġ"))


def _alone(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text unchanged: with special tokens, spaces not cleaned up."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def before_others(tokenizer: Tokenizer) -> list[int]:
    """Tokens to decode before others that follow a text: some tokenizers drop the space before a first word."""
    return encode(tokenizer, ".") if _puts_space(tokenizer) else []


def continuation(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of tokens that follow others, with the space before a first word."""
    before = before_others(tokenizer)
    return decode(tokenizer, [*before, *tokens])[len(decode(tokenizer, before)) :]


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text by itself, with its space."""
    return continuation(tokenizer, [token])


def text_of(message: Message) -> str:
    """The text of a message for a renderer that knows text alone. DataError for a message of parts
    written by hand, whose thinking or calls would be lost."""
    if not message["content"] and any(part["type"] != "text" for part in message.get("parts", ())):
        raise DataError(
            f"the {message['role']}'s message has thinking or tool calls, which renderer_name=chat_template can write"
        )
    return message["content"] or get_text_content(message)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((t for t, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def bos(tokenizer: Tokenizer) -> list[int]:
    """[BOS] if the tokenizer's texts begin with it, else []."""
    first = tokenizer.encode("a")[:1]
    return first if first == [tokenizer.bos_token_id] else []


def eos(tokenizer: Tokenizer) -> list[int]:
    """[EOS] if the tokenizer has one, else []."""
    return [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []


def ends(tokenizer: Tokenizer) -> list[int]:
    """EOS, and the other tokens at which samplers stop by the model's configs (Qwen 2.5's <|endoftext|>)."""
    return [*eos(tokenizer), *getattr(tokenizer, "answer_ends", ())]


def trained_messages(messages: Sequence[Message], train_on_what: TrainOnWhat) -> list[bool]:
    """Whether each message carries loss. DataError if none does, or if `trainable` marks and
    `train_on_what` disagree."""
    if not messages:
        raise DataError("a conversation without messages")
    if train_on_what not in [*TrainOnWhat]:
        raise ConfigError(f"train_on_what={train_on_what!r:.80} must be one of {', '.join(TrainOnWhat)}")
    customized = train_on_what == TrainOnWhat.CUSTOMIZED
    for i, message in enumerate(messages):
        if customized != ("trainable" in message):
            need = "needs" if customized else "must not have"
            raise DataError(
                f"message {i} ({message['role']}) {need} a 'trainable' mark under train_on_what={train_on_what}"
            )
    roles = [message["role"] for message in messages]
    match train_on_what:
        case TrainOnWhat.LAST_ASSISTANT_MESSAGE:
            if roles[-1] != "assistant":
                raise DataError(
                    f"the last message is the {roles[-1]}'s: nothing to train on with train_on_what={train_on_what}"
                )
            trained = [False] * (len(roles) - 1) + [True]
        case TrainOnWhat.ALL_ASSISTANT_MESSAGES:
            trained = [role == "assistant" for role in roles]
        case TrainOnWhat.ALL_USER_AND_SYSTEM_MESSAGES:
            trained = [role in ("user", "system") for role in roles]
        case TrainOnWhat.CUSTOMIZED:
            trained = [bool(message.get("trainable")) for message in messages]
        case _:
            trained = [True] * len(roles)
    if not any(trained):
        raise DataError(f"no message to train on: the roles are {', '.join(roles)} and train_on_what={train_on_what}")
    return trained


def supervised_example(
    start: list[int], turns: Sequence[Turn], messages: Sequence[Message], train_on_what: TrainOnWhat
) -> tuple[list[int], list[float]]:
    """`start` (BOS or nothing) and the turns as one sequence, with a weight for each token."""
    everything = float(train_on_what == TrainOnWhat.ALL_TOKENS)
    tokens, weights = list(start), [everything] * len(start)
    for turn, trained in zip(turns, trained_messages(messages, train_on_what), strict=True):
        tokens += turn.header + turn.output
        weights += [everything] * len(turn.header) + [float(trained)] * len(turn.output)
    return tokens, weights


def cut_at_stop(
    tokenizer: Tokenizer, tokens: Sequence[int], stop_ids: Collection[int], stop_text: str | None = None
) -> tuple[str, bool]:
    """The text before the stop, and whether there is one. ConfigError for two stops: sampling did
    not stop at the first."""
    pieces: list[list[int]] = [[]]
    for token in tokens:
        if token in stop_ids:
            pieces.append([])
        else:
            pieces[-1].append(token)
    texts = [decode(tokenizer, piece) for piece in pieces]
    stops = len(pieces) - 1 + (sum(text.count(stop_text) for text in texts) if stop_text else 0)
    if stops > 1:
        raise ConfigError(f"{stops} stops in one response: sample with stop=renderer.get_stop_sequences()")
    return texts[0].split(stop_text)[0] if stop_text else texts[0], stops == 1
