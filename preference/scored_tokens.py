"""Conversations as a reward model reads them: ended where a sampled answer ends, in training and in use."""

from collections.abc import Sequence

from posttrain.backend.errors import DataError
from posttrain.renderers.turns import encode
from posttrain.renderers.types import Message, Renderer, TrainOnWhat


def scored_tokens(renderer: Renderer, conversation: Sequence[Message]) -> tuple[list[int], list[float]]:
    """Tokens, and weights of 1 on the last answer, up to the answer's stop. What a chat template writes after
    it, such as a line break, is never sampled: a model that scored it would score another token in RL."""
    *before, answer = conversation
    try:
        tokens, weights = renderer.build_supervised_example(conversation, TrainOnWhat.LAST_ASSISTANT_MESSAGE)
    except DataError:
        bare = answer["content"].lstrip()
        if bare == answer["content"]:
            raise
        # Sampled white space may join the prompt's in one token of the template's text: then the prompt and the
        # answer are encoded one after the other, as they are in RL. Any other fault is one without it, too.
        trimmed = Message({**answer, "content": bare})
        renderer.build_supervised_example([*before, trimmed], TrainOnWhat.LAST_ASSISTANT_MESSAGE)
        return _as_sampled(renderer, before, answer["content"])
    end = len(weights) - weights[::-1].index(1.0)
    return tokens[:end], weights[:end]


def _as_sampled(renderer: Renderer, before: Sequence[Message], answer: str) -> tuple[list[int], list[float]]:
    prompt, stop = renderer.build_generation_prompt(before).to_ints(), renderer.get_stop_sequences()[0]
    tokens = renderer.build_generation_prompt(before, prefill=answer).to_ints()
    tokens += encode(renderer.tokenizer, stop) if isinstance(stop, str) else [stop]
    return tokens, [0.0] * len(prompt) + [1.0] * (len(tokens) - len(prompt))
