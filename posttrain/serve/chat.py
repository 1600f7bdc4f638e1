"""Talk to a model in the terminal: a run, a checkpoint, an adapter, a folder, a preset or a hub name.

  python -m posttrain.serve.chat runs/sft system="Be brief."

Without a terminal it answers the lines of standard input: `posttrain-chat tiny < questions.txt`.
A backslash at the end of a line continues it. Left out: tools, and what the model may do with them.
"""

import queue
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import chz

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ContextLengthError, CookbookError
from posttrain.backend.ranges import COUNT, POSITIVE_SHARE, SEED, TEMPERATURE
from posttrain.backend.types import SamplingParams
from posttrain.renderers import ResponseStream, get_renderer, to_openai
from posttrain.renderers.types import Message, Part, Renderer
from posttrain.tracking.command_line import parse
from posttrain.tracking.jsonl import append_jsonl
from posttrain.tracking.model_source import find_model
from posttrain.tracking.one_line_errors import one_line_errors

if TYPE_CHECKING:  # commands answer before torch is imported
    from posttrain.backend.sampling_client import SamplingClient

HELP = """/reset            forget the conversation
/system TEXT      a new system message, and a new conversation; without TEXT none
/retry            another answer to the last message
/save FILE        append the conversation to FILE, as a line of training data
/help, /quit"""
# a model's text must not steer the terminal
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
GREY, PLAIN = "\033[90m", "\033[0m"


@chz.chz
class Config:
    """Talk to a model in the terminal."""

    model_name: str = chz.field(
        default="tiny",
        doc="a run folder (its last checkpoint), a checkpoint, model folder, adapter, preset or hub name",
    )
    renderer_name: str | None = chz.field(
        default=None, doc="role_colon, chat_template or plain; None = the run's, or the model's own"
    )
    system: str | None = chz.field(default=None, doc="system message")
    max_tokens: int = chz.field(default=512, validator=COUNT, doc="most tokens of an answer")
    temperature: float = chz.field(default=0.7, validator=TEMPERATURE, doc="sampling temperature; 0 = greedy")
    top_p: float = chz.field(
        default=1.0,
        validator=POSITIVE_SHARE,
        doc="sample among the most likely tokens that together have this probability; 1 = all",
    )
    seed: int | None = chz.field(
        default=None, validator=SEED, doc="makes answers repeatable; None = new ones each time"
    )
    base_seed: int = chz.field(default=0, validator=SEED, doc="seed of a preset's weights")
    show_thinking: bool = chz.field(default=True, doc="print the model's thinking, in grey")
    backend: BackendConfig = chz.field(default_factory=BackendConfig, doc="how this machine samples")


