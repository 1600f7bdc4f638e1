"""Renderers with the tokenizers of other families: a space before each text, bytes for characters that
are not in the vocabulary, texts changed by a normaliser.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from posttrain.backend.errors import ConfigError, DataError, ModelError
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.torch_sampler import _Stop
from posttrain.renderers import get_renderer
from posttrain.renderers.stream import ResponseStream, TokenText
from posttrain.renderers.turns import before_others, continuation, decode, encode, encode_text, token_text
from posttrain.renderers.types import Message
from tests.architectures import save_random_model

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CORPUS = ["User: Assistant: hello there, what is that? 0 x that is it, yes or no"] * 20
DROPS_SPACE = decoders.Strip(" ", 1, 0)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# a reply follows a space that the prompt does not have, as in DeepSeek's and Mistral's templates
SPACED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}User: {{ m['content'] }}\n\n"
    "{% else %}Assistant: {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
REPLIES = ["hello", "that is it", "yes\nor no", "日本語 日本語日本 😀😀😀 é"]


def sentencepiece(normalizer: Any, pre_tokenizer: Any, *more_decoders: Any) -> Tokenizer:
    """BPE with bytes for unknown characters, as converted from SentencePiece."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=SPECIAL + BYTES, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *more_decoders]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def byte_level(add_prefix_space: bool = False, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder, tokenizer.normalizer = decoders.ByteLevel(), normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=350, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "Llama 2": lambda: sentencepiece(
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, DROPS_SPACE
    ),
    "Mistral": lambda: sentencepiece(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), DROPS_SPACE),
    "Gemma": lambda: sentencepiece(normalizers.Replace(" ", "▁"), None),
    "RoBERTa": lambda: byte_level(add_prefix_space=True),
    "GPT-2": byte_level,
}


def wrapped(tokenizer: Tokenizer, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=chat_template,
    )


