"""Thinking and tool calls as parts: read from what models write and written again token for token,
against the chat templates of five models and the library of Mistral.
"""

import json
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.tokenizers import character_tokenizer
from posttrain.renderers import (
    from_openai,
    get_renderer,
    get_text_content,
    get_thinking,
    get_tool_calls,
    to_openai,
    with_tools,
)
from posttrain.renderers.chat_template import ChatTemplateRenderer
from posttrain.renderers.parts import tool_spec
from posttrain.renderers.plain import PlainRenderer
from posttrain.renderers.role_colon import RoleColonRenderer
from posttrain.renderers.turns import decode, encode
from posttrain.renderers.types import (
    Message,
    Part,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolSpec,
)
from tests.conftest import ROOT

# file, beginning of a text, end of a turn, the other special tokens, tokens that are added but not
# special
MODELS: dict[str, tuple[str, str, list[str], list[str]]] = {
    "qwen2_5": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>"], ["<tool_call>", "</tool_call>"]),
    "qwen3": (
        "<|endoftext|>",
        "<|im_end|>",
        ["<|im_start|>"],
        ["<tool_call>", "</tool_call>", "<think>", "</think>", "<tool_response>", "</tool_response>"],
    ),
    "llama3_1": (
        "<|begin_of_text|>",
        "<|eot_id|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>"],
        [],
    ),
    "gptoss": (
        "<|startoftext|>",
        "<|return|>",
        ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>"],
        [],
    ),
    "mistral": (
        "<s>",
        "</s>",
        ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
        + ["[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[THINK]", "[/THINK]", "[ARGS]", "[CALL_ID]"],
        [],
    ),
}
CALCULATOR: ToolSpec = {
    "name": "calculator",
    "description": "The value of an expression.",
    "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
}


