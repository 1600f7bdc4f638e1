"""Follows the tokenizer's chat template, token for token: prompts and examples are what
`apply_chat_template` returns, but for special tokens that somebody typed (spelled_out.py). A
message's tokens are the difference of two renderings, up to the message and up to its end; both
must be prefixes of the whole. Where a template rewrites earlier turns (Qwen3 drops their thinking)
training on the message is an error, never a wrong mask. Thinking and tool calls: formats.py.
"""

import re
from collections.abc import Sequence
from typing import Any

import jinja2

from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.types import ModelInput
from posttrain.renderers.encoding import Encoder, separates
from posttrain.renderers.formats import FORMATS, HERMES, Kind, format_of, template_message, tools_as_text
from posttrain.renderers.parts import as_messages, get_tool_calls
from posttrain.renderers.parts_check import SAID, shape_of, unwritable
from posttrain.renderers.spelled_out import SpelledOut
from posttrain.renderers.stream import PartsReader, read_parts
from posttrain.renderers.turns import common_prefix, cut_at_stop, decode, encode, ends, trained_messages
from posttrain.renderers.types import Message, Tokenizer, ToolSpec, TrainOnWhat

# Roles that some templates leave out without a word, and what to do.
INSTEAD = {
    "developer": "write them as the role 'system'",
    "system": "put their text into the first message of the user",
    "tool": "write them as the user's messages, or use a model whose template knows tools",
}
# Replies that known templates rewrite in longer conversations: they drop thinking, trim white
# space.
PROBE_REPLIES = ["Yes.", "<think>\nHm.\n</think>\n\nNo.", " Perhaps. \n"]