# Trap: a space more before each piece of a text, a character of several tokens streamed as none.
@pytest.mark.parametrize("template", [None, CHATML, SPACED], ids=["none", "chatml", "spaced"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_sampled_is_read_streamed_and_prompted_again(kind: str, template: str | None) -> None:
    tokenizer = wrapped(KINDS[kind](), template)
    for name in ["chat_template"] if template else ["plain", "role_colon"]:
        renderer = get_renderer(name, tokenizer)
        assert renderer.has_extension_property
        for reply in REPLIES:
            said = [Message(role="user", content="what is that?"), Message(role="assistant", content=reply)]
            tokens, weights = renderer.build_supervised_example(said)
            prompt = renderer.build_generation_prompt(said[:1]).to_ints()
            assert tokens[: len(prompt)] == prompt and tokens.count(1) == (template != CHATML)
            action = [token for token, weight in zip(tokens, weights, strict=True) if weight]
            assert renderer.parse_response(action) == (said[1], True)
            stream = ResponseStream(renderer)
            pieces = [part for token in action for part in stream.feed([token])] + stream.close()
            assert "".join(part.get("text", "") for part in pieces) == reply
            begun = renderer.build_generation_prompt(said[:1], prefill=reply).to_ints()
            assert begun == tokens[: len(begun)] and len(begun) > len(prompt)
            following = renderer.build_generation_prompt([*said, Message(role="user", content="yes")]).to_ints()
            assert following[: len(prompt) + len(action)] == prompt + action


# Trap: samplers stop at every end token of the model's configs. Qwen 2.5's tokenizer knows <|im_end|> alone, and
# an answer that <|endoftext|> ends was read as one without an end, with that text in it.
@pytest.mark.parametrize("name", ["chat_template", "plain", "role_colon"])
def test_each_end_token_of_the_model_ends_an_answer(name: str, tmp_path: Path) -> None:
    save_random_model("Llama 3", tmp_path)
    wrapped(byte_level(), CHATML).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).eos_token_id == 2
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    tokenizer = load_tokenizer(str(tmp_path))
    renderer = get_renderer(name, tokenizer)
    action = [*encode(tokenizer, "yes"), 3]
    assert renderer.parse_response(action) == ({"role": "assistant", "content": "yes"}, True)
    stream = ResponseStream(renderer)
    assert stream.feed(action) == [{"type": "text", "text": "yes"}] and stream.ended


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_reads_as_one_text(kind: str) -> None:
    tokenizer, said = (
        wrapped(KINDS[kind]()),
        [Message(role="user", content="0"), Message(role="assistant", content="x")],
    )
    expected = {"role_colon": "User: 0\n\nAssistant: x\n\nUser:", "plain": "0x</s>"}
    for name, text in expected.items():
        tokens, _ = get_renderer(name, tokenizer).build_supervised_example(said)
        assert decode(tokenizer, tokens[1:]).removeprefix(" ") == text
        if name == "role_colon":  # and is the text's own tokens
            assert tokens == encode_text(tokenizer, text)


# Trap: a run of bytes that is cut in a character is no text, nor are the line breaks after it.
@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_is_found_where_the_whole_text_has_it(kind: str) -> None:
    tokenizer, stop = wrapped(KINDS[kind]()), "\n\nUser:"
    ends = _Stop(frozenset(), (stop,), tokenizer).ends
    for said in ("hello", "日本 " + "😀" * 12, "日" * 11, "\n\n😀\nUser" * 5):
        tokens = encode(tokenizer, said + stop + " more")
        found = [n for n in range(1, len(tokens) + 1) if stop in decode(tokenizer, tokens[:n])]
        assert [n for n in range(1, found[0] + 1) if ends(tokens[:n])] == found[:1]


# Trap: an answer's first word without its space, where vLLM has it: a stop that begins with one is missed, and a prompt
# and its continuation are one word.
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_continues_its_prompt_as_in_vllm(kind: str) -> None:
    tokenizer = wrapped(KINDS[kind]())
    prompt, tokens = encode_text(tokenizer, "what is that?"), encode(tokenizer, " yes or no")
    stream = DecodeStream(ids=prompt, skip_special_tokens=False)  # what vLLM looks for stops in
    said = [stream.step(tokenizer.backend_tokenizer, token) or "" for token in tokens]
    assert "".join(said) == " yes or no" == continuation(tokenizer, tokens)
    words = TokenText(tokenizer, before_others(tokenizer))
    assert "".join(words.feed([token]) for token in tokens) == " yes or no"
    for stop in (" yes", "yes", " y", " ", " or", "? yes"):
        ends = _Stop(frozenset(), (stop,), tokenizer).ends
        found = [n for n in range(1, len(tokens) + 1) if stop in "".join(said[:n])][:1]
        assert [n for n in range(1, len(tokens) + 1) if ends(tokens[:n])][:1] == found, stop


# Trap: transcripts and logprobs of words without the spaces between them, and two tokens of one name.
@pytest.mark.parametrize("kind", KINDS)
def test_the_texts_of_tokens_are_those_of_the_whole(kind: str) -> None:
    tokenizer, text = wrapped(KINDS[kind]()), "hello there, what is that?\n yes"
    tokens = encode(tokenizer, text, begins=True)
    texts = [token_text(tokenizer, token) for token in tokens]
    assert "".join(texts).removeprefix(" ") == text
    assert token_text(tokenizer, 2) == "</s>"


CLASSES = ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer", "GemmaTokenizerFast", "TokenizersBackend"]


# Trap: transformers builds DeepSeek-R1-Distill's tokenizer as a Llama 2's, which loses all spaces, and every tokenizer
# beside a model of type qwen2 as Qwen's.
@pytest.mark.parametrize("family", ["Llama 3", "Qwen 2.5", "Gemma 3"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_is_that_of_its_file_whatever_its_class_is_called(kind: str, family: str, tmp_path: Path) -> None:
    folder, made = save_random_model(family, tmp_path / "model"), wrapped(KINDS[kind](), CHATML)
    made.save_pretrained(folder)
    config, text = json.loads((folder / "tokenizer_config.json").read_text()), "that is  it,\n yes or 12 日本 é"
    for name in CLASSES:
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": name}))
        read = load_tokenizer(str(folder))
        read.save_pretrained(tmp_path / name)  # as vLLM reads it
        for tokenizer in (read, AutoTokenizer.from_pretrained(tmp_path / name)):
            assert tokenizer.encode(text) == made.encode(text)
            assert decode(tokenizer, made.encode(text)) == decode(made, made.encode(text))
            assert (tokenizer.chat_template, tokenizer.all_special_ids[:3]) == (CHATML, made.all_special_ids[:3])


# Trap: of a tokenizer.model alone transformers makes Mistral's without the space before a first word.
@pytest.mark.needs_vllm  # which brings sentencepiece
@pytest.mark.parametrize(("family", "warned"), [("Llama 3", False), ("Mistral", True)])
def test_a_tokenizer_that_is_made_otherwise_than_its_file_is_warned_of(
    family: str, warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sentencepiece import SentencePieceTrainer

    folder = save_random_model(family, tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}))
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(folder / "tokenizer"), vocab_size=320, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    load_tokenizer(str(folder))
    assert ("tokenizer.model writes 'yes it is' as" in capsys.readouterr().out) == warned


def test_a_text_with_its_bos_gets_no_second_one() -> None:
    tokenizer = wrapped(KINDS["Llama 2"]())
    assert encode_text(tokenizer, "<s>hello") == [1, *encode(tokenizer, "hello", begins=True)]
    assert encode_text(tokenizer, "hello") == tokenizer.encode("hello")


# Trap: a stop that no answer contains.
def test_tokenizers_that_change_texts_are_refused_where_a_stop_would_be_lost() -> None:
    lowercase = wrapped(byte_level(normalizer=normalizers.Lowercase()))
    with pytest.raises(ConfigError, match=r"role_colon .* turns into '\\n\\nuser:'"):
        get_renderer(None, lowercase)
    words = Tokenizer(models.WordLevel({**{token: i for i, token in enumerate(SPECIAL)}, "A": 5}, unk_token="<unk>"))
    with pytest.raises(ConfigError, match="the replies 'x' and '0' alike"):
        get_renderer(None, wrapped(words, CHATML))


@pytest.mark.parametrize("template", ["{{ messages[0].content + 1 }}", {"rag": CHATML}], ids=["wrong", "no default"])
def test_a_template_that_fails_is_one_line(template: Any) -> None:
    with pytest.raises(DataError, match="the chat template refuses the roles"):
        get_renderer(None, wrapped(byte_level(), template))


# Trap: transformers makes a tokenizer of the special tokens in tokenizer_config.json, which drops every text.
def test_a_tokenizer_without_its_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = save_random_model("Qwen 2.5", tmp_path)
    (folder / "tokenizer.json").unlink()
    for kind in ("Qwen2Tokenizer", "LlamaTokenizer", "GPT2Tokenizer"):
        config = {"tokenizer_class": kind, "eos_token": "</s>", "additional_special_tokens": ["<|im_end|>"]}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match="its vocabulary .* is missing"):
            load_tokenizer(str(folder))


# Trap: Mistral's repositories, of which transformers makes a tokenizer of mistral-common's, without a chat template and
# with a method where others have a dictionary; and a tokenizer.json that splits words otherwise than the model's own.
@pytest.mark.slow
@pytest.mark.needs_vllm  # which brings mistral-common, and so a real vocabulary
def test_mistrals_own_tokenizer_file_is_read_beside_a_tokenizer_json(tmp_path: Path) -> None:
    from mistral_common.tokens.tokenizers import tekken

    own = Path(tekken.__file__).parents[2] / "data" / "tekken_240911.json"
    folder = save_random_model("Mistral", tmp_path)
    for file in folder.glob("*token*"):
        file.unlink()
    shutil.copy(own, folder / "tekken.json")
    with pytest.raises(ModelError, match="tekken.json alone.*put a tokenizer.json"):
        load_tokenizer(str(folder))
    converted = PreTrainedTokenizerFast.from_pretrained(folder, bos_token="<s>", eos_token="</s>")
    converted.chat_template = "{{ bos_token }}{% for m in messages %}[INST]{{ m['content'] }}[/INST]{% endfor %}"
    converted.save_pretrained(folder)
    text, right = "'The'", tekken.Tekkenizer.from_file(own)
    split = pre_tokenizers.Split(Regex(r"'[tT]|[^\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    for wrong in (False, True):
        if wrong:  # as in repositories that were converted before the expression was mended
            saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
            saved.pre_tokenizer = pre_tokenizers.Sequence(
                [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
            )
            assert saved.encode(text).ids != right.encode(text, bos=False, eos=False)
            saved.save(str(folder / "tokenizer.json"))
            config = json.loads((folder / "config.json").read_text()) | {"transformers_version": "4.50.0"}
            (folder / "config.json").write_text(json.dumps(config))
        tokenizer = load_tokenizer(str(folder))
        assert tokenizer.encode(text, add_special_tokens=False) == right.encode(text, bos=False, eos=False)
        prompt = get_renderer("chat_template", tokenizer).build_generation_prompt([{"role": "user", "content": "a"}])
        assert tokenizer.decode(prompt.to_ints()) == "<s>[INST]a[/INST]"
