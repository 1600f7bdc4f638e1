r"""Finds the final answer of a solution, normalises its notation, and reads plain numbers exactly.

Styles: "boxed" is the last \boxed{...} with balanced braces (or \boxed 7); "hash" the rest of the
line after the last "####"; "stated" the text after the last "the answer is", "Answer:" or "A:".
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

AnswerStyle = Literal["boxed", "hash", "stated"]
MAX_ANSWER_CHARS = 1000  # a longer text is no answer and would slow every rule


def extract_answer(text: str, styles: Sequence[AnswerStyle] = ("boxed", "hash", "stated")) -> str | None:
    """The answer in the first style that occurs in `text`, or None."""
    for style in styles:
        answer = _EXTRACTORS[style](text)
        if answer is not None and answer.strip() and len(answer) <= MAX_ANSWER_CHARS:
            return answer.strip()
    return None


def extract_boxed(text: str) -> str | None:
    _, marked, rest = text.rpartition("\\boxed")
    rest = rest.lstrip() if marked else ""
    if not rest.startswith("{"):
        bare = re.match(r"[^\s{}$]+", rest)  # \boxed 7, \boxed7
        return bare[0].rstrip(".,;:") if bare else None
    rest, depth = rest[1:], 1
    for match in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # an escaped brace, \{, is text
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return rest[: match.start()]
    return None


def extract_hash(text: str) -> str | None:
    answers = re.findall(r"####[ \t:=*]*([^\n#]*)", text)
    return answers[-1].replace("**", "") if answers else None


# of Markdown: it begins a word or ends it, where the * of 3*4 and 3 * 4 does neither
_EMPHASIS = re.compile(r"(?<![^\s(])\*++(?=\S)|(?<=[^\s*])\*++(?![^\s.,:;!?)])")
_AFTER_ANSWER = re.compile(r"[.?](?:\s|$)|,?\s(?:because|since)\s|,\s(?:as|so|which|where)\s")


def extract_stated(text: str) -> str | None:
    said = re.compile(r"(?:\banswer(?: is)?:|\banswer is|^A:)\s*([^\n]+)", re.IGNORECASE | re.MULTILINE)
    answers = said.findall(_EMPHASIS.sub("", text))
    return re.split(_AFTER_ANSWER, answers[-1])[0] if answers else None


_Extractor = Callable[[str], str | None]
_EXTRACTORS: dict[AnswerStyle, _Extractor] = {"boxed": extract_boxed, "hash": extract_hash, "stated": extract_stated}

_RAISED, _LOWERED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n"), str.maketrans("₀₁₂₃₄₅₆₇₈₉ₙ", "0123456789n")
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}


def _vulgar(match: re.Match[str]) -> str:
    over, _, under = unicodedata.normalize("NFKC", match[0]).partition("\u2044")  # ½ is 1\u20442
    return rf"\frac{{{over}}}{{{under}}}"


_LETTER_UNITS = {"m": "meter", "g": "gram", "s": "second", "h": "hour", "l": "liter", "L": "liter"}

# 1 000, 1'000 and 1.000.000; not the mixed number 1 250/1000, nor 1.000, which may be 1
_IN_THOUSANDS = re.compile(
    r"(?<![\w.^])[1-9]\d{0,2}(?:(?:(?:\\[ ,;:]|[ ~'\u2019\u00a0\u2006-\u2009\u202f])\d{3})+|(?:\.\d{3}){2,})"
    r"(?!\d|\s*/|-[A-Za-z])"  # nor "12 200-metre runs"
)


def without_separators(text: str) -> str:
    """The numbers in `text` without spaces, apostrophes or full stops between their thousands."""
    return _IN_THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), text)


_REPLACEMENTS: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda match: f"^{{{match[0].translate(_RAISED)}}}"),
    (r"[₀₁₂₃₄₅₆₇₈₉ₙ]+", lambda match: f"_{{{match[0].translate(_LOWERED)}}}"),
    (r"[¼½¾⅓-⅞]", _vulgar),
    (
        r"([√∛∜])\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[A-Za-z]))",
        lambda match: f"{_ROOTS[match[1]]}{{{match[2] or match[3] or match[4] or ''}}}",
    ),
    (r"[·⋅]", r"\\cdot "),
    (r"º", "°"),
    (r"\\!\s*", ""),  # 10,\!000 is 10,000
    (r"(?<=\d)(?:\\,|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ""),  # 1\,234 is 1234
    (r"\u2044", "/"),
    (r"±", r"\\pm "),
    (r"\\varnothing\b", r"\\emptyset"),
    (
        r"(?<![\\A-Za-z])(?=[a-z])(?:arc)?(?:sin|cos|tan|sec|csc|cot)h?(?=\s*(?:[({\\^]|[a-z\d](?![A-Za-z])))",
        r"\\\g<0>",
    ),
    (r"(?<![\\A-Za-z])(?:exp(?=\s*[({])|(?:ln|log)(?=\s*(?:[({\\]|[a-z\d](?![A-Za-z]))))", r"\\\g<0>"),
    (r"[\u2212\u2013\u2012\ufe63\uff0d]", "-"),
    (r"\\left\b|\\right\b|\\displaystyle\b|(?<!\\)\\[,;: ]|\\q?quad\b|[\u00a0\u202f]|~", " "),
    (";", ","),  # (1;2) is (1,2)
    (r"\\[dt]frac", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d|\{)", r"\\frac{\1}\2"),
    (r"\\frac\s*(\{[^{}]*\})\s*(\d)", r"\\frac\1{\2}"),
    (r"(?<![A-Za-z])\\?log_\s*(?:(\w)|\{([^{}]*)\})\s*", r"\\log_{\1\2}"),
    (r"(?<![A-Za-z\\])(?:(?<=[(,\[])\s*\+)?(?:∞|\\infty|infinity|inf|oo)(?![A-Za-z])", r"\\infty "),
    # a unit is upright, a variable is not: 36\pi \text{ m} is 36\pi, 36\pi m is not
    (
        r"(?P<before>[\d)}]|\\pi)\s*\\(?:text|mathrm|mbox)\s*\{\s*(?P<letter>[mgshlL])\s*\}",
        lambda match: f"{match['before']} {_LETTER_UNITS[match['letter']]} ",
    ),
    (r"\\(?:text|textbf|mathrm|mbox|mathbf|textit)\s*\{([^{}]*)\}", r" \1 "),
    (r"(?i)(?<=\d)\s*([ap])(?:m\b|\.\s?m\b\.?)", r" \1m"),
    (r"\{,\}", ","),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|°|\\degree\b", " degrees "),
    (r"\\?%", " percent "),
    (r"\s+(?:and|or)\s+", ", "),
    (r"\*\*", "^"),
    (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
    (r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\s+", " "),
]
_COMPILED = [(re.compile(pattern), to) for pattern, to in _REPLACEMENTS]


def normalise(answer: str) -> str:
    text = answer.strip()
    for left, right in (("\\(", "\\)"), ("\\[", "\\]"), ("$", "$")):
        if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right):
            text = text[len(left) : -len(right)]
    text = without_separators(text)
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    return text.strip().removesuffix(".").strip()


class Quantity(NamedTuple):
    value: Fraction
    unit: str  # "" without one


_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_POWER_OF_TEN = r"[eE](?P<e>[+-]?\d{1,3})|\s*(?:\\times|\\cdot|[×·*x])\s*10\s*\^\s*(?:\{\s*(?P<e2>[+-]?\d{1,3})\s*\}|(?P<e3>[+-]?\d{1,3}))"
# 6xy and 6 xy are products and no numbers: a unit of few letters is one that is known
_SHORT_UNIT = (
    r"(?i:[ckm]m|[km]g|ml|ft|in|yds?|mi|lbs?|oz|hrs?|secs?|mins?|[ap]m|mph|kmh|usd)(?![A-Za-z])"
    r"|(?<=\s)(?:sq|cu|dm|[cd]l|m[sL]|[kMGT]B|k?Hz|k[WJN])(?![A-Za-z])"
)
_QUANTITY = re.compile(
    rf"(?P<sign>[+-]?)\s*(?P<currency>\\?\$|[€£])?\s*(?P<sign2>-?)\s*(?:"
    rf"(?:(?P<whole>\d+)\s*)?\\frac\s*\{{\s*(?P<fn>{_DECIMAL})\s*\}}\s*\{{\s*(?P<fd>{_DECIMAL})\s*\}}"
    rf"|(?:(?P<whole2>\d+)\s+)?(?P<n>{_DECIMAL})\s*/\s*(?P<d>{_DECIMAL})"
    rf"|(?P<decimal>{_DECIMAL})(?:{_POWER_OF_TEN})?)"
    rf"\s*(?:(?P<after>\\?\$|[€£])|(?P<unit>"
    rf"(?:(?<=\s)[mgshlL](?:/(?:s|h|min))?(?![\w/])|(?:{_SHORT_UNIT}|(?<=\s)[A-Za-z]{{3,}}|[A-Za-z]{{4,}})(?:[ /-][A-Za-z]+){{0,2}})"
    rf"(?:\s?\^?\s?\{{?[23]\}}?)?))?\.?"
)
_UNIT_OF_CURRENCY = {"$": "dollar", "\\$": "dollar", "€": "euro", "£": "pound", None: ""}
# A number before these words is no quantity: they change its value or say that it is not the answer.
_NOT_UNITS = re.compile(
    r"\b(?:(?:hundred|thousand|million|billion|trillion|dozen|pair|score|ten|lakh|crore|third|quarter|fourth|fifth|sixth"
    r"|seventh|eighth|ninth|tenth|hundredth|thousandth)s?|mil|mi?ll?n|bi?l?n|hal(?:f|ves)|twice|double|triple"
    r"|(?:one|two|three|four|five|six|seven|eight|nine|eleven|twelve|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety)"
    r"|point|over|plus|minus|times|multiplied|divided|by|out|to|through|until|less|more|fewer|than|least|most|below|negative"
    r"|remainder|root|not|mod|choose|factorial|squared|cubed|sin|cos|tan|log|ln|exp|pi|sqrt)\b"
)


def quantity(answer: str) -> Quantity | None:
    """A number (also 1.5e3), fraction or mixed number, perhaps with a currency or unit; else None."""
    match = _QUANTITY.fullmatch(normalise(answer))
    if match is None or _NOT_UNITS.search((match["unit"] or "").lower()):
        return None
    whole, over, under = match["whole"] or match["whole2"] or "0", match["fn"] or match["n"], match["fd"] or match["d"]
    power = int(match["e"] or match["e2"] or match["e3"] or 0)
    value = _fraction(match["decimal"] or over) * Fraction(10) ** power
    if (over and (divisor := _fraction(under)) == 0) or match["sign"] == match["sign2"] == "-":
        return None
    if over and whole != "0" and _fraction(over) >= divisor:  # no mixed number: 1\frac32 may be a product
        return None
    value = _fraction(whole) + value / divisor if over else value
    negative = "-" in (match["sign"], match["sign2"])
    unit = _bare_unit(match["unit"] or "") or _UNIT_OF_CURRENCY[match["currency"] or match["after"]]
    return Quantity(-value if negative else value, unit)


_UNIT_AT_END = re.compile(
    r"\s*(?<![A-Za-z\\])((?:(?:square|cubic|sq\.?|cu\.?)\s+)?"
    r"(?:[cdkm]m|kg|ml|mph|units?|inch(?:es)?|f(?:oo|ee|)t|yards?|miles?|(?:milli|centi|kilo)?met(?:er|re)s?|(?:kilo)?grams?"
    r"|lit(?:er|re)s?|seconds?|minutes?|hours?|days?|degrees|radians?|dollars?|cents?)(?:\s?\^\s?\{?[23]\}?)?)\.?\Z"
)


def without_units(gold: str, answer: str) -> tuple[str, str]:
    """36\\pi cm^3 against 36\\pi: drops the unit after an expression, unless the two have different ones."""
    (gold_value, gold_unit), (value, unit) = _value_and_unit(gold), _value_and_unit(answer)
    return (gold, answer) if gold_unit and unit and gold_unit != unit else (gold_value, value)


def _value_and_unit(text: str) -> tuple[str, str]:
    match = _UNIT_AT_END.search(text)
    return (text[: match.start()], _bare_unit(match[1])) if match and match.start() else (text, "")


_UNIT_NAMES = {
    other: name
    for name, others in {
        "meter": "m metre",
        "centimeter": "cm centimetre",
        "millimeter": "mm millimetre",
        "kilometer": "km kilometre",
        "gram": "g",
        "kilogram": "kg",
        "liter": "l litre",
        "milliliter": "ml millilitre",
        "pound": "lb",
        "ounce": "oz",
        "second": "s sec",
        "minute": "min",
        "hour": "h hr",
        "foot": "ft feet",
        "inch": "in inche",
        "yard": "yd",
        "mile": "mi",
        "dollar": "usd",
    }.items()
    for other in others.split()
}


def _bare_unit(unit: str) -> str:
    """One name of a unit: meter for m and metres, meter2 for m^2 and square meters."""
    if not unit:
        return ""
    match = re.fullmatch(
        r"(?P<area>square |sq\.? )?(?P<volume>cubic |cu\.? )?(?P<name>.*?)\W*(?P<power>[23]?)\W*", unit.lower()
    )
    assert match
    name = match["name"] if match["name"] == "s" else match["name"].removesuffix("s")
    power = "2" if match["area"] else "3" if match["volume"] else match["power"]
    return _UNIT_NAMES.get(name, name) + power


_TIME = re.compile(r"(?P<hour>\d?\d)(?::(?P<minute>[0-5]\d))?(?: (?P<half>[ap])m)?", re.IGNORECASE)


def same_time(gold: str, answer: str) -> bool | None:
    """2:30 p.m. against 14:30 and 2:30, normalised; None unless both are times and one has a.m. or p.m."""
    times = [_TIME.fullmatch(text) for text in (gold, answer)]
    found = [time for time in times if time and (time["minute"] or time["half"]) and int(time["hour"]) <= 24]
    halves = [time for time in found if time["half"]]
    if len(found) < 2 or not halves or not all(1 <= int(time["hour"]) <= 12 for time in halves):
        return None
    clocks = [(int(time["hour"]) % (12 if time["half"] else 24), int(time["minute"] or 0)) for time in found]
    minutes = [
        60 * hour + minute + 720 * ((time["half"] or "") in ("p", "P"))
        for time, (hour, minute) in zip(found, clocks, strict=True)
    ]
    known = all(time["half"] or not 1 <= int(time["hour"]) <= 12 for time in found)
    return (minutes[0] - minutes[1]) % (1440 if known else 720) == 0


def _fraction(decimal: str) -> Fraction:
    return Fraction(decimal.replace(",", "").removesuffix("."))


_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_BASES |= {"twelve": 12, "sixteen": 16}
_NUMERAL = re.compile(
    r"\(?(?P<digits>[0-9A-Z]+)\)?(?:_\s*(?:\{\s*(?P<braced>\w+)\s*\}|(?P<bare>\d+))|\s*\(?(?:in )?base[ -](?P<base>\w+)\)?)"
)


class Numeral(NamedTuple):
    """Digits in a base other than ten."""

    digits: str
    base: int


def numeral(answer: str) -> Numeral | None:
    """Reads 1011_2, 1011_{\\text{two}}, "1011 in base 2"; None for other texts or digits >= base."""
    match = _NUMERAL.fullmatch(normalise(answer))
    if match is None:
        return None
    named = (match["braced"] or match["bare"] or match["base"]).lower()
    base = _BASES.get(named) or (int(named) if named.isdecimal() and len(named) < 3 else 0)
    digits = match["digits"].lstrip("0") or "0"
    if not 2 <= base <= 36 or max(int(digit, 36) for digit in digits) >= base:
        return None
    return Numeral(digits, base) if any(char.isdigit() for char in match["digits"]) or len(digits) > 1 else None
