"""SingleTurn: rewards composed, rubrics judged, groups compared. What cannot be judged has no
reward, and the error says which reward and which criterion.
"""

import asyncio
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from envs.problem import Grader, Problem
from envs.rewards import Answer, Value, compared, correct_answer, finished, group_reward, weighted
from envs.rubric import Criterion, LanguageJudge, read_criteria, rubric
from envs.single_turn import GivenProblems, QuestionFile, RubricBuilder, SingleTurn
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.renderers import get_renderer
from posttrain.renderers.types import Renderer
from posttrain.tracking.command_line import parse
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.settings import config_to_json
from preference.endpoint import ChatEndpoint
from preference.reward_types import JudgeError
from preference.types import Comparison
from rl import play, train
from rl.names import ENVS
from rl.rollouts import RolloutLimits
from rl.train_cli import CLIConfig
from rl.types import TrajectoryGroup
from tests.test_pairwise import SHORTER, Endpoint, endpoint, rolled_out  # noqa: F401 (a fixture)

ANT = Problem("ant: ", "ant", tags=("insects",))


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return get_renderer("plain", load_tokenizer("tiny"))


def group_of(renderer: Renderer, rewards: Sequence, answers_G: Sequence[str], size: int | None = None):
    builder = SingleTurn([ANT], rewards, batch_size=1, group_size=size or len(answers_G))
    dataset, held_out = asyncio.run(builder(renderer))
    assert held_out is None
    (group,) = dataset.get_batch(0)
    return rolled_out(group, answers_G)


def errors(group: TrajectoryGroup) -> str:
    assert group.trajectories_G == [] and group.final_rewards_G == []
    return str(group.errors[0])


def length(answer: Answer) -> float:
    return len(answer.text) / 10


async def vowels(answer: Answer, criterion: Criterion) -> float:
    return float(any(letter in answer.text for letter in criterion.text))


# --- composition ----------------------------------------------------------------------------------


def test_rewards_by_hand_and_each_is_a_metric(renderer):
    """0.5 * correct + 2 * length + 1 * rank in the group."""

    def rank(answers: Sequence[Answer]) -> list[float]:
        return np.argsort(np.argsort([len(answer.text) for answer in answers])).tolist()

    group = group_of(
        renderer, [weighted(correct_answer, 0.5), weighted(length, 2.0), group_reward(rank)], ["ant", "b|"]
    )
    assert group.get_total_rewards() == pytest.approx([0.5 + 0.6 + 1, 0 + 0.2 + 0])
    alone = [trajectory.transitions[0].metrics for trajectory in group.trajectories_G]
    assert alone[0] == pytest.approx(
        {"reward/correct_answer": 1, "correct": 1, "format": 1, "reward/length": 0.3, "truncated": 0}
    )
    assert alone[1]["truncated"] == 1 and alone[1]["format"] == 0 and alone[1]["reward/length"] == 0.1
    assert group.metrics_G == [{"reward/rank": 1.0}, {"reward/rank": 0.0}] and group.tags == ["insects"]
    assert group.trajectories_G[0].transitions[0].logs["extracted"] == "ant"


def test_answers_of_a_group_are_compared(renderer):
    group = group_of(renderer, [compared(SHORTER, weight=0.5), finished], ["a", "bbb", "cc|", "dd"])
    assert [m["reward/compared"] for m in group.metrics_G] == pytest.approx([1, -1, 0, 0])
    assert group.get_total_rewards() == pytest.approx([1.5, 0.5, 0, 1])


def test_a_single_held_out_answer_has_no_group_reward_but_a_lonely_survivor_is_no_group(renderer):
    def fails_on_b(answer: Answer) -> float:
        return 1 / (answer.text != "b")

    rewards = [finished, compared(SHORTER)]
    builder = SingleTurn([ANT], rewards, test=[Problem("bee: ", "bee")], batch_size=1, group_size=2)
    _, held_out = asyncio.run(builder(renderer))
    assert held_out is not None
    assert rolled_out(held_out.get_batch(0)[0], ["x"]).get_total_rewards() == [1.0]
    assert "nothing to compare it with" in str(group_of(renderer, [fails_on_b, *rewards[1:]], ["a", "b"]).errors)
    with pytest.raises(ConfigError, match="group_size=1: the reward compared compares"):
        asyncio.run(SingleTurn([ANT], rewards, group_size=1)(renderer))
    with pytest.raises(ConfigError, match="matchup_group_size=1 must be at least 2"):
        compared(SHORTER, matchup_group_size=1)


