r"""The 25 verifiable instructions of IFEval (Zhou et al. 2023, "Instruction-Following Evaluation for
Large Language Models", table 1 and the authors' code): a response follows each, or does not.

Different here: sentences end at . ! or ? and white space, but not after an abbreviation (there:
nltk's punkt); words in capitals are runs of letters (there: nltk's tokens); the response's language
is checked where the package langdetect is installed.
"""

import json
import operator
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from posttrain.backend.errors import DataError

Arguments = Mapping[str, Any]
Check = Callable[..., bool]
COMPARISONS: Mapping[str, Callable[[int, int], bool]] = {"less than": operator.lt, "at least": operator.ge}
CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
ABBREVIATION = re.compile(r"\b((?i:mr|mrs|ms|dr|prof|st|sr|jr|vs|etc|e\.g|i\.e|inc|ltd|co|fig|al|u\.s)|[A-Z])\.$")


def compared(count: int, relation: str, number: int) -> bool:
    return COMPARISONS[relation](count, number)


# --- keywords -----------------------------------------------------------------------------------


def has_keywords(text: str, keywords: list[str]) -> bool:
    return all(re.search(keyword, text, re.IGNORECASE) for keyword in keywords)


def keyword_frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return compared(len(re.findall(keyword, text, re.IGNORECASE)), relation, frequency)


def no_forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return compared(text.lower().count(letter.lower()), let_relation, let_frequency)


# --- language and case --------------------------------------------------------------------------


def in_language(text: str, language: str) -> bool:
    from langdetect import DetectorFactory, LangDetectException, detect  # type: ignore[import-not-found]

    DetectorFactory.seed = 0
    try:
        return detect(text) == language
    except LangDetectException:  # no letters: there counts as followed
        return True


def in_english(text: str) -> bool:
    return not can_detect_language() or in_language(text, "en")


def can_detect_language() -> bool:
    return find_spec("langdetect") is not None


def all_capitals(text: str) -> bool:
    return text.isupper() and in_english(text)


def all_lowercase(text: str) -> bool:
    return text.islower() and in_english(text)


def capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    words = re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", text)
    return compared(sum(word.isupper() for word in words), capital_relation, capital_frequency)


# --- lengths ------------------------------------------------------------------------------------


def count_sentences(text: str) -> int:
    parts = re.split(r"(?<=[.!?])[\"')\]]*\s+", text.strip())
    return sum(bool(part) and not ABBREVIATION.search(part) for part in parts[:-1]) + bool(parts[-1])


def number_of_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return compared(count_sentences(text), relation, num_sentences)


def number_of_words(text: str, num_words: int, relation: str) -> bool:
    return compared(len(re.findall(r"\w+", text)), relation, num_words)


def number_of_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Separated by ***; only the first and the last may be empty."""
    paragraphs = re.split(r"\s?\*\*\*\s?", text)
    if any(not paragraph.strip() for paragraph in paragraphs[1:-1]):
        return False
    return sum(bool(paragraph.strip()) for paragraph in paragraphs) == num_paragraphs


def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are separated by an empty line. As published, the n-th of all parts is read, but
    only parts with text are counted."""
    paragraphs = text.split("\n\n")
    count = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if nth_paragraph > count or not (paragraph := paragraphs[nth_paragraph - 1].strip()):
        return False
    word = re.split(r"""[.,?!'"]""", paragraph.split()[0].lstrip("'").lstrip('"'))[0]
    return count == num_paragraphs and word.lower() == first_word.lower()


# --- content ------------------------------------------------------------------------------------


def has_placeholders(text: str, num_placeholders: int) -> bool:
    ended = [part for line in text.split("\n") for part in line.split("]")[:-1]]
    return sum("[" in part for part in ended) >= num_placeholders


def has_postscript(text: str, postscript_marker: str) -> bool:
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(patterns.get(postscript_marker, postscript_marker.lower()), text.lower()) is not None


# --- format -------------------------------------------------------------------------------------


def number_of_bullets(text: str, num_bullets: int) -> bool:
    stars, dashes = (re.findall(bullet, text, re.MULTILINE) for bullet in (r"^[^\S\n]*\*[^\*].*$", r"^[^\S\n]*-.*$"))
    return len(stars) + len(dashes) == num_bullets


def constrained_response(text: str) -> bool:
    return any(answer in text for answer in CONSTRAINED)


