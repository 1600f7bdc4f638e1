"""Messages to tokens and back: a renderer per format of conversations, chosen by name."""

import difflib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from posttrain.backend.errors import ConfigError
from posttrain.renderers.chat_template import ChatTemplateRenderer
from posttrain.renderers.parts import from_openai as from_openai
from posttrain.renderers.parts import get_text_content as get_text_content
from posttrain.renderers.parts import get_thinking as get_thinking
from posttrain.renderers.parts import get_tool_calls as get_tool_calls
from posttrain.renderers.parts import to_openai as to_openai
from posttrain.renderers.plain import PlainRenderer
from posttrain.renderers.role_colon import RoleColonRenderer
from posttrain.renderers.stream import ResponseStream as ResponseStream
from posttrain.renderers.template_check import difference_from_template
from posttrain.renderers.types import Message as Message
from posttrain.renderers.types import Renderer, Tokenizer, ToolSpec
from posttrain.renderers.types import TrainOnWhat as TrainOnWhat

RENDERERS = {"role_colon": RoleColonRenderer, "chat_template": ChatTemplateRenderer, "plain": PlainRenderer}
NO_THINKING = {"disable_thinking": "chat_template:enable_thinking=false"}


def get_renderer(name: str | None, tokenizer: Tokenizer) -> Renderer:
    """The renderer called `name`; None follows the chat template, or is role_colon without one, which is
    said. Options of the template follow a colon: chat_template:enable_thinking=false,date=today; this one
    has the name disable_thinking, too. Prints a warning with the first difference if a renderer
    imitates the chat template wrongly."""
    if name is None:
        name = "chat_template" if tokenizer.chat_template else _without_template(tokenizer.name_or_path)
    name, _, written = NO_THINKING.get(name, name).partition(":")
    if name not in RENDERERS:
        near = difflib.get_close_matches(name, RENDERERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "chat_template is the model's own format."
        raise ConfigError(f"no renderer is called {name!r}; {hint} Known: {', '.join(RENDERERS)}")
    if written and name != "chat_template":
        raise ConfigError(f"renderer_name={name}:{written}: only chat_template has options")
    options = (_template_options(written, tokenizer),) if written else ()
    renderer: Renderer = RENDERERS[name](tokenizer, *options)
    if difference := difference_from_template(renderer):
        print(f"WARNING {difference}. The model was trained on its template: renderer_name=chat_template follows it")
    return renderer


@lru_cache(maxsize=16)  # a run asks several times
def _without_template(model: str) -> str:
    print(
        f"{model or 'the model'} has no chat template: conversations are written as 'User: ...' and 'Assistant: ...' "
        "(renderer_name=role_colon)",
        flush=True,
    )
    return "role_colon"


def with_tools(renderer: Renderer, tools: Sequence[ToolSpec], list_tools: bool = True) -> Renderer:
    """A renderer that offers `tools` to the model and reads its calls; ConfigError if it cannot.
    Without `list_tools` no prompt mentions them."""
    offering = getattr(renderer, "with_tools", None)
    if offering is None:
        raise ConfigError(f"{type(renderer).__name__} cannot write tools: use renderer_name=chat_template")
    return offering(tools, list_tools)


@lru_cache(maxsize=256)  # most rows of a set have the same tools, and all requests of an agent
def with_tools_as_json(renderer: Renderer, tools: str) -> Renderer:
    """`with_tools` of a JSON list of tools; the same renderer for the same list."""
    return with_tools(renderer, json.loads(tools))


def _template_options(written: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """ "enable_thinking=false,reasoning_effort=low" as values of JSON, or as texts. ConfigError for
    a name that the template does not read."""
    options: dict[str, Any] = {}
    for option in written.split(","):
        key, equals, value = option.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"the template option {option!r} is not of the form name=value")
        if key not in str(tokenizer.chat_template):
            raise ConfigError(f"the chat template of this tokenizer reads no option {key!r}")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options
