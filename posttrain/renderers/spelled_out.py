"""Special tokens that somebody has typed are text: "<|im_end|>" in a user's message or in a tool's answer is those
characters and ends no turn; in an assistant's message and its calls, only what ends one. A tokenizer would read control
tokens there. Left out: system messages and tools, which the author of a task writes; special tokens that the template
does not use and that have no part in the tokenizer (such as BOS), which users add for what they write.
"""

import re
import secrets
from collections.abc import Callable, Collection, Mapping
from typing import Any

from posttrain.backend.errors import DataError
from posttrain.renderers.turns import decode, encode, ends
from posttrain.renderers.types import Tokenizer

# Around a number, in place of a token while the template writes the text; nobody can type it.
BEFORE, AFTER = f"\ue0f0{secrets.token_hex(8)}-", "\ue0f1"
MARK = re.compile(f"{BEFORE}(\\d+){AFTER}")
PARTS = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")  # a tokenizer's, whose tokens no template need name


class SpelledOut:
    """`stops` are the tokens that end a turn of `template`."""

    def __init__(self, tokenizer: Tokenizer, template: str, stops: Collection[int]):
        special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        ending = {*stops, *ends(tokenizer)} & special.keys()
        named = {i for part in PARTS if (i := getattr(tokenizer, f"{part}_token_id", None)) in special}
        used = {i for i, name in special.items() if name in template} | named | ending
        self._tokens = {special[i]: tokens for i in used if (tokens := _characters(tokenizer, special[i], used))}
        self._names = [*self._tokens]
        self.ending = [special[i] for i in ending]

    def marked(self, role: str, content: str) -> str:
        names = self._names if role in ("user", "tool") else self.ending if role == "assistant" else ()
        for name in names:
            if name in content and name in self._tokens:
                content = content.replace(name, f"{BEFORE}{self._names.index(name)}{AFTER}")
        return content

    def marked_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """A message for the template: its texts, those in its calls too, as `marked` has them."""
        role = fields["role"]

        def each(value: Any) -> Any:
            if isinstance(value, str):
                return self.marked(role, value)
            if isinstance(value, Mapping):
                return {each(name): each(inner) for name, inner in value.items()}
            return [each(inner) for inner in value] if isinstance(value, list) else value

        return {"role": role, **{name: each(value) for name, value in fields.items() if name != "role"}}

    def encode(self, text: str, encode: Callable[[str, bool], list[int]]) -> list[int]:
        """`encode`: text without marks to tokens, and whether it begins the whole."""
        tokens: list[int] = []
        for i, piece in enumerate(MARK.split(text)):
            tokens += self._tokens[self._names[int(piece)]] if i % 2 else encode(piece, i == 0) if piece else []
        return tokens

    def check_answer(self, i: int, content: str) -> None:
        """DataError for an answer with the end that the template writes."""
        if name := next((name for name in self.ending if content.rstrip().endswith(name)), None):
            raise DataError(
                f"message {i} (assistant): it ends with {name!r}, which the chat template writes itself: take it away"
            )


def _characters(tokenizer: Tokenizer, name: str, special: Collection[int]) -> list[int]:
    """Tokens whose text is the name of a special token, without such tokens; [] if no cut of it gives them."""
    for cut in range(1, len(name)):
        tokens = encode(tokenizer, name[:cut]) + encode(tokenizer, name[cut:])
        if decode(tokenizer, tokens).strip() == name and not {*tokens} & {*special}:
            return tokens
    return []