def test_a_person_plays_without_the_rewards_of_a_group(renderer, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda prompt: "ant")
    train, _ = asyncio.run(SingleTurn([ANT], [correct_answer, compared(SHORTER)], batch_size=1, group_size=2)(renderer))
    played = play.play_group(train.get_batch(0)[0], renderer.tokenizer, 20, RolloutLimits())
    assert asyncio.run(played) == [1.0]
    assert "without the group's rewards, of which a single attempt has none: only one" in capsys.readouterr().out


@pytest.mark.parametrize("number", [np.float32(0.5), np.bool_(True), np.array(0.5)], ids=repr)
def test_judges_may_answer_with_numpys_numbers(renderer, number):
    async def judge(comparison: Comparison) -> Any:
        return number

    rewards = [rubric({"kind": "Be kind."}, lambda answer, criterion: number), compared(judge, weight=0.0)]
    assert group_of(renderer, rewards, ["a", "b"]).get_total_rewards() == [float(number)] * 2


# Trap: a reward that raises, or returns nonsense, scored as 0.
@pytest.mark.parametrize("result", [None, "1", math.nan, math.inf, [1.0], Value(math.nan)])
def test_a_reward_that_is_no_number_is_a_failed_rollout(renderer, result):
    def odd(answer: Answer):
        return result

    assert "reward odd returned" in errors(group_of(renderer, [finished, odd], ["a"]))


def test_a_reward_that_raises_is_a_failed_rollout_and_says_which(renderer):
    def broken(answer: Answer) -> float:
        return {}["key"]

    assert re.fullmatch(
        r"reward broken raised KeyError: 'key' \(.*test_rewards.py:\d+\)", errors(group_of(renderer, [broken], ["a"]))
    )
    group = group_of(renderer, [group_reward(lambda answers: [1.0], name="short")], ["a", "b"])
    assert "reward short returned [1.0], not a number for each of 2" in errors(group)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([], "rewards is empty"),
        ([length, length], "two rewards are called length"),
        ([lambda answer: 1.0], "give it a name"),
        ([weighted(length, 1.0, "total")], "called total"),
        (["correct"], "'correct' is not a reward"),
    ],
)
def test_a_malformed_list_of_rewards_is_a_clear_error(rewards, message):
    with pytest.raises(ConfigError, match=message):
        SingleTurn([ANT], rewards)


# --- rubrics --------------------------------------------------------------------------------------


def test_a_rubric_by_hand(renderer):
    """(2 * a + 1 * e - 3 * i) / 3, with a judge that is a function."""
    criteria = [Criterion("a", "a", 2.0), {"name": "e", "text": "e"}, {"name": "i", "text": "i", "weight": -3}]
    group = group_of(renderer, [rubric(criteria, vowels, weight=6.0)], ["a", "ae", "aei", "x"])
    assert group.get_total_rewards() == pytest.approx([4, 6, 0, 0])
    assert group.trajectories_G[1].transitions[0].metrics == pytest.approx(
        {"reward/rubric": 1, "reward/rubric/a": 1, "reward/rubric/e": 1, "reward/rubric/i": 0, "truncated": 0}
    )


@pytest.mark.parametrize(
    ("criteria", "message"),
    [
        ([], "no criterion has a weight above 0"),
        ({"a": ""}, r"criterion 1 \(a\): 'text' is '', not a text"),
        ([{"name": "a", "text": "x"}, {"text": "y"}], r"criterion 2 \(no name\): 'name' is None"),
        ([{"name": "a", "text": "x", "wieght": 1}], "criterion 1: no field is called 'wieght'; did you mean weight"),
        ([{"name": "a", "text": "x", "weight": "2"}], r"criterion 1 \(a\): weight='2' must be a number"),
        ([{"name": "a", "text": "x", "weight": math.nan}], r"criterion 1 \(a\): weight=nan must be a finite number"),
        ([{"name": "a", "text": "x", "weight": 0}], r"criterion 1 \(a\): weight=0"),
        ([{"name": "a", "text": "x"}] * 2, "criterion 2 is called 'a', like another one"),
        ([{"name": "a", "text": "x", "weight": -1}], "no criterion has a weight above 0"),
        (["be polite"], "criterion 1 is 'be polite': an object with name"),
        (3, "neither a list of criteria"),
    ],
)
def test_a_malformed_rubric_is_an_error_that_names_the_criterion(criteria, message):
    with pytest.raises(ConfigError, match=message):
        rubric(criteria, vowels)


