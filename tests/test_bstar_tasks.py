"""The tasks of recipes/bstar on files: what is asked, imitated and accepted, and how solutions fall
into steps.
"""

import asyncio
import json
from pathlib import Path

import chz
import pytest

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.renderers import get_renderer
from posttrain.tracking.stages import run_stages
from preference.solutions import grade
from recipes.bstar.config import Config
from recipes.bstar.rewards import PrmRewardBuilder, RewardBuilder
from recipes.bstar.stages import beginning, policy_path
from recipes.bstar.tasks import (
    STEP_END,
    ArcBuilder,
    CodeTaskBuilder,
    Gsm8kBuilder,
    MathTextBuilder,
    Query,
    Task,
    TaskBuilder,
)

pytestmark = pytest.mark.usefixtures("patient_sandbox")
RENDERER = get_renderer("plain", load_tokenizer("tiny"))
GSM8K = [
    {"question": "Ann has 3 bags of 4 apples. How many apples?", "answer": "There are 3*4 = <<3*4=12>>12 apples.\n#### 12"},
    {"question": "A car costs $1,000 and a bike $200. Both?", "answer": "Add them.\nThat is 1,000+200 = <<1000+200=1200>>1,200.\n#### 1,200"},
]  # fmt: skip
MATH = [
    {"problem": "What is $1/2 + 1/3$?", "solution": "We add. The sum is $\\frac{3}{6}+\\frac26$.\n\nSo it is $\\boxed{\\frac{5}{6}}$."},
    {"problem": "Solve $x^2=4$ for $x>0$.", "solution": "Hence $x=\\boxed{2}$."},
]  # fmt: skip
ARC = [
    {"id": "a", "question": "Which is a metal?", "choices": {"text": ["iron", "wood", "salt"], "label": ["1", "2", "3"]}, "answerKey": "1"},
    {"id": "b", "question": "What do plants need?", "choices": {"text": ["noise", "light."], "label": ["A", "B"]}, "answerKey": "B"},
]  # fmt: skip
CODE = [
    {"question": "Read n, print n+1.", "tests": [{"stdin": "1\n", "stdout": "2\n"}], "solution": "n = int(input())\nprint(n + 1)\n"},
    {"question": "Write double(x).", "tests": [{"assert": "assert double(2) == 4"}]},
]  # fmt: skip


def write(folder: Path, rows: list[dict]) -> Path:
    """The first row to train on, the second to test on."""
    folder.mkdir(exist_ok=True)
    for name, row in zip(("train", "test"), rows, strict=True):
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def build(builder: TaskBuilder) -> Task:
    return builder(RENDERER)


def judged(query: Query, text: str) -> tuple[bool, str]:
    """Whether the verifier takes a response, and the answer it reads."""
    tokens: list[int] = RENDERER.tokenizer(f"{text}{RENDERER.tokenizer.eos_token}")["input_ids"]  # type: ignore[assignment]
    response = asyncio.run(grade(query, tokens))
    return response.correct, response.answer or ""


def tasks(tmp_path: Path) -> dict[str, Task]:
    rows = {"gsm8k": GSM8K, "math": MATH, "arc": ARC, "code": CODE}
    folders = {name: write(tmp_path / name, pair) for name, pair in rows.items()}
    math, code = [[str(folders[name] / f"{split}.jsonl") for split in ("train", "test")] for name in ("math", "code")]
    return {
        "gsm8k": build(Gsm8kBuilder(data_dir=str(folders["gsm8k"]), num_dev=1, max_tokens=200)),
        "math": build(MathTextBuilder(train_path=math[0], test_path=math[1], num_dev=1, max_tokens=200)),
        "arc": build(ArcBuilder(data_dir=str(folders["arc"]), num_dev=1, bare_answers=True)),
        "code": build(CodeTaskBuilder(train_path=code[0], test_path=code[1], num_dev=1)),
    }


# Trap: human solutions that the verifier or the step rule does not take.
def test_human_solutions_are_right_and_fall_into_the_steps_of_their_form(tmp_path):
    steps = {
        "gsm8k": ["There are 3*4 = 12 apples.", "#### 12"],
        "math": [
            "We add.",
            "The sum is $\\frac{3}{6}+\\frac26$.",
            "So it is $\\boxed{\\frac{5}{6}}$.",
            "# Answer: \\boxed{\\frac{5}{6}}",
        ],
        "arc": ["The answer is A."],
        "code": ["```python", "n = int(input())", "print(n + 1)", "```"],
    }
    for name, task in tasks(tmp_path).items():
        (query,) = task.train
        assert task.warm_start == task.prm == task.train and query.problem.solution, name
        assert judged(query, query.problem.solution)[0], name
        assert task.form.strings(query.problem.solution) == steps[name]
        assert task.form.malformed(query.problem.solution, ended=True) is None, name


