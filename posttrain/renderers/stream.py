"""Reads a response while it arrives: pieces of text and thinking at once, a tool call when it is
whole. What may be the beginning of a marker or of a stop is held back. The whole response is read
the same way, so both give the same parts.
"""

from collections.abc import Iterable, Sequence

from posttrain.renderers.formats import Kind, MessageFormat, harmony_kind, is_llama_call, might_be_llama_call
from posttrain.renderers.parts import calls_in, join_parts
from posttrain.renderers.turns import decode, ends
from posttrain.renderers.types import Part, Renderer, TextPart, ThinkingPart, Tokenizer, UnparsedToolCallPart


class PartsReader:
    """Text to parts, by a format's markers. Line breaks around a marker are the format's, not the
    text's. `start` is what the prompt has opened, e.g. thinking. `has_tools`: JSON alone can be a
    call, where the format has such calls."""

    def __init__(self, row: MessageFormat, start: Kind | None = None, has_tools: bool = True):
        self.row = row
        self.kind: Kind = start or row.starts_with
        self.buffer, self.body, self.header = "", "", ""
        self.breaks = ""  # line breaks that belong to the text only if more text follows
        self.after_marker = start == "thinking"
        self.calls = 0
        self.is_empty = True
        self.may_be_call = row.name == "llama3" and has_tools and not start  # so far, the beginning of a call

    def feed(self, text: str) -> list[Part]:
        self.buffer += text
        if self.may_be_call:
            if might_be_llama_call(self.buffer):
                return []
            self.may_be_call = False
        parts: list[Part] = []
        while True:
            markers = self.row.markers.get(self.kind, {})
            found = [(at, marker) for marker in markers if (at := self.buffer.find(marker)) >= 0]
            if not found:
                held = held_back(self.buffer, markers)
                kept = len(self.buffer) - held
                parts += self._take(self.buffer[:kept])
                self.buffer = self.buffer[kept:]
                return join_parts(parts)
            at, marker = min(found)
            parts += self._take(self.buffer[:at]) + self._end_of_part()
            self.buffer = self.buffer[at + len(marker) :]
            self._begin(markers[marker], marker)

    def close(self) -> list[Part]:
        """The rest, at the end of the response."""
        if self.may_be_call and is_llama_call(self.buffer):
            self.kind = "call"
        rest, self.buffer = self.buffer, ""
        parts = self._take(rest)
        if self.kind == "header" and self.is_empty and self.header:  # no format at all
            parts.append(_text(self.header))
        if self.kind == "text" and self.breaks:
            parts.append(_text(self.breaks))
        if self.kind == "call" and "</tool_call>" in self.row.markers.get("call", {}):
            return join_parts([*parts, self._unclosed()])
        return join_parts(parts + self._end_of_part())

    def _begin(self, kind: Kind, marker: str) -> None:
        if marker == "<|message|>":
            kind = harmony_kind(self.header)
        else:
            self.header = ""
        self.kind, self.body, self.breaks = kind, "", ""
        self.after_marker, self.is_empty = True, False

    def _take(self, text: str) -> list[Part]:
        if self.kind == "header":
            self.header += text
        elif self.kind == "call":
            self.body += text
        elif text := self._without_breaks(text):
            return [_text(text) if self.kind == "text" else ThinkingPart(type="thinking", thinking=text)]
        return []

    def _without_breaks(self, text: str) -> str:
        if self.row.name == "harmony":  # its markers come without line breaks
            return text
        if self.after_marker:
            text = text.lstrip("\n")
        if not text:
            return ""
        self.after_marker = False
        text = self.breaks + text
        self.breaks = text[len(text.rstrip("\n")) :]
        return text.rstrip("\n")

    def _end_of_part(self) -> list[Part]:
        if self.kind != "call":
            return []
        parts = self.row.read_call(self.header, self.body.strip("\n"))
        for call in calls_in(parts):
            call["id"] = call["id"] or self._next_id()
        return parts

    def _unclosed(self) -> UnparsedToolCallPart:
        text, error = self.body.strip("\n"), "</tool_call> is missing"
        return {"type": "unparsed_tool_call", "id": self._next_id(), "name": "", "text": text, "error": error}

    def _next_id(self) -> str:
        self.calls += 1
        return f"call{self.calls:05d}"  # Mistral's template wants nine letters or digits