class Chat:
    """One conversation. Answers go to standard output while they are sampled."""

    def __init__(self, config: Config, client: "SamplingClient", renderer: Renderer):
        self.config, self.client, self.renderer = config, client, renderer
        self.system = config.system
        self.seed = secrets.randbits(31) if config.seed is None else config.seed
        self.messages: list[Message] = []
        self.colours = sys.stdout.isatty()
        self.reset()

    def reset(self) -> None:
        self.messages = [Message(role="system", content=self.system)] if self.system else []

    def ask(self, text: str) -> None:
        """Ctrl-C, and an error, leave the conversation as it was."""
        self.messages.append(Message(role="user", content=text))
        try:
            self._answer()
        except KeyboardInterrupt:
            print("\n[interrupted]")
            self.messages.pop()
        except CookbookError as error:
            hint = ": /reset begins anew" if isinstance(error, ContextLengthError) else ""
            print(f"[{error}{hint}]")
            self.messages.pop()

    def _answer(self) -> None:
        config, prompt = self.config, self.renderer.build_generation_prompt(self.messages)
        self.seed += 1
        stop = self.renderer.get_stop_sequences()
        params = SamplingParams(config.max_tokens, self.seed, stop, config.temperature, top_p=config.top_p)
        news: queue.SimpleQueue[list[int] | None] = queue.SimpleQueue()
        future = self.client.sample(prompt, 1, params, on_tokens=lambda _, tokens: news.put(tokens))
        future.add_done_callback(lambda _: news.put(None))
        stream, shown = ResponseStream(self.renderer), 0
        try:
            while (tokens := news.get()) is not None:
                self._show(stream.feed(tokens[shown:]))
                shown = len(tokens)
            sequence = future.result().sequences[0]
        except BaseException:
            future.cancel()
            raise
        self._show(stream.feed(sequence.tokens[shown:]) + stream.close())
        print(f" [cut off after {len(sequence.tokens)} tokens]" if sequence.stop_reason == "length" else "", flush=True)
        self.messages.append(self.renderer.parse_response(sequence.tokens)[0])

    def _show(self, parts: list[Part]) -> None:
        for part in parts:
            if part["type"] == "thinking":
                thinking = part["thinking"] if self.config.show_thinking else ""
                if self.colours and thinking:
                    print(GREY + thinking.translate(CONTROLS) + PLAIN, end="", flush=True)
                    continue
                text = thinking
            elif part["type"] == "tool_call":
                text = f"[calls {part['name']}({part['arguments']})]"
            else:
                text = part["text"]
            print(text.translate(CONTROLS), end="", flush=True)

    def command(self, line: str) -> bool:
        """Carries out a line that begins with "/". False ends the chat."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        match name:
            case "/quit" | "/exit":
                return False
            case "/help":
                print(HELP)
            case "/reset":
                self.reset()
            case "/system":
                self.system = rest or None
                self.reset()
            case "/retry":
                self._retry()
            case "/save":
                self._save(rest)
            case _:
                print(f"[there is no command {name}]\n{HELP}")
        return True

    def _retry(self) -> None:
        if not self._is_answered():
            print("[there is no answer yet]")
            return
        before = self.messages[-2:]
        del self.messages[-2:]
        self.ask(before[0]["content"])
        if not self._is_answered():
            self.messages += before

    def _is_answered(self) -> bool:
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"

    def _save(self, path: str) -> None:
        if not path or not self._is_answered():
            print("[/save FILE: give a file]" if not path else "[there is nothing to save yet]")
            return
        try:
            append_jsonl(Path(path).expanduser(), {"messages": [to_openai(message) for message in self.messages]})
            print(f"[appended to {path}]")
        except OSError as error:
            print(f"[{path}: {error.strerror}]")


def read_message() -> str | None:
    """A line, and those after it while they end with a backslash. None at the end of the input."""
    lines: list[str] = []
    while not lines or lines[-1].endswith("\\"):
        try:
            line = input(("> " if not lines else ". ") if sys.stdin.isatty() else "")
        except EOFError:
            return "\n".join(lines) if lines else None
        lines = [*lines[:-1], lines[-1].removesuffix("\\"), line] if lines else [line]
    return "\n".join(lines)


def chat(config: Config) -> None:
    from posttrain.backend.service_client import ServiceClient

    source = find_model(config.model_name)
    with ServiceClient(config.backend) as service:
        client = source.open(service, config.base_seed)
        renderer = get_renderer(config.renderer_name or source.renderer_name, client.get_tokenizer())
        if sys.stdin.isatty():
            import readline  # noqa: F401 (edits lines, and remembers them)

            print(f"{source.label}, {client.max_length} tokens of context; /help lists the commands, Ctrl-D ends")
        talk = Chat(config, client, renderer)
        while (text := read_message()) is not None:
            if text.startswith("/"):
                if not talk.command(text):
                    return
            elif text.strip():
                talk.ask(text)


def main() -> None:
    """The model may be the first argument, without a name."""
    arguments = sys.argv[1:]
    if arguments and "=" not in arguments[0] and not arguments[0].startswith("-") and arguments[0] != "help":
        arguments[0] = f"model_name={arguments[0]}"
    with one_line_errors():
        chat(parse(Config, arguments))


if __name__ == "__main__":
    main()
