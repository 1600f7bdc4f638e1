"""Messages to tokens and back: one renderer per way of writing a conversation, chosen by name."""

import difflib

from backend.errors import ConfigError
from renderers.chat_template import ChatTemplateRenderer
from renderers.plain import PlainRenderer
from renderers.role_colon import RoleColonRenderer
from renderers.types import Renderer, Tokenizer

RENDERERS = {"role_colon": RoleColonRenderer, "chat_template": ChatTemplateRenderer, "plain": PlainRenderer}


def get_renderer(name: str | None, tokenizer: Tokenizer) -> Renderer:
    """The renderer called `name`; None follows the tokenizer's chat template, or is role_colon if it has none."""
    if name is None:
        name = "chat_template" if tokenizer.chat_template else "role_colon"
    if name not in RENDERERS:
        near = difflib.get_close_matches(name, RENDERERS, n=1, cutoff=0)[0]
        raise ConfigError(f"no renderer is called {name!r}; did you mean {near!r}? There are {', '.join(RENDERERS)}")
    return RENDERERS[name](tokenizer)
