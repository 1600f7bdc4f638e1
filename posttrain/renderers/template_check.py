"""Whether a renderer that writes a chat template's tokens by itself writes what the tokenizer's own
template would.

Sampler and trainer see the same tokens, so a wrong template shows in no comparison of the two: the
model is only worse than it should be. A renderer is taken to imitate the template where its prompt
has special tokens other than BOS and EOS. Plain text is a choice.
"""

import jinja2

from posttrain.backend.errors import CookbookError
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
    """The first place where a prompt differs from `apply_chat_template`'s, in words; None where
    there is none, or no template.
    """
    tokenizer = renderer.tokenizer
    if not tokenizer.chat_template:
        return None
    ends = (tokenizer.bos_token, tokenizer.eos_token)
    controls = {token for token in tokenizer.all_special_tokens if token not in ends}
    for messages in CONVERSATIONS:
        try:
            ours = renderer.build_generation_prompt(messages).to_ints()
            if not controls & set(tokenizer.convert_ids_to_tokens(ours)):
                continue
            theirs = tokenizer.apply_chat_template(
                messages,  # type: ignore[arg-type]
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **getattr(renderer, "template_kwargs", {}),
            )
        except (jinja2.TemplateError, CookbookError):  # no system role, say
            continue
        if ours != theirs:
            return _first_difference(renderer, [message["role"] for message in messages], ours, theirs)  # type: ignore[arg-type]
    return None


def _first_difference(renderer: Renderer, roles: list[str], ours: list[int], theirs: list[int]) -> str:
    t = next((t for t, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    decode = renderer.tokenizer.decode
    return (
        f"{type(renderer).__name__} writes a prompt of {', '.join(roles)} otherwise than the tokenizer's chat "
        "template. After "
        f"{decode(ours[max(0, t - 8) : t])!r} it writes {decode(ours[t : t + 8])!r}, the template "
        f"{decode(theirs[t : t + 8])!r}"
    )