def template_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE with some merges, the model's special tokens and its chat template."""
    bos, eos, special, added = MODELS[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=[bos, eos, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ['{"name": "calculator", "arguments": {"expression": "12 + 34"}}', "assistant to=functions"] * 9
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=special,
        chat_template=(ROOT / f"tests/chat_templates/{name}.jinja").read_text().rstrip("\n"),
        clean_up_tokenization_spaces=False,
    )


TOKENIZERS = {name: template_tokenizer(name) for name in MODELS} | {"chatml": character_tokenizer(2048)}
RENDERERS = {name: ChatTemplateRenderer(tokenizer) for name, tokenizer in TOKENIZERS.items()}
WITH_TOOLS = {name: renderer.with_tools([CALCULATOR]) for name, renderer in RENDERERS.items()}


def text(said: str) -> TextPart:
    return {"type": "text", "text": said}


def thinking(thought: str) -> ThinkingPart:
    return {"type": "thinking", "thinking": thought}


def call(expression: str, number: int = 1) -> ToolCallPart:
    arguments = {"expression": expression}
    return {"type": "tool_call", "id": f"call{number:05d}", "name": "calculator", "arguments": arguments}


def user(said: str) -> Message:
    return {"role": "user", "content": said}


def assistant(*parts: Part) -> Message:
    return {"role": "assistant", "content": "", "parts": [*parts]}


def tool(answer: str, number: int = 1) -> Message:
    return {"role": "tool", "content": answer, "name": "calculator", "tool_call_id": f"call{number:05d}"}


# --- written as the template writes -------------------------------------------------------------

ONE_CALL = [user("1+2?"), assistant(call("1+2")), tool("3"), assistant(text("It is 3."))]
TWO_CALLS = [user("1+2, 3+4?"), assistant(call("1+2"), call("3+4", 2)), tool("3"), tool("7", 2)]
THOUGHT = [
    user("1+2?"),
    assistant(thinking("A sum."), call("1+2")),
    tool("3"),
    assistant(thinking("So.\n\nThree."), text("3")),
]
SAID = [user("1+2?"), assistant(text("Let me see."), call("é")), tool("3")]
CONVERSATIONS = {
    "qwen2_5": [ONE_CALL, TWO_CALLS, SAID, [*ONE_CALL, user("And 5?")]],
    "qwen3": [ONE_CALL, TWO_CALLS, SAID, THOUGHT, THOUGHT[:3], [*THOUGHT, user("And 5?")]],
    "llama3_1": [ONE_CALL, ONE_CALL[:3], [*ONE_CALL, user("And 5?")]],
    "gptoss": [ONE_CALL, THOUGHT, THOUGHT[:3], [*THOUGHT, user("And 5?")]],
    "mistral": [ONE_CALL, TWO_CALLS, [*ONE_CALL, user("And 5?")]],
}


def for_template(name: str, message: Message) -> dict[str, Any]:
    """As the model's page tells users to write it, arguments as objects."""
    fields = to_openai(message)
    for written in fields.get("tool_calls", []):
        written["function"]["arguments"] = json.loads(written["function"]["arguments"])
    if name == "gptoss" and "reasoning_content" in fields:
        fields["thinking"] = fields.pop("reasoning_content")
    return fields


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_are_those_of_the_models_template(name: str):
    tokenizer = TOKENIZERS[name]
    for messages in CONVERSATIONS[name]:
        for prompt in (True, False) if messages[-1]["role"] == "assistant" else (True,):
            expected = tokenizer.apply_chat_template(
                [for_template(name, message) for message in messages],
                tools=[{"type": "function", "function": CALCULATOR}],  # type: ignore[list-item]
                add_generation_prompt=prompt,
                tokenize=False,
            )
            written = WITH_TOOLS[name]._render(messages, add_generation_prompt=prompt)
            assert decode(tokenizer, written) == expected
            assert written == encode(tokenizer, str(expected))


# Trap: Qwen's templates write nothing for a message of the role "developer".
@pytest.mark.parametrize("role", ["system", "developer", "tool"])
@pytest.mark.parametrize("name", RENDERERS)
def test_a_message_is_written_or_refused_by_its_role(name: str, role: str):
    renderer = RENDERERS[name]
    turn = [user("a"), assistant(text("b"))]
    messages: list[Message] = [*turn, {"role": role, "content": "Hm?"}, *turn]
    messages = messages if role == "tool" else messages[2:]
    try:
        written = decode(renderer.tokenizer, renderer.build_generation_prompt(messages).to_ints())
    except DataError as error:
        assert repr(role) in str(error)
    else:
        assert "Hm?" in written


def test_mistral_writes_what_its_own_library_writes():
    mistral = pytest.importorskip("mistral_common.tokens.tokenizers.mistral")
    request = pytest.importorskip("mistral_common.protocol.instruct.request")
    messages = [to_openai(message) for message in [*ONE_CALL[:2], ONE_CALL[2]]]
    library = mistral.MistralTokenizer.v3(is_tekken=True)
    keep = pytest.importorskip("mistral_common.tokens.tokenizers.base").SpecialTokenPolicy.KEEP
    encoded = library.encode_chat_completion(
        request.ChatCompletionRequest.from_openai(
            messages=messages, tools=[{"type": "function", "function": CALCULATOR}]
        )
    )
    written = WITH_TOOLS["mistral"].build_generation_prompt(ONE_CALL[:3]).to_ints()
    tokenizer = TOKENIZERS["mistral"]
    assert decode(tokenizer, written) == library.decode(encoded.tokens, special_token_policy=keep)


# --- read, and written again --------------------------------------------------------------------

ARGUMENTS = '{"expression": "1+2"}'
HERMES_CALL = f'<tool_call>\n{{"name": "calculator", "arguments": {ARGUMENTS}}}\n</tool_call>'
HERMES_SECOND = HERMES_CALL.replace("1+2", "3+4")
WRITTEN: list[tuple[str, str, list[Part]]] = [
    ("qwen2_5", f"{HERMES_CALL}<|im_end|>", [call("1+2")]),
    ("qwen2_5", f"{HERMES_CALL}\n{HERMES_SECOND}<|im_end|>", [call("1+2"), call("3+4", 2)]),
    ("qwen2_5", f"Let me see.\n{HERMES_CALL}<|im_end|>", [text("Let me see."), call("1+2")]),
    ("qwen3", f"<think>\nA sum.\n</think>\n\n{HERMES_CALL}<|im_end|>", [thinking("A sum."), call("1+2")]),
    (
        "qwen3",
        "<think>\nTwo.\n\nLines.\n</think>\n\nYes.\n\nNo.<|im_end|>",
        [thinking("Two.\n\nLines."), text("Yes.\n\nNo.")],
    ),
    ("chatml", f"Well.\n{HERMES_CALL}<|im_end|>", [text("Well."), call("1+2")]),
    ("llama3_1", f'{{"name": "calculator", "parameters": {ARGUMENTS}}}<|eot_id|>', [call("1+2")]),
    (
        "gptoss",
        "<|channel|>analysis<|message|>A sum.<|end|><|start|>assistant to=functions.calculator"
        f"<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>",
        [thinking("A sum."), call("1+2")],
    ),
    ("gptoss", f" to=functions.calculator<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>", [call("1+2")]),
    (
        "gptoss",
        "<|channel|>analysis<|message|>So.<|end|><|start|>assistant<|channel|>final<|message|>Three.\n<|return|>",
        [thinking("So."), text("Three.\n")],
    ),
    (
        "mistral",
        f'[TOOL_CALLS][{{"name": "calculator", "arguments": {ARGUMENTS}, "id": "call00001"}}]</s>',
        [call("1+2")],
    ),
]


@pytest.mark.parametrize(("name", "written", "expected"), WRITTEN)
def test_responses_are_read_and_written_again_token_for_token(name: str, written: str, expected: list[Part]):
    renderer = WITH_TOOLS[name]
    tokens = encode(renderer.tokenizer, written)
    message, ended = renderer.parse_response(tokens)
    assert ended and message.get("parts") == expected
    for again in (message, assistant(*expected)):  # what was sampled, and the same parts by hand
        whole, weights = renderer.build_supervised_example([user("1+2?"), again])
        assert [t for t, weight in zip(whole, weights, strict=True) if weight] == tokens
        assert get_text_content(again) == "".join(part["text"] for part in expected if part["type"] == "text")


OTHERWISE: list[tuple[str, str, list[Part]]] = [
    ("qwen3", f'<tool_call>{{"name":"calculator","arguments":{ARGUMENTS}}}</tool_call><|im_end|>', [call("1+2")]),
    ("llama3_1", f'<|python_tag|>{{"name": "calculator", "parameters": {ARGUMENTS}}}<|eom_id|>', [call("1+2")]),
    ("llama3_1", f'{{"type": "function", "name": "calculator", "parameters": {ARGUMENTS}}}<|eot_id|>', [call("1+2")]),
    (
        "gptoss",
        "<|channel|>commentary<|message|>I will add.<|end|><|start|>assistant<|channel|>commentary "
        f"to=functions.calculator <|constrain|>json<|message|>{ARGUMENTS}<|call|>",
        [text("I will add."), call("1+2")],
    ),
    ("mistral", f"Well.[TOOL_CALLS]calculator[ARGS]{ARGUMENTS}</s>", [text("Well."), call("1+2")]),
    (
        "mistral",
        f"[THINK]Two.[/THINK][TOOL_CALLS]calculator[ARGS]{ARGUMENTS}[TOOL_CALLS]calculator[CALL_ID]abc[ARGS]{{}}</s>",
        [thinking("Two."), call("1+2"), {**call(""), "id": "abc", "arguments": {}}],
    ),
]


@pytest.mark.parametrize(("name", "written", "expected"), OTHERWISE)
def test_other_ways_of_writing_are_read_too(name: str, written: str, expected: list[Part]):
    message, ended = WITH_TOOLS[name].parse_response(encode(TOKENIZERS[name], written))
    assert ended and message.get("parts") == expected


@pytest.mark.parametrize(
    ("name", "said"),
    [(name, "it is 7\n") for name in RENDERERS] + [("llama3_1", '{"answer": 7}'), ("llama3_1", '{"name": "Ann"}')],
)
def test_a_text_has_no_parts(name: str, said: str):
    renderer = RENDERERS[name]  # offers no tools, so a Llama's JSON is text
    message, _ = renderer.parse_response(encode(renderer.tokenizer, said))
    assert message == {"role": "assistant", "content": said}


# Trap: a malformed call read as text, and scored as an answer.
@pytest.mark.parametrize(
    ("name", "written", "error"),
    [
        (
            "qwen3",
            '<tool_call>\n{"name": "calculator"\n</tool_call>',
            "not JSON: Expecting ',' delimiter at character 22",
        ),
        ("qwen3", '<tool_call>\n{"name": "calculator"}\n</tool_call>', '"arguments" must be an object'),
        ("qwen3", '<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>', 'an object with a "name" is needed'),
        ("qwen3", "<tool_call>\n[]\n</tool_call>", 'an object with a "name" is needed'),
        ("qwen3", '<tool_call>\n{"name": "f", "arguments": {"x": NaN}}\n</tool_call>', "NaN is not JSON"),
        ("qwen3", f"<tool_call>\n{'[' * 100_000}\n</tool_call>", "nested too deeply"),
        ("qwen3", '<tool_call>\n{"name": "calculator", "arguments": {}}', "</tool_call> is missing"),
        (
            "llama3_1",
            '{"name": "calculator", "parameters": {}}; {"name": "f", "parameters": {}}',
            "not JSON: Extra data",
        ),
        ("llama3_1", '{"name": "calculator", "arguments": {}}', '"parameters" must be an object'),
        ("gptoss", " to=functions.calculator<|channel|>commentary json<|message|>1+2", "not JSON: Extra data"),
        ("mistral", '[TOOL_CALLS][{"name": "calculator"}]', '"arguments" must be an object'),
        ("mistral", "[TOOL_CALLS]{}", "a list of calls is needed"),
        ("mistral", "[TOOL_CALLS]calculator[ARGS]{", "not JSON"),
    ],
)
def test_a_malformed_call_has_its_error(name: str, written: str, error: str):
    renderer = WITH_TOOLS[name]
    message, _ = renderer.parse_response(encode(renderer.tokenizer, written))
    (part,) = get_tool_calls(message)
    assert part["type"] == "unparsed_tool_call" and error in part["error"]
    assert part["name"] == ("calculator" if name == "gptoss" or "[ARGS]" in written else "")
    # the conversation can go on from it
    prompt = renderer.build_generation_prompt([user("1+2?"), message, tool(f"error: {error}", 1)])
    assert f"error: {error}" in decode(renderer.tokenizer, prompt.to_ints()).replace("\\", "")  # some write it as JSON


def test_thinking_that_the_prompt_has_begun():
    tokenizer = character_tokenizer(512)
    tokenizer.chat_template = str(tokenizer.chat_template).replace("assistant\n{", "assistant\n<think>\n{")
    message, ended = ChatTemplateRenderer(tokenizer).parse_response(
        encode(tokenizer, "Hm.\n</think>\n\nYes.<|im_end|>")
    )
    assert ended and message.get("parts") == [thinking("Hm."), text("Yes.")] and get_thinking(message) == "Hm."


def test_thinking_of_earlier_turns_is_kept_or_dropped_as_the_template_does():
    later = [*THOUGHT, user("And 5?")]
    for name, kept_within, kept_after in (("qwen3", True, False), ("gptoss", True, False), ("chatml", True, True)):
        written = {
            n: decode(TOKENIZERS[name], WITH_TOOLS[name]._render(THOUGHT[:n] if n < 5 else later)) for n in (3, 5)
        }
        assert ("A sum." in written[3]) == kept_within and ("A sum." in written[5]) == kept_after


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "mistral", "chatml"])
def test_all_turns_of_an_episode_with_a_call_can_be_trained_on(name: str):
    renderer = WITH_TOOLS[name]
    tokens, weights = renderer.build_supervised_example(ONE_CALL)
    trained = decode(renderer.tokenizer, [t for t, weight in zip(tokens, weights, strict=True) if weight])
    end = MODELS[name][1] if name in MODELS else "<|im_end|>"
    written = next(said for known, said, parts in WRITTEN if known == name and parts[-1] == call("1+2"))
    written = written.split("\n</think>\n\n")[-1].removeprefix("Well.\n")
    answer = "<think>\n\n</think>\n\nIt is 3." if name == "qwen3" else "It is 3."
    assert trained == f"{written}{answer}{end}"