class ChatTemplateRenderer:
    """`template_kwargs` are passed to the template, e.g. {"enable_thinking": False}. `tools` are
    listed in every prompt: as the template does, or in the system message if it knows no tools; not
    if `list_tools` is false, for a model that has learned what there is."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template_kwargs: dict[str, Any] | None = None,
        tools: Sequence[ToolSpec] = (),
        list_tools: bool = True,
    ):
        if not tokenizer.chat_template:
            raise ConfigError("this tokenizer has no chat template: use renderer_name=role_colon")
        self.tokenizer = tokenizer
        self.template_kwargs = template_kwargs or {}
        template = str(tokenizer.chat_template)  # some tokenizers have a dict of them, one with tools
        known = format_of(template)
        self.format, self.writes_tools = known or HERMES, known is not None
        self.tools, self.list_tools = list(tools), list_tools
        self._encoder, self._separator = Encoder(tokenizer), ""
        self._faults: dict[tuple[Any, ...], str] = {}  # of the messages that were checked, by shape
        self._written: dict[str, bool] = {}  # the roles that were checked
        if tools and not known and re.search(r"\btools\b", template):
            raise ConfigError(
                "the chat template has tools, but writes calls in no format that is known here "
                f"({', '.join(row.name for row in FORMATS)}): add a row to posttrain/renderers/formats.py"
            )
        self._spelled = SpelledOut(tokenizer, template, ())
        self._in_parts = self._reads_parts()
        self.end_of_turn = self._find_end_of_turn()
        if separates(tokenizer, self.end_of_turn):
            self._separator = tokenizer.added_tokens_decoder[self.end_of_turn].content
        added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        self.stops = [self.end_of_turn, *(added[stop] for stop in self.format.call_stops if stop in added)]
        self._spelled = SpelledOut(tokenizer, template, self.stops)
        self.opens: Kind | None = self._opens()
        self.before_reply = self._before_reply()
        # of a sampled text; some tokenizers drop the space before a first word
        self.lead = decode(tokenizer, encode(tokenizer, " x")).removesuffix("x") if self.before_reply else ""
        self.has_extension_property: bool = self._extends()

    def with_tools(self, tools: Sequence[ToolSpec], list_tools: bool = True) -> "ChatTemplateRenderer":
        """A renderer that offers `tools`. ConfigError where the template's calls cannot be read."""
        renderer = type(self)(self.tokenizer, self.template_kwargs, tools, list_tools)
        renderer._encoder = self._encoder
        return renderer

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[int]:
        """Tokens of `apply_chat_template`. DataError with the template's message if it refuses, and for a role
        whose messages it leaves out."""
        if not messages:
            raise DataError(
                "the chat template needs a message before the assistant's: begin with the system's or user's"
            )
        for role in {message["role"] for message in messages} & INSTEAD.keys():
            if not self._writes(role):
                raise DataError(f"the chat template leaves out messages of the role {role!r}: {INSTEAD[role]}")
        return self._apply(messages, add_generation_prompt)

    def _reads_parts(self) -> bool:
        """Whether the template writes no content that is text: those of some models that read pictures (SmolVLM,
        LLaVA) look for parts in it, of which one has the text."""
        found = []
        for self._in_parts in (False, True):
            try:
                found.append(decode(self.tokenizer, self._apply([Message(role="user", content=SAID)])))
            except DataError:
                return False
        as_text, in_parts = found
        return SAID not in as_text and SAID in in_parts and "'type'" not in in_parts

    def _writes(self, role: str) -> bool:
        if role not in self._written:
            turn = Message(role="user", content="a"), Message(role="assistant", content="b")
            probe = Message(role=role, content=SAID)
            try:
                text = decode(self.tokenizer, self._apply([*turn, probe, *turn] if role == "tool" else [probe, *turn]))
                self._written[role] = SAID in text
            except Exception:  # of the template's code: it says so itself, where the role is used
                self._written[role] = True
        return self._written[role]

    def _apply(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[int]:
        plain = [self._spelled.marked_fields(self._for_template(message)) for message in messages]
        if self._in_parts:
            plain = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in plain]
        tools: dict[str, Any] = {}
        if not self.writes_tools:
            plain = _answers_as_user(plain) if self.tools else plain
            plain = _listed_in_system(plain, self.tools) if self.tools and self.list_tools else plain
        elif self.tools and self.list_tools:
            tools = {"tools": [{"type": "function", "function": tool} for tool in self.tools]}
        try:
            text = self.tokenizer.apply_chat_template(
                plain,  # type: ignore[arg-type]
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **tools,
                **self.template_kwargs,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:  # the last two of the template's code, too
            raise DataError(f"the chat template refuses the roles {[m['role'] for m in messages]}: {error}") from error
        assert isinstance(text, str)
        return self._spelled.encode(text, self._encoded)

    def _encoded(self, text: str, begins: bool) -> list[int]:
        if not self._separator:
            return encode(self.tokenizer, text, begins)
        if begins:
            return self._encoder.parts(text, self._separator)
        first, end, rest = text.partition(self._separator)
        return self._encoder(first) + (self._encoder.parts(end + rest, self._separator) if end else [])

    def _for_template(self, message: Message) -> dict[str, Any]:
        fields = {key: value for key, value in message.items() if key not in ("trainable", "parts")}
        parts = message.get("parts")
        if parts is not None and self.format.write is None:
            return fields | template_message(self.format, parts)
        if not parts or self.format.write is None:
            return fields
        return fields | {"content": message["content"] or self.format.write(parts)}

    def _opens(self) -> Kind | None:
        """What the prompt has begun for the model."""
        prompt = self._render([Message(role="user", content="a")], add_generation_prompt=True)
        return "thinking" if decode(self.tokenizer, prompt).rstrip().endswith("<think>") else None

    def reader(self) -> PartsReader:
        """Reads a response into parts."""
        return PartsReader(self.format, self.opens, has_tools=bool(self.tools))

    def _before_reply(self) -> str:
        """The space that some templates write between the prompt and a reply ("Assistant:" and " Hi"), or ""."""
        ask = Message(role="user", content="a")
        prompt = self._render([ask], add_generation_prompt=True)
        whole = self._render([ask, Message(role="assistant", content="x")])
        text, begun = decode(self.tokenizer, whole), decode(self.tokenizer, prompt)
        return " " if text.startswith(begun + " x") else ""

    def _find_end_of_turn(self) -> int:
        """The first special token in the common ending of two conversations that differ in the
        assistant's reply."""
        ask = Message(role="user", content="a")
        first, second = (self._render([ask, Message(role="assistant", content=reply)]) for reply in "x0")
        if first == second:
            raise ConfigError(
                "the tokenizer or its chat template writes the replies 'x' and '0' alike, so the end of a turn cannot "
                "be found: use another renderer_name"
            )
        special = set(self.tokenizer.all_special_ids) | {
            i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special
        }
        tail = first[len(first) - common_prefix(first[::-1], second[::-1]) :]
        for token in tail:
            if token in special:
                return token
        raise ConfigError(
            "the chat template ends no turn with a special token to stop at: use renderer_name=role_colon"
        )

    def _extends(self) -> bool:
        messages: list[Message] = []
        try:
            for reply in PROBE_REPLIES:
                messages += [Message(role="user", content="Is it so?")]
                prompt, answer = self._render(messages, True), encode(self.tokenizer, self.before_reply + reply)
                spoken = [*prompt, *answer, self.end_of_turn]
                messages += [Message(role="assistant", content=reply)]
                following = self._render([*messages, Message(role="user", content="And now?")], True)
                if following[: len(spoken)] != spoken:
                    return False
        except DataError:  # a template for a single exchange
            return False
        return True

    def build_generation_prompt(
        self, messages: Sequence[Message], role: str = "assistant", prefill: str | None = None
    ) -> ModelInput:
        if role != "assistant":
            raise ConfigError(
                f"a chat template prompts the assistant only, not {role!r}: swap the roles or use role_colon"
            )
        messages = as_messages(messages)
        for i, message in enumerate(messages):
            # of one that is lost, the answer would follow nothing; a client's text beside a call may be lost
            if self.writes_tools and not message["content"] and len(calls := get_tool_calls(message)) > 1:
                self._check_parts({**message, "parts": [*calls]}, i, trained=False)
        prompt = self._render(messages, add_generation_prompt=True)
        if not prefill:
            return ModelInput.from_ints(prompt)
        begun = self._spelled.marked("assistant", self.before_reply + prefill)
        tokens = self._spelled.encode(begun, lambda text, _: encode(self.tokenizer, text))
        return ModelInput.from_ints(prompt + tokens)

    def build_supervised_example(
        self, messages: Sequence[Message], train_on_what: TrainOnWhat = TrainOnWhat.ALL_ASSISTANT_MESSAGES
    ) -> tuple[list[int], list[float]]:
        """Tokens after a turn's end (mostly a line break) have weight 0: the model has stopped."""
        messages = as_messages(messages)
        trained = trained_messages(messages, train_on_what)
        for i, (message, is_trained) in enumerate(zip(messages, trained, strict=True)):
            self._check_parts(message, i, is_trained)
            if message["role"] == "assistant":
                self._spelled.check_answer(i, message["content"])
        tokens = self._render(messages)
        if train_on_what == TrainOnWhat.ALL_TOKENS:
            return tokens, [1.0] * len(tokens)
        weights = [0.0] * len(tokens)
        for i in (i for i, is_trained in enumerate(trained) if is_trained):
            start, end = self._output_span(messages, i, tokens)
            weights[start:end] = [1.0] * (end - start)
        return tokens, weights

    def _check_parts(self, message: Message, i: int, trained: bool) -> None:
        """DataError for parts that the template would cut, or write as no model of it does."""
        parts = message.get("parts", ())
        if not parts or (message["content"] and self.format.write):  # sampled: copied as it is
            return
        key = (shape_of(parts), trained)
        if key not in self._faults:
            template = str(self.tokenizer.chat_template)
            self._faults[key] = unwritable(self._last_message, template, self.writes_tools, *key)
        if self._faults[key]:
            raise DataError(f"message {i} ({message['role']}): {self._faults[key]}")

    def _last_message(self, message: Message) -> str:
        return decode(self.tokenizer, self._render([Message(role="user", content="a"), message]))

    def _output_span(self, messages: Sequence[Message], i: int, tokens: list[int]) -> tuple[int, int]:
        """Start and end in `tokens` of message `i` and its turn's end."""
        role, content = messages[i]["role"], messages[i]["content"]
        whole = tokens if i == len(messages) - 1 else self._render(messages[: i + 1])
        if role == "assistant":
            prompt = self._render(messages[:i], add_generation_prompt=True)
            start = len(prompt)
        else:  # a user has no prompt: the message begins at the first token that depends on its content
            other = Message(role=role, content="0" if content.strip()[:1] == "x" else "x")
            start = common_prefix(whole, self._render([*messages[:i], other]))
            prompt = whole[:start]
        if tokens[: len(whole)] != whole or whole[:start] != prompt:
            last = i == len(messages) - 1
            # Qwen3 gives the last message an empty thought, and others none: what counts is what is sampled
            content = self._for_template(messages[i])["content"]
            spoken = prompt + encode(self.tokenizer, self.before_reply + content) + [self.end_of_turn]
            if role == "assistant" and not last and tokens[: len(spoken)] == spoken:
                return start, len(spoken)
            joined = whole[:start] != prompt and content[:1].isspace()
            if joined and self._begins(messages[:i], content.lstrip(), prompt):
                raise DataError(
                    f"message {i} (assistant): it begins with {content[0]!r}, which the tokenizer joins with the end "
                    "of the prompt into another token, so no mask would be right: take the white space there away"
                )
            why = "its tokens do not begin with those of the prompt" if last else "it rewrites earlier turns"
            advice = "use renderer_name=role_colon" if last else "set train_on_what=last_assistant_message"
            raise DataError(
                f"message {i} ({role}): the chat template renders it differently in the whole conversation than when "
                f"sampled ({why}), so no mask would be right: {advice}"
            )
        ends = [t + 1 for t in range(start, len(whole)) if whole[t] in self.stops]
        if not ends and role == "assistant":
            name = self.tokenizer.convert_ids_to_tokens(self.end_of_turn)
            raise DataError(
                f"message {i} (assistant): no {name} ends it in the chat template, so nothing would teach a model to "
                "stop"
            )
        return start, ends[-1] if ends else len(whole)

    def _begins(self, messages: Sequence[Message], answer: str, prompt: list[int]) -> bool:
        """Whether the conversation with this answer begins with the prompt's tokens."""
        return self._render([*messages, Message(role="assistant", content=answer)])[: len(prompt)] == prompt

    def get_stop_sequences(self) -> list[str] | list[int]:
        return [*self.stops]

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        """The message has `parts` if it is more than text."""
        text, ended = cut_at_stop(self.tokenizer, tokens, [*self.stops, *ends(self.tokenizer)])
        text = text.removeprefix(self.lead)
        message = Message(role="assistant", content=text)
        parts = read_parts(self.reader(), text)
        if parts != ([{"type": "text", "text": text}] if text else []):
            message["parts"] = parts
        return message, ended


def _listed_in_system(messages: list[dict[str, Any]], tools: Sequence[ToolSpec]) -> list[dict[str, Any]]:
    """For templates without tools: the system message, the given one or one of its own, lists them."""
    given = messages[0]["content"] + "\n\n" if messages and messages[0]["role"] == "system" else ""
    return [{"role": "system", "content": given + tools_as_text(tools)}, *messages[bool(given) :]]


def _answers_as_user(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For templates without tools: the user reports their answers, those to one message together."""
    written: list[dict[str, Any]] = []
    for previous, message in zip([None, *messages], messages, strict=False):
        if message["role"] != "tool":
            written.append(message)
            continue
        answer = f"<tool_response>\n{message['content']}\n</tool_response>"
        if previous and previous["role"] == "tool":
            written[-1]["content"] += "\n" + answer
        else:
            written.append({"role": "user", "content": answer})
    return written
