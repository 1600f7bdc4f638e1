"""The --help of the command lines: options by nested object, in aligned columns."""

import shutil
import textwrap
import types
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

import chz
from chz.blueprint import Castable
from chz.tiepin import type_repr
from chz.util import MISSING

from posttrain.backend.ranges import Range

Row = tuple[str, str, str, str]  # option, type, value it would have, doc

# Of a training run, the options that most runs set come first, in this order; then the others, as they are declared.
OFTEN_SET = (
    "model_name",
    "env",
    "dataset",
    "method",
    "algorithm",
    "load_checkpoint_path",
    "learning_rate",
    "lr_schedule",
    "lora_rank",
    "batch_size",
    "groups_per_batch",
    "group_size",
    "num_epochs",
    "max_steps",
    "max_tokens",
    "temperature",
    "renderer_name",
    "eval_every",
    "save_every",
    "seed",
    "log_path",
    "behavior_if_log_dir_exists",
)
WIDEST = (34, 26, 24)  # columns; a longer cell pushes the next one along


def help_text(
    title: str, parameters: Mapping[str, Any], values: Mapping[str, Any], names: Mapping[str, Mapping[str, str]]
) -> str:
    """The page. `parameters` are chz's, by dotted path; `values` are settings that differ from the
    defaults, and the classes of objects. The key "" is the configuration itself."""
    objects = [
        "",
        *(path for path in parameters if path in names or any(other.startswith(f"{path}.") for other in parameters)),
    ]
    rows: dict[str, list[Row]] = {parent: [] for parent in objects}
    often = [name for name in OFTEN_SET if name in parameters and "save_every" in parameters]
    for path in [*often, *(path for path in parameters if path not in often)]:
        parameter = parameters[path]
        if path in objects and path in often:
            kind = "NAME | module:Class" if path in names else "module:Class"
            doc = f"{parameter.doc}; see {path}= below"
            rows[""].append((path, kind, _value_text(path, values, parameter), doc))
        elif path not in objects:
            number, bar, rest = type_text(parameter.type).partition(" |")
            kind = f"{number}{_range_text(path, values)}{bar}{rest}"
            row = (path, kind, _value_text(path, values, parameter), parameter.doc)
            rows[path.rpartition(".")[0]].append(row)
    widths = [
        min(widest, max(len(row[column]) for part in rows.values() for row in part))
        for column, widest in enumerate(WIDEST)
    ]
    lines = [title, "", "Options are written key=value. Name, type, value if not given:", ""]
    if often:
        lines += [*(line for row in rows[""][: len(often)] for line in _row_lines(row, widths)), ""]
        del rows[""][: len(often)]
    # the task and its data before the many options of the machine
    for parent in sorted(objects, key=lambda path: path.partition(".")[0] == "backend"):
        if parent:
            chosen = _value_text(parent, values, parameters[parent])
            lines += ["", f"{parent}={chosen}  {parameters[parent].doc}".rstrip()]
            if choices := names.get(parent):
                taken = f"{parent}= takes {', '.join(choices)} or module:Class; {parent}=NAME --help shows its options"
                lines += textwrap.wrap(taken, 160, initial_indent="  ", subsequent_indent="    ")
        lines += [line for row in rows[parent] for line in _row_lines(row, widths)]
    return "\n".join(lines)


def presets_text(presets: Mapping[str, Mapping[str, Mapping[str, str]]]) -> str:
    """The settings of each value of a preset option."""
    lines = []
    for option, choices in presets.items():
        lines += ["", "", f"What {option}=NAME sets; options that are given win:"]
        width = max(len(name) for name in choices)
        for name, settings in choices.items():
            text = "  ".join(f"{key}={repr(value) if ' ' in value else value}" for key, value in settings.items())
            first, others = f"  {name.ljust(width)}  ", " " * (width + 4)
            lines += textwrap.wrap(text, 126, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)
    return "\n".join(lines)


def _range_text(path: str, values: Mapping[str, Any]) -> str:
    parent, _, name = path.rpartition(".")
    owner = values.get(parent)
    field = chz.chz_fields(owner).get(name) if owner is not None and chz.is_chz(owner) else None
    return next((f" {check.text}" for check in (field._validator if field else ()) if isinstance(check, Range)), "")


def _value_text(path: str, values: Mapping[str, Any], parameter: Any) -> str:
    value = values.get(path, MISSING)
    if value is MISSING:
        if parameter.default is None:
            return "(required)"
        value = parameter.default.value
        if value is MISSING:
            return "(computed)"
    if isinstance(value, Castable):
        return value.value
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, type) or callable(value):
        return type_repr(value)
    return str(value) if value != "" else "''"


def _row_lines(row: tuple[str, str, str, str], widths: list[int]) -> list[str]:
    """A row of the table. Wide cells push the next one along; the doc wraps in its column."""
    cells = "  " + "  ".join(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True))
    indent = " " * (sum(widths) + 8)
    width = max(shutil.get_terminal_size((130, 24)).columns, len(indent) + 30)
    if len(cells) + 2 > len(indent):
        return [cells.rstrip(), *textwrap.wrap(row[3], width, initial_indent=indent, subsequent_indent=indent)]
    return textwrap.wrap(row[3], width, initial_indent=cells + "  ", subsequent_indent=indent) or [cells.rstrip()]


def type_text(kind: Any) -> str:
    """A type as users write its values: int, float | None, a | b | c."""
    if get_origin(kind) in (Union, types.UnionType):
        return " | ".join(type_text(part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return " | ".join(str(choice) for choice in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " | ".join(str(member.value) for member in kind)
    if kind is type(None):
        return "None"
    if kind is bool:
        return "true | false"
    if get_origin(kind) is Callable:
        return "module:function"
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else type_repr(kind)
