"""Where a sampled text ends: at the first of several stop strings, found in the text and mapped
back to a token offset.

In the text, because a stop string may be written in several tokenisations ("The answer is" after a
space, a newline, or glued to a full stop). A token that is partly before the stop and partly in it
does not count as before it.
"""

from collections.abc import Sequence

from posttrain.renderers.turns import decode
from posttrain.renderers.types import Renderer, Tokenizer


def tokens_before_stop(tokenizer: Tokenizer, tokens: Sequence[int], stops: Sequence[str]) -> tuple[int, bool]:
    """How many of `tokens` lie wholly before the earliest stop string, and whether there is one. No
    stop: all of them.

    Special tokens are stops by their name, e.g. "<|endoftext|>".
    """
    text = decode(tokenizer, tokens)
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    if not places:
        return len(tokens), False
    before, length = text[: min(places)], len(tokens)
    # few steps: the sampler stops right behind a stop
    while not before.startswith(decode(tokenizer, tokens[:length])):
        length -= 1
    return length, True


def stop_strings(renderer: Renderer, stop_seqs: Sequence[str] = (), pad: bool = True) -> list[str]:
    """`stop_seqs`, the renderer's end of a message, EOS and, with `pad`, the padding token: as
    strings, each once.
    """
    tokenizer = renderer.tokenizer
    ends = [stop if isinstance(stop, str) else decode(tokenizer, [stop]) for stop in renderer.get_stop_sequences()]
    special = [tokenizer.eos_token, tokenizer.pad_token if pad else None]
    return list(dict.fromkeys([*stop_seqs, *ends, *(str(token) for token in special if token)]))
