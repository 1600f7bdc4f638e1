"""Steps of a solution: character spans of its text, mapped to tokens by decoding (never by step-end
ids). A separator belongs to the step it ends, stop tokens to the last step: the spans cover the
text and the token ranges the response. A solution is malformed if it is truncated or lacks its
answer; it still has steps. Left out: steps found by a parser of the language.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import chz

from posttrain.backend.errors import ConfigError
from posttrain.renderers.stream import TokenText
from posttrain.renderers.turns import decode
from posttrain.renderers.types import Renderer, Tokenizer

Span = tuple[int, int]  # characters [start, end) of a text
Malformed = Literal["truncated", "empty", "no_answer"]
BLOCK = 32  # tokens that are decoded at once


@chz.chz
class StepFormat:
    """The format of solutions. B-STaR's: separator="\\n\\n" answer_marker="# Answer"."""

    separator: str = chz.field(default="\n", doc="the end of a step")
    answer_marker: str = chz.field(
        default="", doc="what the last step of a whole solution begins with; empty = anything"
    )

    def spans(self, text: str) -> list[Span]:
        """Spans of the steps, without gaps. Blank steps join neighbours; a blank text has none."""
        if not self.separator:
            raise ConfigError("separator must not be empty")
        ends = [match.end() for match in re.finditer(re.escape(self.separator), text)]
        bounds = [0]
        for end in [*ends, len(text)]:
            if text[bounds[-1] : end].strip():
                bounds.append(end)
            elif len(bounds) > 1:
                bounds[-1] = end
        return list(zip(bounds[:-1], bounds[1:], strict=True))

    def strings(self, text: str) -> list[str]:
        """The steps without their separators."""
        return [text[start:end].replace(self.separator, "") for start, end in self.spans(text)]

    def malformed(self, text: str, ended: bool) -> Malformed | None:
        """The defect of a response's form, if any; `ended` is False if it was truncated."""
        steps = self.strings(text)
        if not ended:
            return "truncated"
        if not steps:
            return "empty"
        return None if steps[-1].startswith(self.answer_marker) else "no_answer"


@dataclass(frozen=True)
class StepTokens:
    """Step k is `tokens[bounds[k] : bounds[k + 1]]`; `strings[k]` lacks the separator. `text` has all of them, with
    the blank lines between."""

    tokens: list[int]
    text: str
    strings: list[str]
    bounds: list[int]
    malformed: Malformed | None

    @property
    def last_tokens(self) -> list[int]:
        """Index of the last token of each step, where its score is read."""
        return [end - 1 for end in self.bounds[1:]]


def split_response(tokens: Sequence[int], renderer: Renderer, form: StepFormat) -> StepTokens:
    """The steps of a sampled response, stop token included."""
    message, ended = renderer.parse_response(tokens)
    text, whole = message["content"], decode(renderer.tokenizer, tokens)
    start = whole.find(text)  # a renderer may strip what comes before and after
    spans = form.spans(text)
    inner = _tokens_up_to(renderer.tokenizer, list(tokens), [start + end for _, end in spans[:-1]])
    bounds = [0, *inner, len(tokens)] if spans else [0]
    return StepTokens(list(tokens), text, form.strings(text), bounds, form.malformed(text, ended))


def _tokens_up_to(tokenizer: Tokenizer, tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Number of tokens in the first `end` characters, for each end. A token across a border belongs to the
    step in which it begins. Blocks are decoded: prefixes would take time with the square of the length."""
    text, blocks, characters = TokenText(tokenizer), [], 0
    for start in range(0, len(tokens), BLOCK):
        before, begins = text.given, start - len(text.waiting)
        piece = text.feed(tokens[start : start + BLOCK])
        if not piece and start + BLOCK >= len(tokens):  # a response that is cut off in a character
            piece = text.close()
        if piece:
            blocks.append(
                (characters := characters + len(piece), piece, before, tokens[begins : start + BLOCK], begins)
            )
    counts = []
    for end in ends:
        place = bisect_left(blocks, end, key=lambda block: block[0])
        if place == len(blocks):  # in half a character at the end
            counts.append(len(tokens))
            continue
        reached, piece, before, block, begins = blocks[place]
        counts.append(begins + _within(tokenizer, block, before, end - (reached - len(piece)), piece.isascii()))
    return counts


def _within(tokenizer: Tokenizer, block: list[int], before: list[int], end: int, ascii_only: bool) -> int:
    """Number of a block's tokens in its first `end` characters; `before` are the tokens before it."""
    if ascii_only:
        end += len(decode(tokenizer, before))
        return bisect_left(range(len(block)), end, key=lambda n: len(decode(tokenizer, [*before, *block[:n]])))
    text, characters = TokenText(tokenizer), 0  # half a character may be read as none, as one or as several
    text.given = before
    for n, token in enumerate(block, start=1):
        characters += len(text.feed([token]))
        if characters >= end:
            return n
    return len(block)