# Trap: calls and texts that a template leaves out, and nobody says so.
@pytest.mark.parametrize(
    ("name", "parts", "lost"),
    [
        ("llama3_1", [call("1+2"), call("3+4", 2)], "calls after the first"),
        ("llama3_1", [text("Let me see."), call("1+2")], "text"),
        ("llama3_1", [thinking("A sum."), call("1+2")], "thinking"),
        ("gptoss", [call("1+2"), call("3+4", 2)], "calls after the first"),
        ("mistral", [text("Let me see."), call("1+2")], "text"),
    ],
)
def test_examples_of_which_the_template_would_leave_out_a_part_are_refused(name: str, parts: list[Part], lost: str):
    with pytest.raises(DataError, match=rf"message 1 \(assistant\): the chat template leaves out its {lost}: make a"):
        WITH_TOOLS[name].build_supervised_example([user("1+2, 3+4?"), assistant(*parts)])
    talk = [user("1+2, 3+4?"), assistant(*parts), tool("3"), tool("7", 2)]
    if "calls" in lost:
        with pytest.raises(
            DataError, match=rf"message 1 \(assistant\): the chat template leaves out its {lost}: make a"
        ):
            WITH_TOOLS[name].build_generation_prompt(talk)
    # white space beside a call is no text
    RENDERERS["llama3_1"].build_supervised_example([user("1+2?"), assistant(text("\n"), call("1+2"))])


