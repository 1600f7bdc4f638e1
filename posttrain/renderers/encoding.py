"""Text to tokens, remembered: each turn of a conversation renders all turns before it again, and a
chat template's mask two prefixes per message. Left out: tokenizers that change after the renderer is made.
"""

from array import array

from posttrain.renderers.turns import encode
from posttrain.renderers.types import Tokenizer

MOST_CHARS = 1 << 26  # of remembered text; with its tokens mostly 130 MB


class Encoder:
    """`encode` of a tokenizer. Forgets everything once it holds MOST_CHARS. A pickled copy begins empty."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._tokens: dict[tuple[str, bool], array[int]] = {}
        self._chars = 0

    def __reduce__(self) -> tuple[type, tuple[Tokenizer]]:
        return type(self), (self.tokenizer,)

    def __call__(self, text: str, begins: bool = False) -> list[int]:
        key = text, begins
        if key not in self._tokens:
            if self._chars >= MOST_CHARS:
                self._tokens, self._chars = {}, 0
            self._tokens[key] = array("i", encode(self.tokenizer, text, begins))
            self._chars += len(text)
        return self._tokens[key].tolist()

    def parts(self, text: str, end: str) -> list[int]:
        """The tokens of a text, encoded part by part. Each part but the last ends with the special
        token `end`, and is encoded after the one before it, as in the whole text."""
        parts, tokens = text.split(end), []
        for i, part in enumerate(parts):
            follows, ends = i > 0, i < len(parts) - 1
            tokens += self(end * follows + part + end * ends, begins=True)[follows:]
        return tokens


def separates(tokenizer: Tokenizer, token: int) -> bool:
    """Whether a text may be encoded in parts that end with this special token."""
    added = tokenizer.added_tokens_decoder
    if not tokenizer.is_fast or token not in added:
        return False
    end = added[token]
    within = any(end.content in other.content for i, other in added.items() if i != token)
    return end.special and not (end.normalized or end.single_word or within)
