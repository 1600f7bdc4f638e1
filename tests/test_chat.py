"""posttrain-chat: a conversation over standard input and output."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import LoraConfig, ModelInput, SampledSequence, SampleResponse, SamplingParams
from posttrain.renderers import get_renderer
from posttrain.serve import chat
from tests import commands

TORCH = BackendConfig(engine="torch")


def talk(monkeypatch: pytest.MonkeyPatch, lines: str, **settings: Any) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    chat.chat(chat.Config(**{"seed": 0, "max_tokens": 8, "backend": TORCH} | settings))


def test_a_conversation_is_what_the_policy_samples(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    path = tmp_path / "talk.jsonl"
    lines = f"Hello\nAnd \\\nnow?\n/save {path}\n/system Be brief.\nHello\n/save {path}\n/retry\n/save {path}\n/reset\n/save {path}\n"
    talk(monkeypatch, lines, model_name="micro")
    shown = capsys.readouterr().out
    first, second, again = [json.loads(line)["messages"] for line in path.read_text().strip("\n").split("\n")]
    assert [message["role"] for message in first] == ["user", "assistant"] * 2 and first[2]["content"] == "And \nnow?"
    assert [message["role"] for message in second] == ["system", "user", "assistant"]
    assert second[:2] == again[:2] and second[2] != again[2]
    assert "there is nothing to save" in shown and shown.count("[cut off after 8 tokens]") == 4
    with ServiceClient(TORCH) as service:
        client = service.create_sampling_client(base_model="micro")
        renderer = get_renderer(None, client.get_tokenizer())
        prompt = renderer.build_generation_prompt(first[:1])
        params = SamplingParams(8, 1, renderer.get_stop_sequences(), 0.7)
        expected = client.sample(prompt, 1, params).result().sequences[0].tokens
    assert first[1]["content"] == renderer.parse_response(expected)[0]["content"]


def test_an_adapter_is_talked_to_as_it_was_trained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    with ServiceClient(TORCH, tmp_path) as service:
        adapter = (
            service.create_training_client("micro", LoraConfig(rank=4), seed=3).save_state("adapter").result().path
        )
    talk(monkeypatch, "Hello\n", model_name=adapter)
    merged = capsys.readouterr().out
    talk(monkeypatch, "Hello\n", model_name="micro", base_seed=3)
    assert capsys.readouterr().out == merged  # an adapter of zeros: its base, with the seed it knows


class Scripted:
    """Answers every prompt with `text`."""

    max_length = 100

    def __init__(self, text: str, tokenizer: Any):
        self.tokens, self.tokenizer = tokenizer.encode(text), tokenizer

    def sample(self, prompt: ModelInput, n: int, params: SamplingParams, on_tokens: Any) -> Any:
        from posttrain.backend.futures import APIFuture

        future: APIFuture[SampleResponse] = APIFuture()
        for length in range(1, len(self.tokens)):
            on_tokens(0, self.tokens[:length])
        future.succeed(SampleResponse([SampledSequence(self.tokens, [0.0] * len(self.tokens), "stop")]))
        return future


def test_what_is_shown_of_an_answer(capsys: pytest.CaptureFixture) -> None:
    from posttrain.backend.tokenizers import load_tokenizer

    tokenizer = load_tokenizer("micro")
    text = '<think>\nHm.\n</think>\nYes \x1b[2J.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    client: Any = Scripted(text, tokenizer)
    for thinking, expected in (
        (True, "Hm.Yes \ufffd[2J.[calls add({'a': 1})]\n"),
        (False, "Yes \ufffd[2J.[calls add({'a': 1})]\n"),
    ):
        chat.Chat(chat.Config(show_thinking=thinking), client, get_renderer(None, tokenizer)).ask("?")
        assert capsys.readouterr().out == expected


def test_a_full_context_leaves_the_conversation_as_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    path = tmp_path / "talk.jsonl"
    talk(monkeypatch, f"Hi\n{'x' * 600}\n/save {path}\n/nonsense\n/quit\nHi\n", model_name="micro")
    shown = capsys.readouterr().out
    assert (
        "tokens, and the context of 512" in shown and "/reset begins anew]" in shown and "no command /nonsense" in shown
    )
    assert len(json.loads(path.read_text())["messages"]) == 2 and shown.count("[cut off") == 1


def test_names_that_are_no_model() -> None:
    with pytest.raises(ConfigError, match="there is no model folder"):
        chat.chat(chat.Config(model_name="./nothing"))
    done = commands.run("-m", "posttrain.serve.chat", "tiny", "temprature=1")
    assert done.returncode == 2 and "did you mean temperature?" in done.stderr