CALLS_OF_ITS_OWN = "{% for call in message.tool_calls or [] %}<function={{ call.function.name }}>{% endfor %}"
THINKING_OF_ITS_OWN = "{% if message.reasoning_content %}[[{{ message.reasoning_content }}]]{% endif %}"


@pytest.mark.parametrize(
    ("markup", "part", "complaint"),
    [
        (CALLS_OF_ITS_OWN, call("1+2"), "writes tool calls in no format that is known here"),
        (THINKING_OF_ITS_OWN, thinking("Hm."), "writes thinking between markers of its own"),
    ],
)
def test_what_a_template_writes_in_a_format_of_its_own_is_refused_in_examples(markup: str, part: Part, complaint: str):
    tokenizer = character_tokenizer(512)
    template = str(tokenizer.chat_template)
    tokenizer.chat_template = template.replace("{{ message['content'] }}", markup + "{{ message['content'] }}")
    assert tokenizer.chat_template != template
    renderer = ChatTemplateRenderer(tokenizer)
    with pytest.raises(DataError, match=rf"message 1 \(assistant\): the chat template {complaint}"):
        renderer.build_supervised_example([user("a"), assistant(part), user("b"), assistant(text("c"))])
    sampled: Message = {**assistant(part, text("c")), "content": "as the model wrote it"}
    assert renderer.build_supervised_example([user("a"), sampled])[0]


