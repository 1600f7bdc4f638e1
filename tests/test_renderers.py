"""Renderers against hand-written cases, chat templates of several shapes, and random
conversations.
"""

import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.tokenizers import character_tokenizer
from posttrain.backend.types import ModelInput
from posttrain.renderers import RENDERERS as BY_NAME
from posttrain.renderers import get_renderer
from posttrain.renderers.chat_template import ChatTemplateRenderer
from posttrain.renderers.plain import PlainRenderer
from posttrain.renderers.role_colon import RoleColonRenderer
from posttrain.renderers.turns import decode, encode
from posttrain.renderers.types import Message, Renderer, TrainOnWhat
from posttrain.renderers.types import Tokenizer as AnyTokenizer

SPECIAL = ["<|pad|>", "<|endoftext|>", "<|bos|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "User: Assistant: System: hello there\n\nUser: hello hello\n\n",
    "what is that?\n\nAssistant: that is it.\n\nUser:",
] * 20
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|im_end|>{% endfor "
    "%}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
DROPS_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENS_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# as LLaVA's and SmolVLM's, which write a text only as a part of a content
READS_PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must "
    "alternate') }}"
    "{% endif %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}<|endoftext|>{% endif %}{% endfor %}"
)
CHAT: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "what is that?"},
    {"role": "assistant", "content": "that is it."},
]


def bpe_tokenizer(chat_template: str | None = None, add_bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE with real merges, among them some that cross what renderers write and what
    people say.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|endoftext|>",
        bos_token="<|bos|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=chat_template,
    )


CHARACTERS = character_tokenizer(512)
BPE = bpe_tokenizer(add_bos=True)
RENDERERS: dict[str, Renderer] = {
    "role_colon": get_renderer("role_colon", CHARACTERS),
    "role_colon, BPE": get_renderer("role_colon", BPE),
    "plain": get_renderer("plain", CHARACTERS),
    "plain, BPE": get_renderer("plain", BPE),
    "chatml": get_renderer("chat_template", CHARACTERS),
    "llama3, BPE": get_renderer("chat_template", bpe_tokenizer(LLAMA3, add_bos=True)),
}
END = {"role_colon": "\n\nUser:", "plain": "<|endoftext|>", "chatml": "<|im_end|>", "llama3": "<|im_end|>"}


def end_of(name: str) -> str:
    return END[name.split(",")[0]]


def weighted_text(renderer: Renderer, messages: list[Message], train_on_what: TrainOnWhat) -> str:
    tokens, weights = renderer.build_supervised_example(messages, train_on_what)
    return decode(renderer.tokenizer, [t for t, w in zip(tokens, weights, strict=True) if w == 1.0])


def template_tokens(tokenizer: AnyTokenizer, messages: list[Message], add_generation_prompt: bool = False) -> list[int]:
    options: Any = {"add_generation_prompt": add_generation_prompt, "tokenize": True, "return_dict": False}
    return tokenizer.apply_chat_template(messages, **options)  # type: ignore


@pytest.mark.parametrize("name", RENDERERS)
def test_weights_by_train_on_what(name):
    renderer, end = RENDERERS[name], end_of(name)
    assert weighted_text(renderer, CHAT, TrainOnWhat.LAST_ASSISTANT_MESSAGE).strip(" ") == f"that is it.{end}"
    both = weighted_text(renderer, CHAT, TrainOnWhat.ALL_ASSISTANT_MESSAGES)
    assert both.replace(" hello", "hello").replace(" that", "that") == f"hello{end}that is it.{end}"
    users = weighted_text(renderer, CHAT, TrainOnWhat.ALL_USER_AND_SYSTEM_MESSAGES)
    assert "what is that?" in users and "Be brief." in users and "that is it." not in users and "ssistant" not in users
    tokens, weights = renderer.build_supervised_example(CHAT, TrainOnWhat.ALL_TOKENS)
    assert weights == [1.0] * len(tokens)
    marked: list[Message] = [{**m, "trainable": i == 2} for i, m in enumerate(CHAT)]
    assert weighted_text(renderer, marked, TrainOnWhat.CUSTOMIZED).strip(" ") == f"hello{end}"


