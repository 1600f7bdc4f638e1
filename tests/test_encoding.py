"""Conversations are rendered in parts that are remembered: the tokens are those of the whole text,
and the work grows with the conversation, not with its square.
"""

from functools import partial

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from posttrain.backend.tokenizers import character_tokenizer
from posttrain.renderers import encoding as encoding_module
from posttrain.renderers import get_renderer
from posttrain.renderers.encoding import Encoder, separates
from posttrain.renderers.types import Message
from rl.message_env import next_prompt
from tests.test_renderers import bpe_tokenizer

END = "<end>"
AddedEnd = partial(AddedToken, END, special=True)


def metaspace_tokenizer(*added: AddedToken) -> PreTrainedTokenizerFast:
    """Writes a mark before the first word of a text, but not after a special token."""
    letters = {token: i for i, token in enumerate(["<unk>", "▁", "\n", *"abdefgnc<>"])}
    tokenizer = Tokenizer(models.BPE({**letters, "▁a": len(letters)}, [("▁", "a")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens([*added])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TEXTS = ["", "a", END, f"a b{END}", f" a{END}{END}a", f"a{END}\n a b{END} a{END}a ", f"{END} {END}\n{END}"]


@pytest.mark.parametrize("flags", [{}, {"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}])
def test_parts_have_the_tokens_of_the_whole_text(flags: dict[str, bool]) -> None:
    for tokenizer in (metaspace_tokenizer(AddedEnd(**flags)), with_end(bpe_tokenizer(), **flags)):
        assert separates(tokenizer, id_of_end(tokenizer))
        encoder = Encoder(tokenizer)
        for text in TEXTS * 2:
            assert encoder.parts(text, END) == tokenizer.encode(text, add_special_tokens=False), text


def with_end(tokenizer: PreTrainedTokenizerFast, **flags: bool) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens([AddedEnd(**flags)])  # type: ignore[list-item]
    return tokenizer


def id_of_end(tokenizer: PreTrainedTokenizerFast) -> int:
    return tokenizer.added_tokens_encoder[END]


# Trap: "<end>a" is a token of its own, which a text cut after each "<end>" would lose.
def test_a_token_within_another_one_separates_nothing() -> None:
    longer = AddedToken(f"{END}a", special=True)
    for added in ([AddedEnd(), longer], [AddedEnd(normalized=True)], [AddedEnd(single_word=True)]):
        tokenizer = metaspace_tokenizer(*added)
        assert not separates(tokenizer, id_of_end(tokenizer))
    assert not separates(metaspace_tokenizer(AddedEnd()), 1)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding_module, "MOST_CHARS", 10)
    encoder = Encoder(bpe_tokenizer())
    for number in range(20):
        assert encoder(f"{number:04d}") == bpe_tokenizer().encode(f"{number:04d}")
        assert len(encoder._tokens) <= 3


def said(role: str, number: int) -> Message:
    return Message(role=role, content=f"This is turn {number} of a long talk.")


@pytest.mark.parametrize("name", ["chat_template", "role_colon", "plain"])
@pytest.mark.parametrize("use", ["episode", "example"])
def test_tokenizing_grows_with_the_turns_and_not_with_their_square(
    name: str, use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def characters_encoded(turns: int) -> int:
        renderer, encoded = get_renderer(name, character_tokenizer(512)), 0

        def counting(tokenizer: PreTrainedTokenizerFast, text: str, begins: bool) -> list[int]:
            nonlocal encoded
            encoded += len(text)
            return tokenizer.encode(text, add_special_tokens=False)

        monkeypatch.setattr(encoding_module, "encode", counting)
        conversation = [said("user", 0)]
        tokens = renderer.build_generation_prompt(conversation).to_ints()
        for turn in range(1, turns):
            message, following = said("assistant", turn), said("user", turn)
            if use == "episode":
                action = renderer.tokenizer.encode(message["content"])
                tokens = next_prompt(renderer, tokens, action, [*conversation, message], [following])
            conversation += [message, following]
        if use == "example":
            renderer.build_supervised_example(conversation)
        return encoded

    assert characters_encoded(40) < 2.5 * characters_encoded(20)
