"""Conversations as a reward model reads them: ended where a sampled answer ends, in training and in use."""

from collections.abc import Sequence

from posttrain.renderers.types import Message, Renderer, TrainOnWhat


def scored_tokens(renderer: Renderer, conversation: Sequence[Message]) -> tuple[list[int], list[float]]:
    """Tokens, and weights of 1 on the last answer, up to the answer's stop. What a chat template writes after
    it, such as a line break, is never sampled: a model that scored it would score another token in RL."""
    tokens, weights = renderer.build_supervised_example(conversation, TrainOnWhat.LAST_ASSISTANT_MESSAGE)
    end = len(weights) - weights[::-1].index(1.0)
    return tokens[:end], weights[:end]