def test_role_colon_by_hand():
    renderer = RENDERERS["role_colon"]
    tokens, weights = renderer.build_supervised_example(CHAT[1:3])
    assert decode(CHARACTERS, tokens) == "User: hello there\n\nAssistant: hello\n\nUser:"
    assert weights == [0.0] * len("User: hello there\n\nAssistant:") + [1.0] * len(" hello\n\nUser:")
    prompt = renderer.build_generation_prompt(CHAT[:4], prefill="well")
    assert decode(CHARACTERS, prompt.to_ints()) == (
        "System: Be brief.\n\nUser: hello there\n\nAssistant: hello\n\nUser: what is that?\n\nAssistant: well"
    )


def test_pieces_are_encoded_by_themselves():
    """The text as a whole would merge across the border between prompt and reply, and the prompt
    would be no prefix.
    """
    tokens, _ = RENDERERS["role_colon, BPE"].build_supervised_example(CHAT)
    whole = BPE.encode(decode(BPE, tokens[1:]))
    prompt = RENDERERS["role_colon, BPE"].build_generation_prompt(CHAT[:4]).to_ints()
    assert tokens[: len(prompt)] == prompt != whole[: len(prompt)]


def test_plain_by_hand():
    messages: list[Message] = [{"role": "user", "content": "12+34="}, {"role": "assistant", "content": "46"}]
    tokens, weights = RENDERERS["plain"].build_supervised_example(messages)
    assert tokens == [*CHARACTERS.encode("12+34=46"), CHARACTERS.eos_token_id]
    assert weights == [0.0] * 6 + [1.0] * 3
    assert RENDERERS["plain"].get_stop_sequences() == [CHARACTERS.eos_token_id]


def test_user_messages_of_a_template_are_found_by_their_content():
    tokens, weights = RENDERERS["chatml"].build_supervised_example(CHAT[1:3], TrainOnWhat.ALL_MESSAGES)
    kept = decode(CHARACTERS, [t for t, w in zip(tokens, weights, strict=True) if w])
    assert kept == "hello there<|im_end|>hello<|im_end|>"
    # <|im_start|>, and the line break after the last turn
    assert weights[0] == 0.0 and weights[-1] == 0.0


@pytest.mark.parametrize("name", RENDERERS)
def test_bos_once_and_first(name):
    renderer = RENDERERS[name]
    expected = 1 if "BPE" in name else 0
    for tokens in (renderer.build_generation_prompt(CHAT[:2]).to_ints(), renderer.build_supervised_example(CHAT)[0]):
        assert [t for t, token in enumerate(tokens) if token == renderer.tokenizer.bos_token_id] == [0] * expected


text = st.text(st.sampled_from("ab eU:\n?é日"), min_size=1, max_size=12).map(str.strip).filter(bool)


@settings(max_examples=60)
@given(name=st.sampled_from(sorted(RENDERERS)), turns=st.lists(st.tuples(text, text), min_size=1, max_size=3))
def test_prompts_are_prefixes_and_weights_are_the_replies(name, turns):
    renderer = RENDERERS[name]
    messages: list[Message] = [
        Message(role=role, content=said)
        for turn in turns
        for role, said in zip(("user", "assistant"), turn, strict=True)
    ]
    tokens, weights = renderer.build_supervised_example(messages)
    replies = []
    for i in range(1, len(messages), 2):
        prompt = renderer.build_generation_prompt(messages[:i]).to_ints()
        assert tokens[: len(prompt)] == prompt
        action = []
        for token, weight in zip(tokens[len(prompt) :], weights[len(prompt) :], strict=True):
            if not weight:
                break
            action.append(token)
        assert renderer.parse_response(action) == (messages[i], True)
        if i < len(messages) - 1:  # what was said and sampled is where the next prompt begins
            following = renderer.build_generation_prompt(messages[: i + 2]).to_ints()
            assert following[: len(prompt) + len(action)] == prompt + action
        replies += action
    assert replies == [t for t, w in zip(tokens, weights, strict=True) if w]