# --- names, options, messages of other programs -------------------------------------------------


def test_options_of_the_template_are_part_of_the_name(capsys: pytest.CaptureFixture[str]):
    qwen = TOKENIZERS["qwen3"]
    for name in ("chat_template:enable_thinking=false", "disable_thinking"):
        prompt = get_renderer(name, qwen).build_generation_prompt([user("a")])
        assert decode(qwen, prompt.to_ints()).endswith("<think>\n\n</think>\n\n")
    gptoss = get_renderer("chat_template:reasoning_effort=low,builtin_tools=[]", TOKENIZERS["gptoss"])
    assert "Reasoning: low" in decode(gptoss.tokenizer, gptoss.build_generation_prompt([user("a")]).to_ints())
    assert "WARNING" not in capsys.readouterr().out
    for name, error in (
        ("chat_template:enable_thinking", "not of the form name=value"),
        ("chat_template:thinking_budget=3", "reads no option 'thinking_budget'"),
        ("plain:enable_thinking=false", "only chat_template has options"),
        ("plane:enable_thinking=false", "did you mean 'plain'"),
    ):
        with pytest.raises(ConfigError, match=error):
            get_renderer(name, qwen)
    with pytest.raises(ConfigError, match="reads no option 'enable_thinking'"):
        get_renderer("disable_thinking", TOKENIZERS["qwen2_5"])


def test_renderers_without_tools_say_so():
    with pytest.raises(ConfigError, match="PlainRenderer cannot write tools: use renderer_name=chat_template"):
        with_tools(PlainRenderer(TOKENIZERS["chatml"]), [CALCULATOR])
    for kind in (PlainRenderer, RoleColonRenderer):
        with pytest.raises(DataError, match="assistant's message has thinking or tool calls"):
            kind(TOKENIZERS["chatml"]).build_generation_prompt(ONE_CALL[:2])
    tokenizer = character_tokenizer(512)
    tokenizer.chat_template = str(tokenizer.chat_template) + "{% for tool in tools or [] %}{{ tool }}{% endfor %}"
    with pytest.raises(ConfigError, match="no format that is known here .harmony, mistral, llama3, hermes."):
        with_tools(ChatTemplateRenderer(tokenizer), [CALCULATOR])