@pytest.mark.parametrize(
    ("name", "split", "text", "correct", "answer"),
    [
        ("gsm8k", "test", "Both cost $1200.\n#### $1200", True, "1200"),
        ("gsm8k", "test", "Both cost $1200.\n#### 120", False, "120"),
        ("gsm8k", "test", "Both cost 1200.", False, ""),
        ("math", "train", "# Answer: \\boxed{5/6}", True, "5/6"),
        ("math", "train", "It is 5/6.", False, ""),
        ("arc", "test", "Plants make sugar of light.\nThe answer is (B).", True, "B"),
        ("arc", "test", "The answer is B. No: the answer is A.", False, "A"),
        ("arc", "test", "The answer is C.", False, ""),  # there are two options
        (
            "code",
            "test",
            "So:\n```python\ndef double(x):\n    return 2 * x\n```",
            True,
            "def double(x):\n    return 2 * x\n",
        ),
        ("code", "test", "```\ndef double(x): return x\n```", False, "def double(x): return x\n"),
        ("code", "test", "def double(x): return 2 * x", False, ""),
    ],
)
def test_what_verifiers_take_and_read(tmp_path, name, split, text, correct, answer):
    (query,) = getattr(tasks(tmp_path)[name], split)
    assert judged(query, text) == (correct, answer)


def test_arc_numbers_become_letters_and_has_nothing_to_imitate(tmp_path):
    task = build(ArcBuilder(data_dir=str(write(tmp_path, ARC)), num_dev=1))
    assert task.train[0].problem.question.startswith("Which is a metal?\nA. iron\nB. wood\nC. salt\nThink")
    assert task.warm_start == [] and task.train[0].problem.solution is None


# Trap: a chat model needs nothing to imitate, and ARC has nothing.
def test_without_solutions_the_rounds_begin_with_the_model_as_it_is(tmp_path, torch_service):
    arc = ArcBuilder(data_dir=str(write(tmp_path / "arc", ARC)), num_dev=1)
    client = torch_service.create_training_client("tiny", seed=1)
    given = client.save_state(str(tmp_path / "given")).result().path
    common = {
        "task": arc,
        "model_name": "tiny",
        "load_checkpoint_path": given,
        "backend": BackendConfig(engine="torch"),
    }
    config = Config(reward=RewardBuilder(), log_path=str(tmp_path / "run"), **common)
    stages = beginning(config, build(arc))
    asyncio.run(run_stages(stages))
    assert policy_path(config) == stages[-1].result
    weights = "model.safetensors"
    assert (stages[-1].result / weights).read_bytes() == (Path(given) / weights).read_bytes()
    with pytest.raises(ConfigError, match="no human solutions"):
        beginning(chz.replace(config, reward=PrmRewardBuilder()), build(arc))
    gsm8k = Gsm8kBuilder(data_dir=str(write(tmp_path / "gsm8k", GSM8K)), num_dev=1)
    imitating = chz.replace(config, task=gsm8k)
    assert "dataset" in chz.asdict(beginning(imitating, build(gsm8k))[0].settings)
    as_it_is = beginning(chz.replace(imitating, warm_start_steps=0), build(gsm8k))
    assert as_it_is[0].made_with() == stages[0].made_with()


def test_generated_programs_are_held_out():
    task = build(CodeTaskBuilder(num_train=5, num_test=3, num_dev=2))
    assert len(task.train) == 5 and len(task.test) == 3
    assert task.form.strings(str(task.train[0].problem.solution))[0] == "```python"


def test_prompts_that_leave_no_room_for_a_solution_are_dropped_and_counted(tmp_path, capsys):
    folder = write(tmp_path, GSM8K)
    long = GSM8K[0] | {"question": "Count. " * 60 + "How many?"}
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (long, GSM8K[0])))
    task = build(Gsm8kBuilder(data_dir=str(folder), num_dev=1, max_tokens=200))
    assert [query.problem.id for query in task.train] == [
        "train-0"
    ] and "train: 1 of 2 prompts are longer than 312" in capsys.readouterr().out


def test_human_solutions_longer_than_the_models_are_left_out_and_counted(tmp_path, capsys):
    task = build(Gsm8kBuilder(data_dir=str(write(tmp_path, GSM8K)), num_dev=1, max_tokens=20))
    assert task.warm_start == [] and task.train[0].problem.solution is None
    assert "train: 1 of 1 human solutions are longer than max_tokens=20" in capsys.readouterr().out


def test_a_bad_row_is_named(tmp_path):
    write(tmp_path, [ARC[0] | {"answerKey": "D"}, ARC[1]])
    with pytest.raises(DataError, match=r"train.jsonl:1: answerKey 'D' is not one of the options 1, 2, 3"):
        build(ArcBuilder(data_dir=str(tmp_path), num_dev=1))


def test_math_solutions_of_people_are_cut_at_sentences_and_not_inside_numbers():
    assert STEP_END.split("It is 2.5 m. Then $x=1$. \\[y\\]\n\nso e.g. this, no?") == [
        "It is 2.5 m.",
        "Then $x=1$.",
        "\\[y\\]",
        "so e.g. this, no?",
    ]
