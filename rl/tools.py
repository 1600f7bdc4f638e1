"""Tools as typed Python functions: the signature and the docstring become the JSON schema that the
model reads, and its arguments are checked against it before a call. Left out: classes as
parameters, schemas beyond type, enum, items, additionalProperties and anyOf.
"""

import asyncio
import difflib
import inspect
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from posttrain.backend.errors import ConfigError, CookbookError
from posttrain.renderers.types import ToolCallPart, ToolSpec
from rl.threads import in_own_thread
from rl.types import RolloutError

JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
PYTHON_TYPES = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
    "array": list,
    "object": dict,
}


class ToolError(CookbookError):
    """A tool's own refusal. The model reads the text."""


class MalformedCall(ToolError):
    """A call that no tool was given: unreadable, of an unknown tool, or with wrong arguments."""


@dataclass(frozen=True)
class Tool:
    """A function that a model may call by keywords, and what the model is told of it."""

    spec: ToolSpec
    function: Callable[..., Any]

    async def call(self, arguments: Mapping[str, Any]) -> str:
        """The answer as text: what is no text is written as JSON. MalformedCall if the arguments do
        not fit. A function that is not async runs in a thread, and so cannot be ended."""
        check_arguments(self.spec, arguments)
        if inspect.iscoroutinefunction(self.function):
            value = await self.function(**arguments)
        else:
            value = await in_own_thread(self.function, **arguments)
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def tool(function: Callable[..., Any]) -> Tool:
    """The tool of a function, sync or async. Its docstring's first paragraph is the description;
    lines `name: text` under "Args:" describe parameters, which are of str, int, float, bool,
    Literal, list, dict with str keys, or a union of these. ConfigError, with the function and the
    parameter, for anything that could not be written as a schema."""
    name = getattr(function, "__name__", type(function).__name__)
    description, documented = _docstring(name, inspect.getdoc(function) or "")
    try:
        hints = get_type_hints(function)
    except NameError as error:
        raise ConfigError(f"the tool {name!r}: {error}, in a type") from None
    properties, required = {}, []
    for parameter in inspect.signature(function).parameters.values():
        where = f"the tool {name!r}, parameter {parameter.name!r}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(f"{where}: models call by keyword, so *args, **kwargs and / cannot be filled")
        if parameter.name not in hints:
            raise ConfigError(f"{where} has no type: write {parameter.name}: str, or what it is")
        schema = _schema(hints[parameter.name], where)
        if text := documented.pop(parameter.name, ""):
            schema["description"] = text
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        properties[parameter.name] = schema
    if documented:
        raise ConfigError(f"the tool {name!r}: its docstring describes {sorted(documented)}, which it does not take")
    parameters = {"type": "object", "properties": properties, "required": required}
    return Tool({"name": name, "description": description, "parameters": parameters}, function)


def tools_by_name(tools: Sequence[Tool | Callable[..., Any]]) -> dict[str, Tool]:
    """The tools, functions made into tools. ConfigError for two of one name."""
    made = [given if isinstance(given, Tool) else tool(given) for given in tools]
    named = {given.spec["name"]: given for given in made}
    if len(named) < len(made):
        raise ConfigError(f"two tools have one name: {', '.join(given.spec['name'] for given in made)}")
    return named


def _docstring(name: str, text: str) -> tuple[str, dict[str, str]]:
    description, _, rest = text.partition("Args:")
    first = " ".join(description.strip().split("\n\n")[0].split())
    if not first:
        raise ConfigError(f"the tool {name!r} has no docstring: the model reads there what it does")
    lines = re.findall(r"^\s*(\w+)(?:\s*\([^)]*\))?:[ \t]*(.+(?:\n[ \t]{6,}.+)*)", rest.split("\n\n")[0], re.MULTILINE)
    return first, {parameter: " ".join(said.split()) for parameter, said in lines}


def _schema(hint: Any, where: str) -> dict[str, Any]:
    if hint in JSON_TYPES:
        return {"type": JSON_TYPES[hint]}
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal and all(type(value) in JSON_TYPES for value in inner):
        return {"enum": list(inner)}
    if hint is list or origin is list:
        return {"type": "array"} | ({"items": _schema(inner[0], where)} if inner else {})
    if hint is dict or (origin is dict and inner[0] is str):
        return {"type": "object"} | ({"additionalProperties": _schema(inner[1], where)} if inner else {})
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(option, where) for option in inner]}
    raise ConfigError(
        f"{where}: {getattr(hint, '__name__', hint)} has no JSON schema here; str, int, float, bool, Literal, list, "
        "dict[str, ...] and unions of them have"
    )


def check_arguments(spec: ToolSpec, arguments: Mapping[str, Any]) -> None:
    """MalformedCall that names the first argument which does not fit the schema."""
    properties = spec["parameters"].get("properties", {})
    for name in arguments:
        if name not in properties:
            raise MalformedCall(f"{spec['name']} takes no {name!r}; it takes {', '.join(properties) or 'nothing'}")
    for name in spec["parameters"].get("required", []):
        if name not in arguments:
            raise MalformedCall(f"{spec['name']} needs {name!r}")
    for name, value in arguments.items():
        if wrong := _misfit(value, properties[name]):
            raise MalformedCall(f"{spec['name']}: {name} {wrong}")


def _misfit(value: Any, schema: Mapping[str, Any]) -> str | None:
    """What is wrong with a value, or None."""
    if "anyOf" in schema:
        wrong = [_misfit(value, option) for option in schema["anyOf"]]
        return None if None in wrong else " or ".join(str(reason) for reason in wrong)
    if "enum" in schema and not any(type(value) is type(choice) and value == choice for choice in schema["enum"]):
        return f"must be one of {', '.join(json.dumps(choice) for choice in schema['enum'])}"
    kind = schema.get("type")
    if kind in PYTHON_TYPES:
        is_truth = isinstance(value, bool) and kind in ("integer", "number")  # True is an int in Python
        if is_truth or not isinstance(value, PYTHON_TYPES[kind]):
            return f"must be of type {kind}"
    inner = value if isinstance(value, list) and "items" in schema else []
    reasons = [_misfit(item, schema["items"]) for item in inner]
    if isinstance(value, dict) and isinstance(schema.get("additionalProperties"), dict):
        reasons += [_misfit(item, schema["additionalProperties"]) for item in value.values()]
    return next((f"holds something that {reason}" for reason in reasons if reason), None)


async def answer_call(call: ToolCallPart, tools: Mapping[str, Tool], timeout: float) -> str:
    """The tool's answer. MalformedCall or ToolError, to be told to the model, also for whatever the
    function raises and for one that takes longer than `timeout` seconds; a RolloutError goes
    through, for tools that are down: such a rollout cannot be scored."""
    if call["name"] not in tools:
        near = difflib.get_close_matches(call["name"], tools, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(tools)}"
        raise MalformedCall(f"no tool is called {call['name']!r}{hint}")
    try:
        return await asyncio.wait_for(tools[call["name"]].call(call["arguments"]), timeout)
    except (ToolError, RolloutError):
        raise
    except TimeoutError:
        raise ToolError(f"{call['name']} took longer than {timeout:g} s") from None
    except Exception as error:
        raise ToolError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error
