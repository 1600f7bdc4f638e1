"""Messages to tokens and back: a renderer per format of conversations, chosen by name."""

import difflib

from posttrain.backend.errors import ConfigError
from posttrain.renderers.chat_template import ChatTemplateRenderer
from posttrain.renderers.plain import PlainRenderer
from posttrain.renderers.role_colon import RoleColonRenderer
from posttrain.renderers.template_check import difference_from_template
from posttrain.renderers.types import Message as Message
from posttrain.renderers.types import Renderer, Tokenizer
from posttrain.renderers.types import TrainOnWhat as TrainOnWhat

RENDERERS = {"role_colon": RoleColonRenderer, "chat_template": ChatTemplateRenderer, "plain": PlainRenderer}


def get_renderer(name: str | None, tokenizer: Tokenizer) -> Renderer:
    """The renderer called `name`; None follows the chat template, or is role_colon without one.
    Prints a warning with the first difference if a renderer imitates the chat template wrongly."""
    if name is None:
        name = "chat_template" if tokenizer.chat_template else "role_colon"
    if name not in RENDERERS:
        near = difflib.get_close_matches(name, RENDERERS, n=1, cutoff=0)[0]
        raise ConfigError(f"no renderer is called {name!r}; did you mean {near!r}? There are {', '.join(RENDERERS)}")
    renderer = RENDERERS[name](tokenizer)
    if difference := difference_from_template(renderer):
        print(f"WARNING {difference}. The model was trained on its template: renderer_name=chat_template follows it")
    return renderer


def get_text_content(message: Message) -> str:
    """The text of a message, named as in the cookbook."""
    return message["content"]