def test_a_template_without_tools_lists_them_in_the_system_message():
    renderer = with_tools(RENDERERS["chatml"], [CALCULATOR])
    written = decode(renderer.tokenizer, renderer.build_generation_prompt(TWO_CALLS).to_ints())
    assert written.startswith('<|im_start|>system\n{"name": "calculator"') and "To call: <tool_call>" in written
    assert written.endswith(
        "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n7\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    asked = renderer.build_generation_prompt([Message(role="system", content="Be brief."), user("a")]).to_ints()
    assert "system\nBe brief.\n\n{" in decode(renderer.tokenizer, asked)


def test_messages_of_the_openai_api():
    for message in (*THOUGHT, *TWO_CALLS, *SAID):
        assert from_openai(to_openai(message)) == message or "parts" not in message
    assert from_openai(
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    ) == user("ab")
    unread, _ = WITH_TOOLS["qwen3"].parse_response(encode(TOKENIZERS["qwen3"], "Hm.<tool_call>\n{\n</tool_call>"))
    assert to_openai(unread) == {"role": "assistant", "content": "Hm.\n{"}
    for fields, error in (
        ({"role": "user"}, "needs a 'role' and a 'content'"),
        ({"role": "user", "content": [{"image": 1}]}, "something other than texts"),
        # Trap: the thinking of some clients taken for a part of the answer
        ({"role": "assistant", "content": [{"type": "reasoning", "text": "Hm."}]}, "a piece of the type 'reasoning'"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            r"tool_calls\[0\]: .* no JSON",
        ),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}, r"tool_calls\[0\] needs"),
    ):
        with pytest.raises(DataError, match=error):
            from_openai(fields)
    call = {"function": {"name": "f", "arguments": ""}}  # as some servers write a call without arguments
    assert get_tool_calls(from_openai({"role": "assistant", "tool_calls": [call]}))[0]["arguments"] == {}  # type: ignore[typeddict-item]
    assert tool_spec({"type": "function", "function": CALCULATOR}) == tool_spec(CALCULATOR) == CALCULATOR
    for name in ("input_schema", "inputSchema"):  # Anthropic's, and MCP's
        assert (
            tool_spec({name if key == "parameters" else key: value for key, value in CALCULATOR.items()}) == CALCULATOR
        )
    with pytest.raises(DataError, match="a tool needs a 'name'"):
        tool_spec({})
    with pytest.raises(DataError, match="'f': 'parameters' must be a JSON schema with type 'object'"):
        tool_spec({"name": "f", "parameters": {"type": "string"}})


@pytest.mark.parametrize("name", ["plain", "role_colon", "chat_template"])
def test_messages_in_the_form_of_the_openai_api_are_translated_or_refused(name):
    """Trap: a template that writes a list as Python does, and answers that are trained on without their calls."""
    renderer = get_renderer(name, character_tokenizer(512))
    texts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert renderer.build_generation_prompt([{"role": "user", "content": texts}]) == renderer.build_generation_prompt(  # type: ignore[list-item]
        [user("ab")]
    )
    given = {"role": "assistant", "content": "", "tool_calls": to_openai(ONE_CALL[1])["tool_calls"]}
    if name == "chat_template":
        tokens, _ = renderer.build_supervised_example([user("a"), given])  # type: ignore[list-item]
        assert '{"name": "calculator"' in decode(renderer.tokenizer, tokens)
    else:
        with pytest.raises(DataError, match="which renderer_name=chat_template can write"):
            renderer.build_supervised_example([user("a"), given])  # type: ignore[list-item]
    for wrong, error in (
        (
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, *texts]},
            "message 1: .* no images or sound",
        ),
        ({"role": "user", "content": None}, "message 1: a message needs a 'role'"),
        ({"content": "a"}, "message 1: a message needs a 'role'"),
        ("Hi", "message 1 must have a 'role'"),
    ):
        for build in (renderer.build_generation_prompt, renderer.build_supervised_example):
            with pytest.raises(DataError, match=error):
                build([user("a"), wrong])  # type: ignore[list-item]