def test_rubrics_are_read_from_files(tmp_path):
    rows = [{"name": "a", "text": "x", "weight": 2}, {"name": "b", "text": "y"}]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "named.json").write_text('{"a": "x"}')
    expected = (Criterion("a", "x", 2.0), Criterion("b", "y", 1.0))
    assert read_criteria(str(tmp_path / "r.json")) == read_criteria(str(tmp_path / "r.jsonl")) == expected
    assert read_criteria(str(tmp_path / "named.json")) == (Criterion("a", "x"),)
    for content, message in (("{", "not JSON"), ('[{"name": "a"}]', "criterion 1")):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ConfigError, match=message):
            rubric(str(tmp_path / "bad.json"), vowels)
    with pytest.raises(ConfigError, match="nothing.json"):
        rubric(str(tmp_path / "nothing.json"), vowels)


@pytest.mark.parametrize("score", [1.5, -0.1, math.nan, "good", None])
def test_a_judge_out_of_range_is_a_failed_rollout(renderer, score):
    message = errors(group_of(renderer, [rubric({"polite": "x"}, lambda answer, criterion: score)], ["a"]))
    assert message == f"rubric, criterion 'polite': the judge answered {score!r}; a number from 0 to 1 is needed"


@pytest.mark.parametrize(
    ("reply", "score"),
    [("7", 0.7), ("It is polite.\n\n**Score: 8.5/10**", 0.85), ("0.", 0.0), ("fine\n10", 1.0)],
)
def test_a_language_model_ends_with_a_number(reply, score):
    async def complete(text: str) -> str:
        assert (
            text.index("ant: ") < text.index("[Reference answer]\nant") < text.index("hello") < text.index("Be kind.")
        )
        return reply

    judged = asyncio.run(LanguageJudge(complete)(Answer(ANT, "hello"), Criterion("kind", "Be kind.")))
    assert judged.value == pytest.approx(score) and judged.logs["reply"] == reply


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("very good", "not with a number"),
        ("11", "answered 11"),
        ("-1", "answered -1"),
        ("Score: -3", "-3"),
        ("Score: \u22123", "-3"),
        ("4/5", "4/5"),
    ],
)
def test_a_language_model_that_says_something_else_is_an_error(reply, message):
    async def complete(text: str) -> str:
        return reply

    with pytest.raises(JudgeError, match=message):
        asyncio.run(LanguageJudge(complete)(Answer(ANT, "hello"), Criterion("kind", "Be kind.")))


def test_an_endpoint_judges_each_criterion(renderer, endpoint: Endpoint):  # noqa: F811
    endpoint.replies = ["Score: 4/5"]
    judge = ChatEndpoint(base_url=endpoint.url, model="m", retries=0, timeout=600.0)
    group = group_of(renderer, [rubric({"polite": "P?", "short": "S?"}, judge, highest=5.0)], ["a"])
    assert group.get_total_rewards() == pytest.approx([0.8]) and len(endpoint.requests) == 2
    assert "0.8 Score: 4/5" in group.trajectories_G[0].transitions[0].logs["rubric/polite"]
    endpoint.replies = ["6"]
    assert "criterion 'polite': the judge answered 6:" in errors(
        group_of(renderer, [rubric({"polite": "P?"}, judge, highest=5.0)], ["a"])
    )
    endpoint.shutdown()
    endpoint.server_close()
    assert "criterion 'polite': judge m at" in errors(group_of(renderer, [rubric({"polite": "P?"}, judge)], ["a"]))


def test_an_instruction_needs_its_places():
    with pytest.raises(ConfigError, match="has no {criterion}"):
        rubric({"a": "x"}, vowels, instruction="{answer}")
    with pytest.raises(ConfigError, match="other braces are doubled"):
        rubric({"a": "x"}, vowels, instruction="{answer} {criterion} {json}")