def highlighted_sections(text: str, num_highlights: int) -> bool:
    single = [part for part in re.findall(r"\*[^\n\*]*\*", text) if part.strip("*").strip()]
    double = [
        part for part in re.findall(r"\*\*[^\n\*]*\*\*", text) if part.removeprefix("**").removesuffix("**").strip()
    ]
    return len(single) + len(double) >= num_highlights


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.split(rf"\s?{section_spliter}\s?\d+\s?", text)) - 1 >= num_sections


def is_json(text: str) -> bool:
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def has_title(text: str) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


# --- combinations, start and end, punctuation ---------------------------------------------------


def two_responses(text: str) -> bool:
    """Two different ones, separated by ******; only the first and the last part may be empty."""
    parts = text.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False
    responses = [part.strip() for part in parts if part.strip()]
    return len(responses) == 2 and responses[0] != responses[1]


def repeats_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def ends_with(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def in_quotes(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def no_comma(text: str) -> bool:
    return "," not in text


# instruction -> its check, whose parameters after the text are the arguments it needs
CHECKS: Mapping[str, Check] = {
    "keywords:existence": has_keywords,
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": no_forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": in_language,
    "length_constraints:number_sentences": number_of_sentences,
    "length_constraints:number_paragraphs": number_of_paragraphs,
    "length_constraints:number_words": number_of_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": has_placeholders,
    "detectable_content:postscript": has_postscript,
    "detectable_format:number_bullet_lists": number_of_bullets,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": is_json,
    "detectable_format:title": has_title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeats_prompt,
    "startend:end_checker": ends_with,
    "startend:quotation": in_quotes,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": all_capitals,
    "change_case:english_lowercase": all_lowercase,
    "punctuation:no_comma": no_comma,
}
LANGUAGE = "language:response_language"
# arguments that the authors' code reads as regular expressions
PATTERNS = ("keywords", "keyword", "forbidden_words", "section_spliter", "postscript_marker")


def check_instruction(where: str, name: str, arguments: Arguments) -> dict[str, Any]:
    """The arguments that the check needs. DataError for an unknown instruction, a missing argument or one of
    another kind, or an unknown relation."""
    if name not in CHECKS:
        raise DataError(f"{where}: the instruction {name!r} is not one of {', '.join(CHECKS)}")
    kinds = {
        argument: kind for argument, kind in CHECKS[name].__annotations__.items() if argument not in ("text", "return")
    }
    needed = {argument: arguments.get(argument) for argument in kinds}
    if missing := [argument for argument, value in needed.items() if value is None]:
        raise DataError(f"{where}: the instruction {name!r} needs {missing[0]!r} in its kwargs")
    relation = needed.get("relation") or needed.get("let_relation") or needed.get("capital_relation")
    if relation and relation not in COMPARISONS:
        raise DataError(f"{where}: the relation {relation!r} is not one of {', '.join(COMPARISONS)}")
    if name == LANGUAGE and not can_detect_language():
        raise DataError(
            f"{where}: the instruction {name!r} needs the package langdetect: pip install langdetect, or set "
            "without_language=true"
        )
    # the data set has 3.0 for 3
    found: dict[str, Any] = {key: int(value) if isinstance(value, float) else value for key, value in needed.items()}
    for argument, value in found.items():
        _check_argument(f"{where}: {argument} of {name!r}", value, kinds[argument])
        for pattern in (value if isinstance(value, list) else [value]) if argument in PATTERNS else ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise DataError(
                    f"{where}: {argument} of {name!r} is {pattern!r}, which is read as a regular expression: {error}"
                ) from error
    return found


def _check_argument(what: str, value: Any, kind: Any) -> None:
    """`kind`: the check's annotation, int, str or list[str]."""
    texts = isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)
    if not (texts if kind == list[str] else isinstance(value, kind) and not isinstance(value, bool)):
        needs = {int: "a whole number", str: "a text"}.get(kind, "a list of texts")
        raise DataError(f"{what} is {str(value)[:60]!r}, where {needs} is needed")


def follows(text: str, name: str, arguments: Arguments) -> bool:
    """Strict: an empty response follows nothing."""
    return bool(text.strip()) and CHECKS[name](text, **arguments)


def loose_variants(text: str) -> list[str]:
    """The response, without its first line, last line or both, each with and without asterisks."""
    lines = text.split("\n")
    cut = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(variant.replace("*", "") for variant in cut)]


def follows_loosely(text: str, name: str, arguments: Arguments) -> bool:
    return any(follows(variant, name, arguments) for variant in loose_variants(text))
