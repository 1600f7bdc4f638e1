"""ProblemEnv's reward, the datasets' purity and splits, and what word-problem files may get
wrong.
"""

import asyncio
import pickle
from functools import partial
from pathlib import Path

import chz
import numpy as np
import pytest

from envs.arc_challenge import ArcChallenge, OptionGrader
from envs.arithmetic import ArithmeticBuilder, ArithmeticExamplesBuilder, PairSpace, WholeNumber
from envs.code import CodeProblems
from envs.math_word import Gsm8k, Gsm8kBuilder, HendrycksMath, MathWordBuilder, WordProblems
from envs.problem import GraderError, Problem, split_off
from envs.problem_env import (
    ProblemEnv,
    ProblemExamples,
    ProblemGroupBuilder,
    ProblemSetBuilder,
    fit_problems,
    problem_groups,
)
from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.tokenizers import character_tokenizer
from posttrain.backend.types import Datum
from posttrain.renderers.plain import PlainRenderer
from posttrain.renderers.turns import encode
from posttrain.tracking.datasets import ListDataset
from rl.types import EnvGroupBuilder, RLDataset
from tests.jsonl_files import write

TOKENIZER = character_tokenizer(128)
RENDERER = PlainRenderer(TOKENIZER)


def action(text: str, stopped: bool = True) -> list[int]:
    return encode(TOKENIZER, text) + RENDERER.eos * stopped


def sum_problem(question: str = "12+34=") -> Problem:
    return Problem(question, str(eval(question[:-1])), WholeNumber())


@pytest.mark.parametrize(
    ("text", "stopped", "formatted", "correct", "reward"),
    [
        ("46", True, 1, 1, 1.0),
        ("47", True, 1, 0, 0.0),
        ("146", True, 1, 0, 0.0),
        ("it is 46", True, 0, 0, -0.1),
        ("46", False, 0, 1, 0.9),
        ("4", False, 0, 0, -0.1),
    ],
)
def test_reward_is_correctness_less_a_tenth_for_bad_format(
    text: str, stopped: bool, formatted: int, correct: int, reward: float
):
    result = asyncio.run(ProblemEnv(sum_problem(), RENDERER).step(action(text, stopped)))
    assert result.reward == pytest.approx(reward) and result.episode_done
    assert result.metrics == {"format": formatted, "correct": correct, "truncated": not stopped}
    assert result.logs == {"question": "12+34=", "gold": "46", "extracted": text}


def test_a_group_shares_one_prompt_and_pickles():
    builder = ProblemGroupBuilder(partial(ProblemEnv, sum_problem("1+2="), RENDERER), 4, ["sums"])
    copy = pickle.loads(pickle.dumps(builder))
    envs_G = asyncio.run(copy.make_envs())
    assert len(envs_G) == 4 and copy.logging_tags() == ["sums"] and len({id(env.build_prompt()) for env in envs_G}) == 1
    prompt, stop = asyncio.run(envs_G[3].initial_observation())
    assert TOKENIZER.decode(prompt.to_ints()) == "1+2=" and stop == [TOKENIZER.eos_token_id]


def groups(count: int) -> list[ProblemGroupBuilder]:
    return problem_groups([sum_problem(f"{i}+0=") for i in range(count)], RENDERER, 2)


def questions(dataset: RLDataset, index: int) -> list[str]:
    return [asyncio.run(builder.make_envs())[0].question() for builder in dataset.get_batch(index)]  # type: ignore[attr-defined]


