"""Text without roles: the contents in order, EOS after the assistant's. "12+34=" is answered
"46<eos>".
"""

from collections.abc import Sequence

from posttrain.backend.errors import ConfigError
from posttrain.backend.types import ModelInput
from posttrain.renderers.encoding import Encoder
from posttrain.renderers.parts import as_messages
from posttrain.renderers.turns import Turn, bos, cut_at_stop, encode, ends, eos, supervised_example, text_of
from posttrain.renderers.types import Message, Tokenizer, TrainOnWhat


class PlainRenderer:
    has_extension_property: bool = True

    def __init__(self, tokenizer: Tokenizer):
        if not eos(tokenizer):
            raise ConfigError("renderer_name=plain ends answers with EOS, and this tokenizer has none: use role_colon")
        self.tokenizer = tokenizer
        self.bos, self.eos = bos(tokenizer), eos(tokenizer)
        self._encode = Encoder(tokenizer)

    def _turns(self, messages: Sequence[Message]) -> list[Turn]:
        stops = [self.eos if message["role"] == "assistant" else [] for message in messages]
        tokens = [self._encode(text_of(message), begins=i == 0) for i, message in enumerate(messages)]
        return [Turn([], output + end) for output, end in zip(tokens, stops, strict=True)]

    def build_generation_prompt(
        self, messages: Sequence[Message], role: str = "assistant", prefill: str | None = None
    ) -> ModelInput:
        """`role` has no effect."""
        tokens = self.bos + [token for turn in self._turns(as_messages(messages)) for token in turn.output]
        return ModelInput.from_ints(tokens + encode(self.tokenizer, prefill or ""))

    def build_supervised_example(
        self, messages: Sequence[Message], train_on_what: TrainOnWhat = TrainOnWhat.ALL_ASSISTANT_MESSAGES
    ) -> tuple[list[int], list[float]]:
        messages = as_messages(messages)
        return supervised_example(self.bos, self._turns(messages), messages, train_on_what)

    def get_stop_sequences(self) -> list[str] | list[int]:
        return self.eos

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        text, ended = cut_at_stop(self.tokenizer, tokens, ends(self.tokenizer))
        return {"role": "assistant", "content": text}, ended
