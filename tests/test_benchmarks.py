"""Benchmarks read rows of the published columns and score as published; each instruction of IFEval
by hand; what a file lacks is said with what it has.
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from envs.benchmark import BenchmarkBuilder
from envs.benchmark_file import BenchmarkFile
from envs.code_benchmarks import HumanEval, Mbpp
from envs.ifeval import IfEval
from envs.instructions import CHECKS, check_instruction, follows, follows_loosely
from envs.math_benchmarks import Aime, Math500
from envs.multiple_choice import Gpqa, MmluPro
from envs.problem import Grade, Problem
from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.tokenizers import character_tokenizer
from posttrain.renderers.plain import PlainRenderer
from tests.jsonl_files import write

pytestmark = pytest.mark.usefixtures("patient_sandbox")
RENDERER = PlainRenderer(character_tokenizer(4096))

MMLU_PRO = {
    "question_id": 70,
    "question": "Which planet is the largest?",
    "options": ["Mars", "Venus", "Jupiter", "Earth", "Saturn"],
    "answer": "C",
    "answer_index": 2,
    "cot_content": "",
    "category": "physics",
    "src": "hand-written",
}
MMLU_PRO_SHOT = MMLU_PRO | {
    "question": "What is 2 + 2?",
    "options": ["3", "4"],
    "answer": "B",
    "cot_content": "A: Let's think step by step. 2 + 2 = 4. The answer is (B).",
}
GPQA = {
    "Question": "Which particle has no charge?",
    "Correct Answer": "the neutron",
    "Incorrect Answer 1": "the proton",
    "Incorrect Answer 2": "the electron",
    "Incorrect Answer 3": "the muon",
    "High-level domain": "Physics",
}
IFEVAL = {
    "key": 1000,
    "prompt": "Write two sentences without commas that mention rain.",
    "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
    "kwargs": [{"keywords": None}, {"keywords": ["rain"]}],
}
HUMANEVAL = {
    "task_id": "HumanEval/900",
    "prompt": 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """Sum of xs."""\n',
    "canonical_solution": "    return sum(xs)\n",
    "test": "def check(candidate):\n    assert candidate([]) == 0\n    assert candidate([1, 2]) == 3\n",
    "entry_point": "total",
}
MBPP = {
    "task_id": 11,
    "text": "Write a function to double a number.",
    "code": "def double(x):\n    return 2 * x",
    "test_list": ["assert double(2) == 4", "assert double(-1) == -2", "assert math.isclose(double(0.5), 1)"],
    "test_setup_code": "import math",
    "challenge_test_list": [],
}
MBPP_SANITIZED = {
    "source_file": "-",
    "task_id": 12,
    "prompt": "Write a function to halve a number.",
    "code": "def halve(x):\n    return x / 2",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(halve(1), 0.5)"],
}
MATH500 = {
    "problem": "What is $1/2 + 1/4$?",
    "solution": "It is \\boxed{\\frac{3}{4}}.",
    "answer": "\\frac{3}{4}",
    "subject": "Prealgebra",
    "level": 1,
    "unique_id": "test/prealgebra/1.json",
}
AIME = {"id": 60, "problem": "Find the remainder of 7 * 29 modulo 1000.", "answer": "203", "year": "2024"}


def graded(problem: Problem, text: str) -> Grade:
    return asyncio.run(problem.grader.grade(text, problem.gold))


def test_mmlu_pro_shows_examples_of_the_category_and_reads_the_letter(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", MMLU_PRO, MMLU_PRO | {"answer": "A"})
    write(tmp_path / "validation.jsonl", MMLU_PRO_SHOT, MMLU_PRO_SHOT | {"category": "law"})
    problem, second = MmluPro(path=str(tmp_path), shots=1).read("test", None)
    assert problem.question == (
        "The following are multiple choice questions (with answers) about physics. Think step by step and then finish "
        'your answer with "the answer is (X)" where X is the correct letter choice.\n\n\n'
        "Question:\nWhat is 2 + 2?\nOptions:\nA. 3\nB. 4\nAnswer: Let's think step by step. 2 + 2 = 4. The answer is "
        "(B).\n\nQuestion:\nWhich planet is the largest?\nOptions:\nA. Mars\nB. Venus\nC. Jupiter\nD. Earth\nE. Saturn\n"
        "Answer: Let's think step by step."
    )
    assert problem.tags == ("mmlu_pro", "physics") and (problem.gold, second.gold) == ("C", "A")
    for text, letter in (
        ("Jupiter is. The answer is (C).", "C"),
        ("the answer is B because", "B"),
        ("Answer: E", "E"),
        ("It may be A, or rather C.", "C"),
        ("the answer is (J).", None),  # there is no option J
        ("I cannot say.", None),
    ):
        assert problem.grader.extract(text) == letter, text
    assert graded(problem, "The answer is (C)").correct and not graded(problem, "The answer is (A)").correct
    with pytest.raises(
        DataError, match=r"shots=2, but the split 'validation' has 1 examples of 'physics'; it has physics, law"
    ):
        MmluPro(path=str(tmp_path), shots=2).read("test", None)
    with pytest.raises(DataError, match="shots=0"):
        MmluPro(path=str(tmp_path / "test.jsonl")).read("test", None)


def test_gpqa_shuffles_options_by_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "gpqa.jsonl", GPQA, GPQA, GPQA)
    problems = Gpqa(path=path).read("test", None)
    assert problems == Gpqa(path=path).read("test", None) and len({p.gold for p in problems}) > 1
    for problem in problems:
        assert f"({problem.gold}) the neutron" in problem.question and problem.tags == ("gpqa", "Physics")
        assert graded(problem, f"So the correct answer is ({problem.gold}).").correct
        assert not graded(problem, "It is the neutron.").correct
    extract = problems[0].grader.extract
    assert [extract(text) for text in ("Answer: (B)", "either (A) or (D)", "Answer: D", "(E)")] == ["B", "A", "D", None]


def test_math_benchmarks_compare_expressions(tmp_path: Path) -> None:
    (problem,) = Math500(path=write(tmp_path / "math.jsonl", MATH500)).read("test", None)
    assert problem.tags == ("math500", "Prealgebra", "level 1")
    assert graded(problem, "So \\boxed{0.75}").correct and not graded(problem, "So \\boxed{\\frac{4}{3}}").correct
    texts, numbers = Aime(path=write(tmp_path / "aime.jsonl", AIME, AIME | {"answer": 33})).read("test", None)
    assert graded(texts, "\\boxed{203}").correct and graded(numbers, "\\boxed{033}").correct
    assert graded(texts, "\\boxed{x}").answer is None
    with pytest.raises(DataError, match=r"aime.jsonl:1: the answer '1000' is not a whole number from 0 to 999"):
        Aime(path=write(tmp_path / "aime.jsonl", AIME | {"answer": "1000"})).read("test", None)


# instruction, arguments, a response that follows, one that does not
INSTRUCTIONS: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["Rain", "sun"]}, "rain and SUN", "rain alone"),
    ("keywords:frequency", {"keyword": "go", "frequency": 2, "relation": "at least"}, "go, ergo", "go"),
    ("keywords:frequency", {"keyword": "go", "frequency": 2, "relation": "less than"}, "go", "go go"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", "a Cat"),
    ("keywords:letter_frequency", {"letter": "A", "let_frequency": 3, "let_relation": "at least"}, "banana", "band"),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "at least"}, "One. Two! Three?", "1. e.g. x"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "Mr. Lee is 3.5 m tall.", "A b. C d."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb\n***\n", "a\n***\n***\nb"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "a b-c", "a b"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
        "One.\n\n\"So, it is.",
        "One.\n\nThus.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] and [city]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. Call.", "Bye. PS call"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\np. p. s. Call.", "Bye.\nP.S. Call"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b\n** c", "* a"),
    ("detectable_format:constrained_response", {}, "Well. My answer is maybe.", "maybe"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", "*a* and ** **"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        "SECTION one\nSECTION 2",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<Rain>>\nIt rains.", "<< >>\nIt rains."),
    ("combination:two_responses", {}, "yes\n******\nno", "yes******yes"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "say hi.\nHi", "Hi. Say hi."),
    ("startend:end_checker", {"end_phrase": "That is all."}, 'So "that is all."', "That is all. Bye"),
    ("startend:quotation", {}, ' "Hi" ', '"Hi'),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "less than"}, "It is BIG", "A BIG"),
    ("change_case:english_capital", {}, "ALL IS WELL 1", "All IS WELL"),
    ("change_case:english_lowercase", {}, "all is well 1", "All is well"),
    ("punctuation:no_comma", {}, "a b; c", "a, b"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), INSTRUCTIONS)
def test_each_instruction_by_hand(name: str, arguments: dict[str, Any], good: str, bad: str) -> None:
    needed = check_instruction("row", name, arguments | {"language": None})
    assert follows(good, name, needed) and not follows(bad, name, needed)
    assert not follows("  \n", name, needed), "an empty response follows nothing"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("keywords:existence", {"keywords": "rain"}, "keywords of .* is 'rain', where a list of texts is needed"),
        ("keywords:existence", {"keywords": []}, "a list of texts"),
        ("keywords:existence", {"keywords": ["C("]}, r"'C\(', which is read as a regular expression"),
        ("length_constraints:number_words", {"num_words": "9", "relation": "at least"}, "a whole number is needed"),
        ("startend:end_checker", {"end_phrase": 3}, "a text is needed"),
    ],
)
def test_an_instructions_arguments_are_checked_when_they_are_read(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl:3: .*{message}"):
        check_instruction("rows.jsonl:3", name, arguments)


def test_every_published_instruction_has_a_check_and_a_case() -> None:
    assert len(CHECKS) == 25
    assert CHECKS.keys() - {name for name, *_ in INSTRUCTIONS} == {"language:response_language"}  # needs langdetect


def test_the_loose_accuracy_leaves_out_first_and_last_lines_and_asterisks() -> None:
    end = ("startend:end_checker", {"end_phrase": "done."})
    assert not follows("Done.\nLet me know!", *end) and follows_loosely("Done.\nLet me know!", *end)
    assert follows_loosely("**Done.**", *end) and not follows("**Done.**", *end)
    comma = ("punctuation:no_comma", {})
    assert follows_loosely("Sure, here:\nRain falls.\nWell, bye", *comma)
    assert not follows_loosely("Sure, here:\nRain, falls.\nbye", *comma)


def test_ifeval_counts_prompts_and_instructions(tmp_path: Path) -> None:
    (problem,) = IfEval(path=write(tmp_path / "ifeval.jsonl", IFEVAL)).read("test", None)
    assert graded(problem, "Rain falls. It stops.").metrics == {
        "prompt_strict": 1, "prompt_loose": 1, "instructions": 2, "followed_strict": 2, "followed_loose": 2,
    }  # fmt: skip
    half = graded(problem, "Rain, of course.")
    assert not half.correct and half.metrics["followed_strict"] == 1 and half.metrics["prompt_strict"] == 0
    assert half.logs["followed"] == "punctuation:no_comma: no\nkeywords:existence: yes"
    assert graded(problem, "Sure, rain:\nThe rain falls.").metrics["prompt_loose"] == 1
    for change, message in (
        ({"instruction_id_list": ["punctuation:no_dash", "a"]}, "'punctuation:no_dash' is not one of keywords:existence"),
        ({"kwargs": [{}, {}]}, "'keywords:existence' needs 'keywords' in its kwargs"),
        ({"kwargs": [{}]}, "2 instructions and 1 kwargs"),
        ({"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "de"}]}, "without_language=true"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            IfEval(path=write(tmp_path / "bad.jsonl", IFEVAL | change)).read("test", None)
    german = IFEVAL | {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "de"}]}
    path = write(tmp_path / "two.jsonl", german, IFEVAL)
    assert [p.id for p in IfEval(path=path, without_language=True).read("test", None)] == [f"{path}:2"]


def test_humaneval_runs_the_function_after_the_prompts_imports(tmp_path: Path) -> None:
    (problem,) = HumanEval(path=write(tmp_path / "humaneval.jsonl", HUMANEVAL)).read("test", None)
    whole = "```python\ndef total(xs: List[int]) -> int:\n    return sum(xs)\n```"
    for text in (whole, f"Sure.\n{whole}", "    return sum(xs)\n\ndef other():\n    return undefined\nx = 1 / 0"):
        assert graded(problem, text).correct, text
    assert not graded(problem, whole.replace("sum", "max")).correct
    assert not graded(problem, "    pass").correct


def test_mbpp_reads_both_forms(tmp_path: Path) -> None:
    (problem,) = Mbpp(path=write(tmp_path / "mbpp.jsonl", MBPP)).read("test", None)
    assert all(test in problem.question for test in MBPP["test_list"])
    code = "def double(x):\n    return x + x"
    for text in (code, f"```python\n{code}\n```", f"[BEGIN]\n{code}\n[DONE]"):
        assert graded(problem, text).correct, text
    assert not graded(problem, code.replace("+", "-")).correct
    (sanitized,) = Mbpp(path=write(tmp_path / "mbpp.jsonl", MBPP_SANITIZED)).read("test", None)
    assert graded(sanitized, MBPP_SANITIZED["code"]).correct


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (MMLU_PRO, "mmlu_pro"), (GPQA, "gpqa"), (IFEVAL, "ifeval"), (HUMANEVAL, "humaneval"), (MBPP, "mbpp"),
        (MATH500, "math500"),
        ({"question": "Q?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}, "arc"),
        ({"question": "1+1?", "answer": "so 2\n#### 2"}, "gsm8k"),
        ({"question": "Add.", "tests": [{"stdin": "1", "stdout": "1"}]}, "code"),
    ],
)  # fmt: skip
def test_a_file_is_known_by_its_columns(tmp_path: Path, row: dict[str, Any], kind: str) -> None:
    file = BenchmarkFile(path=write(tmp_path / "some.jsonl", row))
    (problem,) = (file.benchmark() or file).read("test", None)
    assert problem.tags[0] == kind
    dataset = asyncio.run(file.test_set(RENDERER))
    assert dataset is not None and len(dataset.get_batch(0)) == 1


@pytest.mark.parametrize("row", [HUMANEVAL, {"question": "1+1?", "answer": "so 2\n#### 2"}], ids=["benchmark", "rows"])
def test_a_file_takes_the_options_of_an_environment(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write(tmp_path / "some.jsonl", row)
    with pytest.raises(DataError, match="longer than 3 tokens"):
        asyncio.run(BenchmarkFile(path=path, max_prompt_tokens=3, overlong="raise").test_set(RENDERER))
    with pytest.raises(DataError, match="few_shot=2: .* has no training problems to show"):
        asyncio.run(BenchmarkFile(path=path, few_shot=2).test_set(RENDERER))


def test_a_file_of_questions_with_answers(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", {"question": "2+2?", "answer": "4"}, {"question": "Where?", "answer": "In Rome"})
    number, text = BenchmarkFile(path=path).read("test", None)
    assert graded(number, "The answer is 4.0").correct and graded(text, "The answer is in rome.").correct
    with pytest.raises(
        DataError, match=r"q.jsonl:1: the columns are a, b; a file of problems has one of: prompt, canon"
    ):
        BenchmarkFile(path=write(tmp_path / "q.jsonl", {"a": 1, "b": 2})).read("test", None)


BENCHMARKS: list[tuple[type[BenchmarkBuilder], dict[str, Any]]] = [
    (Math500, MATH500), (Aime, AIME), (Gpqa, GPQA), (IfEval, IFEVAL), (HumanEval, HUMANEVAL), (Mbpp, MBPP),
    (MmluPro, MMLU_PRO),
]  # fmt: skip


@pytest.mark.parametrize(("benchmark", "row"), BENCHMARKS)
def test_a_missing_split_or_column_is_said_with_what_is_there(
    tmp_path: Path, benchmark: type[BenchmarkBuilder], row: dict[str, Any]
) -> None:
    write(tmp_path / "other.jsonl", row)
    with pytest.raises(DataError, match=r"has no \w+\.jsonl; it has other\.jsonl"):
        benchmark(path=str(tmp_path)).read("test", None)
    path = write(tmp_path / "file.jsonl", {"nothing": 1})
    with pytest.raises(DataError, match=r"file\.jsonl:1: no field '[\w ]+'; the fields are 'nothing'"):
        (MmluPro(path=path, shots=0) if benchmark is MmluPro else benchmark(path=path)).read("test", None)
    with pytest.raises(ConfigError, match="without training problems"):
        asyncio.run(benchmark(path=path)(RENDERER))


def test_a_data_set_saved_by_the_datasets_library_is_read_as_the_hub_is(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict({"test": datasets.Dataset.from_list([MATH500])}).save_to_disk(str(tmp_path / "saved"))
    (problem,) = Math500(path=str(tmp_path / "saved")).read("test", None)
    assert problem.gold == MATH500["answer"]
    with pytest.raises(DataError, match=r"split 'dev', could not be loaded: it has test"):
        Math500(path=str(tmp_path / "saved"), split="dev").read("test", None)