def is_counted(call_id: str) -> bool:
    """Whether an id is the number of a call in its message, since the model wrote none."""
    return len(call_id) == 9 and call_id.startswith("call") and call_id[4:].isdecimal()


def _text(text: str) -> TextPart:
    return {"type": "text", "text": text}


def held_back(text: str, markers: Iterable[str]) -> int:
    """How many characters at the end of `text` may begin a marker."""
    return max(
        (n for marker in markers for n in range(1, min(len(marker), len(text) + 1)) if text.endswith(marker[:n])),
        default=0,
    )


def read_parts(reader: PartsReader, text: str) -> list[Part]:
    """The parts of a whole response."""
    return join_parts(reader.feed(text) + reader.close())


class TokenText:
    """Tokens to text as they arrive, after the tokens `given`; half a character waits for its other half."""

    def __init__(self, tokenizer: Tokenizer, given: Sequence[int] = ()):
        self.tokenizer = tokenizer
        # The last that were given out stay, for tokenizers that drop the space before a first word. They
        # are whole characters: bytes beside half of one would be read as none.
        self.given: list[int] = [*given]
        self.waiting: list[int] = []

    def feed(self, tokens: Sequence[int]) -> str:
        self.waiting += tokens
        text = self._text()
        if not text or text.endswith("\ufffd"):
            return ""
        self.given, self.waiting = self.waiting, []
        return text

    def close(self) -> str:
        return self._text()

    def _text(self) -> str:
        """Of what waits."""
        return decode(self.tokenizer, self.given + self.waiting)[len(decode(self.tokenizer, self.given)) :]


class ResponseStream:
    """A response of `renderer`, token by token: `feed` and `close` give parts, of which text and
    thinking are pieces. `ended` says whether the stop has come; tokens after it are ignored."""

    def __init__(self, renderer: Renderer):
        tokenizer = renderer.tokenizer
        stops = renderer.get_stop_sequences()
        self.stop_ids = {*(stop for stop in stops if isinstance(stop, int)), *ends(tokenizer)}
        self.stop_texts = [stop for stop in stops if isinstance(stop, str)]
        self.text, self.waiting, self.ended = TokenText(tokenizer), "", False
        self.reader: PartsReader | None = getattr(renderer, "reader", lambda: None)()
        # what a renderer puts between its header and the text
        self.lead = getattr(renderer, "lead", "")

    def feed(self, tokens: Sequence[int]) -> list[Part]:
        text = ""
        for token in tokens:
            if self.ended:
                break
            if token in self.stop_ids:
                text, self.ended = text + self.text.close(), True
            else:
                text += self.text.feed([token])
        return self._parts(text)

    def close(self) -> list[Part]:
        """The rest, at the end of the response."""
        rest = [] if self.ended else self._parts(self.text.close())
        text, self.waiting = self.waiting, ""
        parts = self._read(text)
        return join_parts(rest + parts + (self.reader.close() if self.reader else []))

    def _parts(self, text: str) -> list[Part]:
        self.waiting += text
        for stop in self.stop_texts:
            if stop in self.waiting:
                self.waiting, self.ended = self.waiting.split(stop)[0], True
        kept = len(self.waiting) - (0 if self.ended else held_back(self.waiting, self.stop_texts))
        text, self.waiting = self.waiting[:kept], self.waiting[kept:]
        return self._read(text)

    def _read(self, text: str) -> list[Part]:
        if self.lead and text:
            text, self.lead = text.removeprefix(self.lead), ""
        if self.reader:
            return self.reader.feed(text)
        return [_text(text)] if text else []