# Trap: two stop sequences in one response.
@pytest.mark.parametrize("name", RENDERERS)
def test_parsing_counts_stops(name):
    renderer = RENDERERS[name]
    tokenizer, end = renderer.tokenizer, end_of(name)

    def parse(said: str):
        return renderer.parse_response(tokenizer.encode(said, add_special_tokens=False))

    assert parse(f"it is 7{end}") == ({"role": "assistant", "content": "it is 7"}, True)
    # a base model's end
    assert parse("it is 7<|endoftext|>") == ({"role": "assistant", "content": "it is 7"}, True)
    assert parse("it is 7\n") == ({"role": "assistant", "content": "it is 7\n"}, False)
    assert parse("") == ({"role": "assistant", "content": ""}, False)
    with pytest.raises(ConfigError, match="2 stops"):
        parse(f"it is 7{end} and 8{end}")
    with pytest.raises(ConfigError, match="2 stops"):
        parse(f"it is 7{end}<|endoftext|>")


@pytest.mark.parametrize("template", [None, LLAMA3, DROPS_THINKING, OPENS_THINKING, ALTERNATES])
def test_tokens_are_those_of_the_template(template):
    tokenizer = bpe_tokenizer(template, add_bos=True) if template else CHARACTERS
    renderer = ChatTemplateRenderer(tokenizer)
    for messages in (CHAT[1:2], CHAT[1:4], [Message(role="user", content="a <|im_end 日\n")]):
        expected = template_tokens(tokenizer, messages, add_generation_prompt=True)
        assert renderer.build_generation_prompt(messages).to_ints() == expected
    tokens, _ = renderer.build_supervised_example(CHAT[1:5], TrainOnWhat.ALL_TOKENS)
    assert tokens == template_tokens(tokenizer, CHAT[1:5])


def test_a_template_that_reads_parts_of_a_content_gets_the_text_as_one(capsys):
    tokenizer, plain = bpe_tokenizer(READS_PARTS), bpe_tokenizer(OPENS_THINKING.replace("<think>\n", ""))
    renderer, expected = get_renderer(None, tokenizer), get_renderer(None, plain)
    assert renderer.build_generation_prompt(CHAT[:2]) == expected.build_generation_prompt(CHAT[:2])
    assert renderer.build_supervised_example(CHAT) == expected.build_supervised_example(CHAT)
    assert renderer.has_extension_property
    assert "WARNING" not in capsys.readouterr().out