def test_every_epoch_has_every_problem_once_in_a_new_order():
    dataset = ListDataset(groups(10), batch_size=4, seed=3)
    assert len(dataset) == 3
    epochs = [[q for i in range(3) for q in questions(dataset, 3 * epoch + i)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(f"{i}+0=" for i in range(10)) and epochs[0] != epochs[1]
    assert questions(ListDataset(groups(10), 4, seed=3), 4) == questions(dataset, 4)
    assert [q for i in range(3) for q in questions(ListDataset(groups(10), 4, shuffle=False), i)] == sorted(epochs[0])


# Trap: prompts and examples cut or dropped without a word.
def test_overlong_prompts_are_dropped_and_counted_or_refused(capsys: pytest.CaptureFixture[str]):
    short, long = sum_problem("1+1="), sum_problem("1111+1111=")
    assert fit_problems([short, long], RENDERER, 5, "drop", "sums") == [short]
    assert capsys.readouterr().out == "sums: 1 of 2 prompts are longer than 5 tokens (the longest has 10); dropped\n"
    with pytest.raises(DataError, match="1 of 2 prompts"):
        fit_problems([short, long], RENDERER, 5, "raise")
    with pytest.raises(DataError, match="1 of 1 prompts"):
        fit_problems([long], RENDERER, 5, "drop")


@pytest.mark.parametrize(("gold", "said", "right"), [("4\n", "4", True), (" 4 ", " 4", True), ("4\n", "5", False)])
def test_white_space_around_the_gold_answer_does_not_count(gold: str, said: str, right: bool):
    reward, _, _ = asyncio.run(Problem("q", gold).scored(said, truncated=False))
    assert reward == right


def test_a_grader_that_cannot_decide_gives_no_reward():
    class Broken(WholeNumber):
        async def is_right(self, answer: str, gold: str) -> bool:
            raise GraderError("timed out")

    with pytest.raises(GraderError):
        asyncio.run(ProblemEnv(Problem("1+1=", "2", Broken()), RENDERER).step(action("2")))


# --- arithmetic ---------------------------------------------------------------------------------


# Trap: held-out problems met in training, as themselves or mirrored.
@pytest.mark.parametrize("operators", ["+", "+-*"])
def test_held_out_pairs_are_never_drawn_and_all_others_are(operators: str):
    space = PairSpace(1, 1, operators, num_test=20, split_seed=1)
    drawn = set(space.draw_train(20_000, [0]).tolist())
    assert drawn == set(range(space.size)) - set(space.held_out_D.tolist())
    held_out = {space.problem(n).question for n in space.test_D}
    mirrored = {q[2] + q[1] + q[0] + "=" for q in held_out}
    assert len(held_out) == 20 and not {space.problem(n).question for n in drawn} & (held_out | mirrored)


def test_problems_are_right():
    space = PairSpace(2, 1, "+-*", num_test=10, split_seed=0)
    problems = map(space.problem, range(0, space.size, 7))
    assert all(str(eval(problem.question[:-1])) == problem.gold for problem in problems)


def build(builder: ArithmeticBuilder) -> tuple[RLDataset, RLDataset]:
    train, test = asyncio.run(builder(RENDERER))
    assert test is not None
    return train, test


def test_arithmetic_batches_depend_on_seed_and_index_alone():
    builder = ArithmeticBuilder(batch_size=16, group_size=2, n_batches=5, num_test=30)
    train, test = build(builder)
    assert questions(train, 3) == questions(build(builder)[0], 3) != questions(train, 2)
    other_train, other_test = build(chz.replace(builder, seed=1))
    assert questions(other_train, 3) != questions(train, 3) and questions(other_test, 1) == questions(test, 1)
    assert (len(train), len(test), len(train.get_batch(0)), len(test.get_batch(1))) == (5, 2, 16, 14)
    group: EnvGroupBuilder = pickle.loads(pickle.dumps(train.get_batch(0)[0]))
    assert len(asyncio.run(group.make_envs())) == 2


def text_of(datum: Datum) -> str:
    """Prompt and answer: the inputs, and the last target."""
    tokens = [*datum.model_input.to_ints(), int(datum.loss_fn_inputs["target_tokens"].to_numpy()[-1])]
    return TOKENIZER.decode(tokens, skip_special_tokens=True)  # type: ignore[return-value]


def test_warm_start_and_rl_hold_out_the_same_problems():
    _, rl_test = build(ArithmeticBuilder(num_test=30, seed=5))
    train, test = ArithmeticExamplesBuilder(num_test=30, seed=6, batch_size=30, n_batches=4)(RENDERER)
    assert test is not None and len(test) == 1 and len(train) == 4
    held_out = [text.split("=")[0] + "=" for text in map(text_of, test.get_batch(0))]
    assert held_out == questions(rl_test, 0)
    first = [text_of(datum) for datum in train.get_batch(0)]
    assert not set(held_out) & {text.split("=")[0] + "=" for text in first}
    train.set_epoch(1)
    assert [text_of(datum) for datum in train.get_batch(0)] != first
    weights = train.get_batch(0)[0].loss_fn_inputs["weights"].to_numpy()
    assert weights.sum() == pytest.approx(1.0) and np.count_nonzero(weights) >= 2


def test_fewshot_prefix_shows_worked_examples():
    train, _ = build(ArithmeticBuilder(include_fewshot=True, batch_size=1))
    env = asyncio.run(train.get_batch(0)[0].make_envs())[0]
    assert isinstance(env, ProblemEnv)
    assert TOKENIZER.decode(env.build_prompt().to_ints()).count("=") == 5


@pytest.mark.parametrize(
    "bad", [{"operators": "+/"}, {"operators": ""}, {"num_digits": 0}, {"num_test": 0}, {"num_test": 10_000}]
)
def test_impossible_arithmetic_is_a_config_error(bad: dict):
    with pytest.raises(ConfigError):
        asyncio.run(ArithmeticBuilder(**bad)(RENDERER))


# --- word problems ------------------------------------------------------------------------------


def gsm8k_row(answer: str = "1,018", question: str = "How many?") -> dict:
    return {"question": question, "answer": f"9*2 = <<9*2=18>>18\n#### {answer}"}


def first_env(builder: ProblemSetBuilder) -> ProblemEnv:
    train, _ = asyncio.run(builder(RENDERER))
    env = asyncio.run(train.get_batch(0)[0].make_envs())[0]
    assert isinstance(env, ProblemEnv)
    return env


def test_gsm8k_from_a_folder(tmp_path: Path):
    write(tmp_path / "train.jsonl", gsm8k_row(), gsm8k_row("-3"))
    write(tmp_path / "test.jsonl", gsm8k_row("5", "Which?"), gsm8k_row("6", "Who?"))
    builder = Gsm8kBuilder(data_dir=str(tmp_path), num_train=1, batch_size=2, prompt_template="{question} {x}")
    env = first_env(builder)
    assert (env.question(), env.problem.gold, env.problem.solution) == (
        "How many? {x}",
        "1,018",
        "9*2 = 18\n#### 1,018",
    )
    for text, correct, formatted in [
        ("#### 1018", 1, 1),
        (r"\boxed{1018.0}", 1, 1),
        ("#### 18", 0, 1),
        ("#### 1000+18", 0, 0),
        ("1018", 0, 0),
    ]:
        metrics = asyncio.run(env.step(action(text))).metrics
        assert (metrics["correct"], metrics["format"]) == (correct, formatted), text
    assert asyncio.run(env.step(action("#### 18"))).logs["extracted"] == "18"
    _, test = asyncio.run(builder(RENDERER))
    assert test is not None and len(test.get_batch(0)) == 2
    examples, held_out = ProblemExamples(problems=Gsm8k(data_dir=str(tmp_path), num_train=1))(RENDERER)
    assert [text_of(datum) for datum in examples.get_batch(0)] == ["How many?9*2 = 18\n#### 1,018"]
    assert held_out is not None and len(held_out.get_batch(0)) == 2


def test_a_question_in_both_splits_is_an_error_with_the_first_example(tmp_path: Path):
    write(tmp_path / "train.jsonl", gsm8k_row(question="Who?"), gsm8k_row("-3"), gsm8k_row())
    write(tmp_path / "test.jsonl", gsm8k_row("5", "Which?"), gsm8k_row("6"))
    with pytest.raises(DataError, match=r"^2 training .*, first .*train.jsonl:2 \(as .*test.jsonl:2\): 'How many\?'"):
        Gsm8k(data_dir=str(tmp_path)).splits()
    train, held_out = split_off(Gsm8k(data_dir=str(tmp_path)).read("train", None), 1, 0, "num_validation")
    assert not {problem.question for problem in train} & {problem.question for problem in held_out}


def test_math_style_answers_are_compared_symbolically(tmp_path: Path):
    path = write(
        tmp_path / "math.jsonl",
        {"problem": "Half?", "solution": r"So \boxed{1} is not it, but \boxed{\frac{\sqrt{2}}{2}}."},
    )
    env = first_env(MathWordBuilder(train_path=path))
    assert asyncio.run(env.step(action(r"\boxed{1/\sqrt{2}}"))).reward == 1.0
    assert asyncio.run(env.step(action(r"\boxed{1/\sqrt{3}}"))).reward == 0.0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (gsm8k_row("eighteen"), "no hash answer"),
        ({"question": "How many?", "answer": "18"}, "no hash answer"),
    ],
)
def test_bad_rows_name_their_line(tmp_path: Path, row: dict, message: str):
    path = write(tmp_path / "train.jsonl", gsm8k_row(), row)
    with pytest.raises(DataError, match=f"train.jsonl:2: {message}"):
        first_env(Gsm8kBuilder(train_path=path))


