"""Compares a renderer that imitates a chat template with the tokenizer's template. Sampler and
trainer see the same tokens, so no comparison of the two shows a wrong template. A renderer imitates
a template if its prompt has special tokens other than BOS and EOS; plain text is a choice.
"""

import jinja2

from posttrain.backend.errors import CookbookError
from posttrain.renderers.turns import common_prefix, decode
from posttrain.renderers.types import Message, Renderer

CONVERSATIONS: list[list[Message]] = [
    [Message(role="system", content="Be brief."), Message(role="user", content="Hello")],
    [
        Message(role="user", content="Hello"),
        Message(role="assistant", content="Hi."),
        Message(role="user", content="Who?"),
    ],
]


def difference_from_template(renderer: Renderer) -> str | None:
    """The first difference between a prompt and `apply_chat_template`'s, as text; None without one,
    or without a template."""
    tokenizer = renderer.tokenizer
    if not tokenizer.chat_template:
        return None
    ends = (tokenizer.bos_token, tokenizer.eos_token)
    controls = {token for token in tokenizer.all_special_tokens if token not in ends}
    for messages in CONVERSATIONS:
        try:
            prompt = renderer.build_generation_prompt(messages).to_ints()
            if not controls & set(tokenizer.convert_ids_to_tokens(prompt)):
                continue
            expected = tokenizer.apply_chat_template(
                messages,  # type: ignore[arg-type]
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **getattr(renderer, "template_kwargs", {}),
            )
        except (jinja2.TemplateError, CookbookError):  # e.g. no system role
            continue
        if str(messages[-1]["content"]) not in decode(tokenizer, expected):  # type: ignore[arg-type]
            continue  # a template that reads parts of a content
        if prompt != expected:
            roles = [str(message["role"]) for message in messages]
            return _first_difference(renderer, roles, prompt, expected)  # type: ignore[arg-type]
    return None


def _first_difference(renderer: Renderer, roles: list[str], prompt: list[int], expected: list[int]) -> str:
    t, tokenizer = common_prefix(prompt, expected), renderer.tokenizer
    return (
        f"{type(renderer).__name__} writes a prompt of {', '.join(roles)} differently from the tokenizer's chat "
        f"template. After {decode(tokenizer, prompt[max(0, t - 8) : t])!r} it writes "
        f"{decode(tokenizer, prompt[t : t + 8])!r}, the template {decode(tokenizer, expected[t : t + 8])!r}"
    )
