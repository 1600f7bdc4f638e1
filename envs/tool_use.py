"""A calculator as a tool: the model writes `calc: 12*(3+4)`, reads `84`, and ends with `answer:
84`.

One line of a response is a call or the answer, the rest is free. Calls are evaluated exactly, in
fractions, from the parse tree; nothing is executed. A faulty call returns its error; a response
without such a line, or with several, cannot be parsed. reward = 1 for the right answer, else 0.
Left out: calls in JSON, several tools, calls within a sentence.
"""

import ast
import operator
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial

import chz
import numpy as np

from envs.text_games import TextGame, TextGameBuilder, TextGameExamplesBuilder
from posttrain.backend.errors import ConfigError, CookbookError
from posttrain.backend.ranges import COUNT, WHOLE
from posttrain.renderers.types import Message
from rl.message_env import MessageEnd, MessageEnv, MessageStep, ParseError
from rl.types import Metrics

LINE = re.compile(r"^[^\S\n]*(calc|answer):[ \t]*(\S(?:.*\S)?)", re.MULTILINE)
MAX_CHARACTERS, MAX_BITS = 200, 2048  # of an expression; of any number on the way
OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class CalculatorError(CookbookError):
    """An expression that the calculator refuses. The model reads the text."""


def calculate(expression: str) -> Fraction:
    """The exact value of + - * / // % ** and parentheses over numbers. Raises CalculatorError."""
    if len(expression) > MAX_CHARACTERS:
        raise CalculatorError(f"longer than {MAX_CHARACTERS} characters")
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise CalculatorError("not an expression") from None
    except ZeroDivisionError:
        raise CalculatorError("division by zero") from None


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            value = Fraction(str(number))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            value = _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            value = Fraction(OPERATORS[type(op)](_value(left), _value(right)))
        case _:
            raise CalculatorError("only numbers, + - * / // % ** and parentheses")
    return _checked(value)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or abs(exponent) * max(_bits(base), 1) > MAX_BITS:
        raise CalculatorError("this power is too large, or not a whole one")
    return base ** int(exponent)


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _checked(value: Fraction) -> Fraction:
    if _bits(value) > MAX_BITS:
        raise CalculatorError("a number on the way is too large")
    return value


def read_number(text: str) -> Fraction | None:
    """ "84", "-3.5" or "7/2"; None if the text is no number."""
    return Fraction(text) if re.fullmatch(r"-?\d{1,100}(\.\d{1,100}|/0*[1-9]\d{0,99})?", text) else None


class CalculatorEnv(MessageEnv):
    """Metrics: `correct` and `tool_calls` of an episode; `tool_error` of each call (0 or 1)."""

    def __init__(self, expression: str, prompt: str, max_calls: int):
        self.gold, self.max_calls = calculate(expression), max_calls
        self.opening = Message(role="user", content=prompt.format(expression=expression))
        self.calls = 0

    async def initial_messages(self) -> list[Message]:
        return [self.opening]

    async def step(self, message: Message) -> MessageStep:
        lines = LINE.findall(message["content"])
        if len(lines) != 1:
            raise ParseError("Write one line, either calc: EXPRESSION or answer: NUMBER.")
        kind, text = lines[0]
        logs = {"gold": str(self.gold), kind: text}
        if kind == "answer":
            correct = read_number(text) == self.gold
            return MessageStep(float(correct), True, (), self._episode(correct), logs)
        self.calls += 1
        reply, failed = self._call(text)
        metrics: Metrics = {"tool_error": float(failed)}
        if self.calls > self.max_calls:
            return MessageStep(0.0, True, (), metrics | self._episode(correct=False), logs)
        return MessageStep(0.0, False, [Message(role="user", content=reply)], metrics, logs)

    def _call(self, expression: str) -> tuple[str, bool]:
        try:
            return str(calculate(expression)), False
        except CalculatorError as error:
            return f"error: {error}", True

    def _episode(self, correct: bool) -> Metrics:
        return {"correct": float(correct), "tool_calls": float(self.calls)}

    async def cut_short(self, reason: MessageEnd) -> tuple[float, Metrics]:
        return 0.0, self._episode(correct=False)


@chz.chz
class Calculator(TextGame):
    """Expressions with two operations, some in parentheses."""

    num_digits: int = chz.field(default=2, validator=COUNT, doc="most digits of a number")
    num_tasks: int = chz.field(
        default=5000, validator=COUNT, doc="number of expressions, with the held-out ones; split_seed draws them"
    )
    prompt: str = chz.field(
        default="What is {expression}? Write calc: EXPRESSION to use the calculator, or answer: NUMBER.",
        doc="first message of an episode",
    )

    def tasks(self) -> Sequence[str]:
        if not 1 <= self.num_digits <= 9 or self.num_tasks > 10 ** (3 * self.num_digits):
            raise ConfigError(
                f"num_digits={self.num_digits}, num_tasks={self.num_tasks}: 1 <= num_digits <= 9 and "
                "num_tasks <= 10 ** (3 * num_digits) are needed"
            )
        rng = np.random.default_rng(self.split_seed)
        expressions: dict[str, None] = {}  # in the order they were drawn
        while len(expressions) < self.num_tasks:
            a, b, c = rng.integers(1, 10**self.num_digits, 3)
            first, second = rng.choice(list("+-*"), 2)
            expressions[f"({a}{first}{b}){second}{c}" if rng.random() < 0.5 else f"{a}{first}{b}{second}{c}"] = None
        return list(expressions)

    def demonstration(self, task: str, rng: np.random.Generator) -> list[Message]:
        """One call with the whole expression, then the answer."""
        value = calculate(task)
        texts = [self.prompt.format(expression=task), f"calc: {task}", str(value), f"answer: {value}"]
        roles = ["user", "assistant", "user", "assistant"]
        return [Message(role=role, content=text) for role, text in zip(roles, texts, strict=True)]


@chz.chz
class CalculatorBuilder(Calculator, TextGameBuilder):
    """Expressions to work out with a calculator by reinforcement learning."""

    max_calls: int = chz.field(
        default=4, validator=WHOLE, doc="most calls of the calculator; one more ends the episode"
    )
    tag: str = chz.field(default="tool_use", doc="name under which metrics are logged too")

    def recommended_max_tokens(self) -> int:
        return 64

    def open_env(self) -> Callable[[str], CalculatorEnv]:
        return partial(CalculatorEnv, prompt=self.prompt, max_calls=self.max_calls)


@chz.chz
class CalculatorExamplesBuilder(Calculator, TextGameExamplesBuilder):
    """Calls and answers to imitate."""