def test_bad_golds_can_be_dropped_and_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [
        {"problem": "a", "solution": r"\boxed{((}"},
        {"problem": "b", "solution": r"\boxed{5}"},
        {"problem": "c", "solution": "5"},
    ]
    path = write(tmp_path / "math.jsonl", *rows)
    assert first_env(MathWordBuilder(train_path=path, bad_gold="drop")).question() == "b"
    assert "math train: 2 of 3 problems" in capsys.readouterr().out


# Trap: a file to evaluate on, passed over for the hub's problems or for generated ones.
def test_a_file_to_evaluate_on_is_read_without_one_to_train_on(tmp_path: Path):
    word = {"question": "Half?", "problem": "Half?", "answer": "#### 5", "solution": r"\boxed{5}"}
    test_path = write(tmp_path / "mine.jsonl", word)
    write(tmp_path / "train.jsonl", gsm8k_row())
    write(tmp_path / "test.jsonl", gsm8k_row(question="Who?"))
    sets = [Gsm8k(data_dir=str(tmp_path), test_path=test_path)]
    sets += [kind(test_path=test_path) for kind in (Gsm8k, WordProblems, HendrycksMath)]
    for problems in sets:
        assert [problem.question for problem in problems.problems_of("test", None)] == ["Half?"]
    assert [problem.question for problem in sets[0].problems_of("train", None)] == ["How many?"]
    program = {"question": "Half?", "tests": [{"assert": "assert half(2) == 1"}]}
    code = CodeProblems(test_path=write(tmp_path / "code.jsonl", program))
    assert [problem.question for problem in code.problems_of("test", None)] == ["Half?"]
    assert len(code.problems_of("train", None)) > 100