# Trap: chat templates that rewrite earlier turns.
def test_template_with_thinking_dropped_from_earlier_turns():
    renderer = ChatTemplateRenderer(bpe_tokenizer(DROPS_THINKING))
    thought: list[Message] = [*CHAT[:2], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nhello"}, *CHAT[3:]]
    assert not renderer.has_extension_property
    with pytest.raises(DataError, match=r"message 2 \(assistant\).*rewrites earlier turns.*last_assistant_message"):
        renderer.build_supervised_example(thought)
    assert weighted_text(renderer, thought, TrainOnWhat.LAST_ASSISTANT_MESSAGE) == "that is it.<|im_end|>"
    assert weighted_text(renderer, thought[:3], TrainOnWhat.ALL_ASSISTANT_MESSAGES).startswith("<think>\nhm")


def test_template_whose_prompt_says_what_replies_do_not_repeat():
    renderer = ChatTemplateRenderer(bpe_tokenizer(OPENS_THINKING))
    with pytest.raises(DataError, match=r"message 4 \(assistant\).*do not begin with those of the prompt"):
        renderer.build_supervised_example(CHAT, TrainOnWhat.LAST_ASSISTANT_MESSAGE)


def test_a_line_break_that_joins_the_prompt_is_named():
    renderer = get_renderer("chat_template", bpe_tokenizer(str(CHARACTERS.chat_template)))
    with pytest.raises(DataError, match=r"message 1 \(assistant\): it begins with '\\n', which the tokenizer joins"):
        renderer.build_supervised_example([{"role": "user", "content": "a"}, {"role": "assistant", "content": "\nb"}])


def test_extension_property_is_probed():
    assert RENDERERS["chatml"].has_extension_property
    # trims replies, so a sampled space would vanish
    assert not RENDERERS["llama3, BPE"].has_extension_property
    assert RENDERERS["role_colon"].has_extension_property and RENDERERS["plain"].has_extension_property


def test_templates_that_refuse_or_never_end_are_errors():
    renderer = ChatTemplateRenderer(bpe_tokenizer(ALTERNATES))
    assert renderer.get_stop_sequences() == [renderer.tokenizer.eos_token_id]
    assert (
        weighted_text(renderer, CHAT[1:], TrainOnWhat.ALL_ASSISTANT_MESSAGES)
        == " hello<|endoftext|> that is it.<|endoftext|>"
    )
    with pytest.raises(DataError, match="roles must alternate"):
        renderer.build_generation_prompt(CHAT)
    with pytest.raises(ConfigError, match="no turn with a special token"):
        ChatTemplateRenderer(bpe_tokenizer("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"))
    with pytest.raises(ConfigError, match="role_colon"):
        renderer.build_generation_prompt(CHAT[1:], role="user")


def test_nothing_to_train_on_is_an_error():
    renderer = RENDERERS["role_colon"]
    with pytest.raises(DataError, match="roles are system, user"):
        renderer.build_supervised_example(CHAT[:2])
    with pytest.raises(DataError, match="the last message is the user's"):
        renderer.build_supervised_example(CHAT[:4], TrainOnWhat.LAST_ASSISTANT_MESSAGE)
    with pytest.raises(DataError, match="without messages"):
        renderer.build_supervised_example([])
    with pytest.raises(DataError, match="message 0 .system. needs a 'trainable'"):
        renderer.build_supervised_example(CHAT, TrainOnWhat.CUSTOMIZED)
    with pytest.raises(DataError, match="message 0 .system. must not have a 'trainable'"):
        renderer.build_supervised_example([{**m, "trainable": True} for m in CHAT])


def test_choice_by_name():
    assert type(get_renderer(None, CHARACTERS)).__name__ == "ChatTemplateRenderer"
    assert type(get_renderer(None, BPE)).__name__ == "RoleColonRenderer"
    with pytest.raises(ConfigError, match="did you mean 'role_colon'"):
        get_renderer("rolecolon", BPE)
    with pytest.raises(ConfigError, match="no chat template: use renderer_name=role_colon"):
        get_renderer("chat_template", BPE)


def test_a_renderer_that_writes_another_template_is_warned_of(monkeypatch, capsys):
    class WithoutTheHeaders(ChatTemplateRenderer):
        def build_generation_prompt(self, messages):
            tokens = super().build_generation_prompt(messages).to_ints()
            return ModelInput.from_ints(tokens[:-1])

    monkeypatch.setitem(BY_NAME, "mine", WithoutTheHeaders)
    get_renderer("chat_template", CHARACTERS)
    assert "WARNING" not in capsys.readouterr().out
    get_renderer("mine", CHARACTERS)
    assert (
        "WARNING WithoutTheHeaders writes a prompt of system, user differently from the tokenizer's"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("name", RENDERERS)
def test_renderers_pickle(name):
    renderer = pickle.loads(pickle.dumps(RENDERERS[name]))
    assert renderer.build_supervised_example(CHAT) == RENDERERS[name].build_supervised_example(CHAT)


class ImitatedTemplate(PlainRenderer):
    """Writes the presets' template by hand, with `after_role` where the template has a line
    break.
    """

    after_role = "\n"

    def build_generation_prompt(self, messages, role="assistant", prefill=None):  # noqa: ANN001, ANN201
        said = "".join(f"<|im_start|>{m['role']}{self.after_role}{m['content']}<|im_end|>\n" for m in messages)
        return ModelInput.from_ints(encode(self.tokenizer, f"{said}<|im_start|>{role}{self.after_role}"))


class WrongTemplate(ImitatedTemplate):
    after_role = " "


# Trap: a chat template imitated wrongly.
@pytest.mark.parametrize(
    "kind", [ImitatedTemplate, WrongTemplate, PlainRenderer, RoleColonRenderer, ChatTemplateRenderer]
)
def test_a_template_that_is_imitated_wrongly_is_warned_of_and_nothing_else(
    kind: type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BY_NAME, "mine", kind)
    get_renderer("mine", character_tokenizer(512))
    said = capsys.readouterr().out
    assert ("WARNING" in said) == (kind is WrongTemplate)
    if kind is WrongTemplate:
        assert "it writes ' Be brie', the template '\\nBe brie'" in said and "system, user" in said