# --- as a run -------------------------------------------------------------------------------------


def test_settings_are_equal_from_run_to_run_and_hold_the_rubric():
    made = [config_to_json(SingleTurn([ANT], [finished, rubric({"a": "x"}, vowels)])) for _ in range(2)]
    assert made[0] == made[1] and "0x" not in json.dumps(made)
    other = config_to_json(SingleTurn([Problem("bee: ", "bee")], [finished, rubric({"a": "y"}, vowels)]))
    assert other["problems"] != made[0]["problems"] and other["rewards"] != made[0]["rewards"]


class Near(Grader):
    def __init__(self, tolerance: float):
        self.tolerance = tolerance


@dataclass(frozen=True)
class Timed(Problem):
    seconds: int = 1


def test_settings_tell_problems_apart_by_all_that_they_hold():
    """Trap: another grader, solution or subclass's field resumes the run of the first."""
    variants = [{}, {"gold": "ant."}, {"solution": "ant"}, {"tags": ("a",)}, {"grader": Near(1)}, {"grader": Near(2)}]
    problems = [Problem(**({"question": "ant: ", "gold": "ant"} | variant)) for variant in variants]
    problems += [Timed("ant: ", "ant"), Timed("ant: ", "ant", seconds=2)]
    texts = [repr(GivenProblems([problem])) for problem in problems]
    assert len(set(texts)) == len(problems)
    assert texts[4] == repr(GivenProblems([Problem("ant: ", "ant", Near(1))]))
    assert texts[0] == "1 problems, sha256 67f256d515f26245"  # as runs of earlier versions have it


def test_questions_from_a_file(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"q": "Who?", "a": "Ada"}\n')
    problems = QuestionFile(train_path=str(path), question_field="q", answer_field="a").splits()[0]
    assert [(problem.question, problem.gold) for problem in problems] == [("Who?", "Ada")]
    with pytest.raises(DataError, match="q.jsonl:1: no field 'question'; the fields are 'q', 'a'"):
        QuestionFile(train_path=str(path)).splits()


def test_a_rubric_from_the_command_line(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "Who?"}\n')
    (tmp_path / "r.json").write_text('{"a": "x"}')
    argv = ["env=rubric", "env.problems=envs.single_turn:QuestionFile", f"env.problems.train_path={tmp_path}/q.jsonl"]
    argv += [f"env.criteria={tmp_path}/r.json", "env.correct_weight=0.5", "env.rewards=tests.test_rewards:REWARDS"]
    judge = ["env.judge.base_url=http://127.0.0.1:1/v1", "env.judge.model=m"]
    env = parse(CLIConfig, argv + judge, {"env": ENVS}).env
    assert isinstance(env, RubricBuilder)
    assert [(reward.name, reward.weight) for reward in env.all_rewards()] == [
        ("rubric", 1.0),
        ("correct_answer", 0.5),
        ("length", 1.0),
    ]
    without = parse(CLIConfig, argv, {"env": ENVS}).env
    assert isinstance(without, RubricBuilder)
    with pytest.raises(ConfigError, match="the rubric has no judge"):
        without.all_rewards()


REWARDS = [length]


def test_reinforcement_learning_from_a_rubric(tmp_path):
    """The judge likes ASCII; the policy learns it from nothing."""

    def ascii_share(answer: Answer, criterion: Criterion) -> float:
        return float(np.mean([letter < "\x80" for letter in answer.text])) if answer.text else 0.0

    config = train.Config(
        env=SingleTurn(
            [ANT, Problem("bee: ", "bee")] * 8, [rubric({"ascii": "ASCII."}, ascii_share)], batch_size=16, group_size=4
        ),
        model_name="micro",
        renderer_name="plain",
        max_tokens=12,
        max_steps=6,
        learning_rate=1e-2,
        num_epochs=6,
        eval_every=0,
        save_every=0,
        log_path=str(tmp_path / "run"),
        backend=BackendConfig(engine="torch"),
    )
    asyncio.run(train.main(config))
    records = read_metrics(tmp_path / "run")
    rewards = [record["env/all/reward/rubric"] for record in records]
    assert rewards[0] < 0.6 and rewards[-1] > 0.8
    assert rewards == pytest.approx([record["env/all/reward/rubric/ascii"] for record in records])
