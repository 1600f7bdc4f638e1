"""Ranges of numeric options: validators of chz fields. A value outside is a ConfigError.

  batch_size: int = chz.field(default=64, validator=COUNT, doc="...")

Dataclasses call `check_ranges` in __post_init__. Left out: limits between several fields.
"""

import math
import numbers
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from posttrain.backend.errors import ConfigError


class RangeError(ConfigError):
    """A value outside its option's range. `name` is the field's, without its object's path."""

    def __init__(self, name: str, value: object, needs: str):
        super().__init__(f"{name}={value!r} must be {needs}")
        self.name, self.value, self.needs = name, value, needs


@dataclass(frozen=True)
class Range:
    """Numbers from `low` (excluded with `above`) to `high` (excluded with `below`), and `also`.
    Lists and tuples are checked per number; None passes. Numbers of numpy become Python's, in place: a seed that JSON
    does not take would fail when a checkpoint is written."""

    low: float
    high: float
    whole: bool = False
    above: bool = False
    below: bool = False
    also: float | None = None

    def __call__(self, instance: Any, name: str) -> None:
        value = getattr(instance, name)
        for number in value if isinstance(value, list | tuple) else [value]:
            if number is not None and (needs := self.needs(number)):
                # chz's name of a field before its munger
                raise RangeError(name.removeprefix("X_"), value, needs)
        if (plain := _plain(value)) is not value and name in vars(instance):
            object.__setattr__(instance, name, plain)

    def needs(self, number: object) -> str | None:
        """The condition that `number` fails; None if it is in range."""
        if type(number) is int:  # thousands a step, and abstract classes are slow to ask
            return self._limits(number)
        if isinstance(number, bool) or not isinstance(number, numbers.Real):
            return "a whole number" if self.whole else "a number"
        if not math.isfinite(number):
            return "a finite number"
        if self.whole and not isinstance(number, numbers.Integral):
            return "a whole number"
        return self._limits(float(number))

    def _limits(self, number: float) -> str | None:
        if number == self.also:
            return None
        or_also = "" if self.also is None else f", or {self.also:g}"
        if number < self.low or (self.above and number == self.low):
            return f"{'above' if self.above else 'at least'} {self.low:g}{or_also}"
        if number > self.high or (self.below and number == self.high):
            return f"{'below' if self.below else 'at most'} {_text(self.high)}"
        return None

    @property
    def text(self) -> str:
        """For --help: `>= 1`, `> 0`, `0..1`."""
        low = f"{'>' if self.above else '>='} {self.low:g}"
        if self.high < LARGEST:
            low = f"{'>' if self.above else ''}{self.low:g}..{'<' if self.below else ''}{self.high:g}"
        if self.low <= -LARGEST:
            low = "finite"
        return low if self.also is None else f"{self.also:g}, {low}"


def _plain(value: Any) -> Any:
    if value is None or type(value) in (int, float):
        return value
    if isinstance(value, list | tuple):
        return value if all(_plain(item) is item for item in value) else type(value)(map(_plain, value))
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def check_ranges(instance: Any, **ranges: Range) -> None:
    """RangeError unless each named field is in its range, or None where that is its default."""
    for name, allowed in ranges.items():
        value = getattr(instance, name)
        if isinstance(value, list | tuple) or (value is None and _default(type(instance), name) is not None):
            raise RangeError(name, value, "a number")
        allowed(instance, name)


@cache
def _default(owner: Any, name: str) -> object:
    return next(field.default for field in fields(owner) if field.name == name)


def _text(number: float) -> str:
    return str(int(number)) if number == int(number) else f"{number:g}"


LARGEST = 1e9  # of a real number: fp32 sums with larger ones lose the rest
LARGEST_COUNT = 2**31 - 1

COUNT = Range(1, LARGEST_COUNT, whole=True)
WHOLE = Range(0, LARGEST_COUNT, whole=True)
SEED = Range(0, 2**53, whole=True)  # exact in JSON and floats
NUMBER = Range(-LARGEST, LARGEST)
NON_NEGATIVE = Range(0, LARGEST)
POSITIVE = Range(0, LARGEST, above=True)
SHARE = Range(0, 1)
POSITIVE_SHARE = Range(0, 1, above=True)
DECAY = Range(0, 1, below=True)  # Adam's betas
LEARNING_RATE = Range(0, 1)
# vLLM raises temperatures between 0 and 0.01 to 0.01, and its limit is 2.
TEMPERATURE = Range(0.01, 2, also=0)
SAMPLING_TEMPERATURE = Range(0.01, 2)
