"""Conversations as plain text, for base models: "User: hi\\n\\nAssistant: hello\\n\\nUser:". The
assistant's output ends with "\\n\\nUser:", the next user's header, which is the stop sequence; so
the next prompt extends the sampled tokens. A response that ends by EOS is whole, too. Pieces are
encoded separately: the generation prompt is an exact prefix of the training example. A header that
somebody typed begins no turn: it gets a space, "\\n\\n User:", and special tokens are text.
"""

import re
from collections.abc import Sequence

from posttrain.backend.errors import ConfigError
from posttrain.backend.types import ModelInput
from posttrain.renderers.encoding import Encoder
from posttrain.renderers.parts import as_messages
from posttrain.renderers.spelled_out import SpelledOut
from posttrain.renderers.turns import Turn, bos, cut_at_stop, decode, encode, ends, supervised_example, text_of
from posttrain.renderers.types import Message, Tokenizer, TrainOnWhat

STOP = "\n\nUser:"
STOPPED = re.compile("\n\n(?=User:)")
TYPED = re.compile("\n\n(?=(User|Assistant|System|Developer|Tool):)")


class RoleColonRenderer:
    has_extension_property: bool = True
    lead = " "

    def __init__(self, tokenizer: Tokenizer):
        if (kept := decode(tokenizer, encode(tokenizer, STOP))) != STOP:
            raise ConfigError(
                f"renderer_name=role_colon ends answers with {STOP!r}, which this tokenizer turns into {kept!r}: use plain"
            )
        self.tokenizer = tokenizer
        self.bos = bos(tokenizer)
        self._encode, self._spelled = Encoder(tokenizer), SpelledOut(tokenizer, "", ())

    def _turns(self, messages: Sequence[Message], next_role: str) -> list[Turn]:
        """The messages, then the header of `next_role`."""
        roles = [message["role"] for message in messages] + [next_role]
        outputs = [*map(self._output, messages), []]
        turns, word_given = [], False
        for i, (role, output) in enumerate(zip(roles, outputs, strict=True)):
            header = "" if word_given else ("\n\n" if i else "") + f"{role.capitalize()}:"
            word_given = role == "assistant" and roles[i + 1 : i + 2] == ["user"]
            stop = self._encode(STOP) if word_given else []
            turns.append(Turn(self._encode(header, begins=i == 0), output + stop))
        return turns

    def _output(self, message: Message) -> list[int]:
        """Of an answer, only what would end it is not as it stands: more was not sampled so."""
        role, text = message["role"], " " + text_of(message)
        if role != "system":
            text = (STOPPED if role == "assistant" else TYPED).sub("\n\n ", text)
        return self._spelled.encode(self._spelled.marked(role, text), lambda piece, _: self._encode(piece))

    def build_generation_prompt(
        self, messages: Sequence[Message], role: str = "assistant", prefill: str | None = None
    ) -> ModelInput:
        turns = self._turns(as_messages(messages), next_role=role)
        tokens = self.bos + [token for turn in turns for token in turn.header + turn.output]
        return ModelInput.from_ints(tokens + (encode(self.tokenizer, " " + prefill) if prefill else []))

    def build_supervised_example(
        self, messages: Sequence[Message], train_on_what: TrainOnWhat = TrainOnWhat.ALL_ASSISTANT_MESSAGES
    ) -> tuple[list[int], list[float]]:
        messages = as_messages(messages)
        turns = self._turns(messages, next_role="user")[:-1]
        return supervised_example(self.bos, turns, messages, train_on_what)

    def get_stop_sequences(self) -> list[str] | list[int]:
        return [STOP]

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        text, ended = cut_at_stop(self.tokenizer, tokens, ends(self.tokenizer), STOP)
        return {"role": "assistant", "content": text.removeprefix(self.lead)}, ended