def test_a_missing_file_and_a_bad_template_are_errors(tmp_path: Path):
    with pytest.raises(DataError, match="no such file"):
        first_env(MathWordBuilder(train_path=str(tmp_path / "none.jsonl")))
    with pytest.raises(ConfigError, match="question"):
        first_env(Gsm8kBuilder(train_path=write(tmp_path / "t.jsonl", gsm8k_row()), prompt_template="Solve:"))
    with pytest.raises(ConfigError, match="train_path"):
        first_env(MathWordBuilder())


@pytest.mark.parametrize("said", [" B", " (B)", " **B**", " **(B)** a cell", ": B.", " \nB", ":** B"])
def test_a_letter_is_read_in_brackets_and_in_bold(said: str):
    assert OptionGrader(4).extract(f"So the answer is{said}") == "B" and OptionGrader(1).extract("answer is B") is None


def test_options_that_share_a_label_are_named_by_their_line(tmp_path: Path):
    row = {"question": "Which?", "choices": {"label": ["A", "A"], "text": ["x", "y"]}, "answerKey": "A"}
    write(tmp_path / "train.jsonl", row)
    with pytest.raises(DataError, match=r"train.jsonl:1: 2 options are labelled A, A: give each its own label"):
        ArcChallenge(data_dir=str(tmp_path)).read("train", None)
