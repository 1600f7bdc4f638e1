"""The end of a sampled text: the first of several stop strings, found in the text (a stop may have
several tokenisations) and mapped back to a token offset. A token partly in the stop is not before
it.
"""

from collections.abc import Sequence

from posttrain.renderers.turns import decode
from posttrain.renderers.types import Renderer, Tokenizer


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
