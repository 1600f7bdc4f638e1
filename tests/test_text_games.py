"""The games written in messages: splits, episodes played by hand, answerers, the calculator, and a
person at the terminal.
"""

import asyncio
import pickle
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import chz
import numpy as np
import pytest

from envs.guess_number import GuessNumberBuilder, GuessNumberEnv, GuessNumberExamplesBuilder
from envs.text_games import TextGameBuilder, TextGameExamplesBuilder
from envs.tool_use import (
    CalculatorBuilder,
    CalculatorEnv,
    CalculatorError,
    CalculatorExamplesBuilder,
    calculate,
    read_number,
)
from envs.twenty_questions import (
    QUESTIONS,
    THINGS,
    PolicyAnswerer,
    TwentyQuestionsBuilder,
    TwentyQuestionsEnv,
    TwentyQuestionsExamplesBuilder,
    answer_from_table,
)
from posttrain.backend.errors import ConfigError
from posttrain.backend.tokenizers import character_tokenizer
from posttrain.backend.types import Datum
from posttrain.renderers.plain import PlainRenderer
from posttrain.renderers.turns import decode
from posttrain.renderers.types import Message
from posttrain.tracking.command_line import parse
from posttrain.tracking.metrics_log import read_metrics
from rl import play
from rl.frozen_policy import FrozenPolicy, FrozenPolicyError, MessageCompleter
from rl.message_env import EnvFromMessageEnv, MessageEnv, MessageStep, ParseError
from rl.rollouts import Policy, RolloutLimits, do_group_rollout
from rl.types import Env, EnvGroupBuilder, RLDataset, StepResult
from supervised.types import SupervisedDataset
from tests import commands
from tests.conftest import ROOT
from tests.test_message_env import say, scripted

TOKENIZER = character_tokenizer(1024)
RENDERER = PlainRenderer(TOKENIZER)


def play_by_hand(env: MessageEnv, *said: str) -> list[MessageStep]:
    async def steps() -> list[MessageStep]:
        await env.initial_messages()
        return [await env.step(Message(role="assistant", content=text)) for text in said]

    return asyncio.run(steps())


def heard(steps: Sequence[MessageStep]) -> list[str]:
    return [message["content"] for step in steps for message in step.next_messages]


# --- what the games share -----------------------------------------------------------------------


GAMES: list[tuple[TextGameBuilder, TextGameExamplesBuilder]] = [
    (GuessNumberBuilder(), GuessNumberExamplesBuilder()),
    (TwentyQuestionsBuilder(), TwentyQuestionsExamplesBuilder()),
    (CalculatorBuilder(num_tasks=200), CalculatorExamplesBuilder(num_tasks=200)),
]
ids = ["guess_number", "twenty_questions", "tool_use"]


def build(builder: TextGameBuilder) -> tuple[RLDataset, RLDataset]:
    train, test = asyncio.run(builder(RENDERER))
    assert test is not None
    return train, test


def tasks_of(dataset: RLDataset, indices: Sequence[int]) -> list:
    return [group.env_thunk.args[0] for i in indices for group in dataset.get_batch(i)]  # type: ignore[attr-defined]


def texts_of(dataset: SupervisedDataset, index: int) -> list[str]:
    def whole(datum: Datum) -> list[int]:
        return datum.model_input.to_ints() + datum.loss_fn_inputs["target_tokens"].array[-1:].tolist()

    return [decode(TOKENIZER, whole(datum)) for datum in dataset.get_batch(index)]


# Trap: held-out games met by the warm start or by RL.
@pytest.mark.parametrize(("game", "examples"), GAMES, ids=ids)
def test_held_out_tasks_are_met_by_neither_loop(game: TextGameBuilder, examples: TextGameExamplesBuilder):
    train, test = build(chz.replace(game, batch_size=16))
    held_out = tasks_of(test, range(len(test)))
    assert len(held_out) == len(set(held_out)) == game.num_test and held_out == examples.split()[1]
    assert not set(tasks_of(train, range(100))) & set(held_out)
    assert set(game.split()[0]) | set(held_out) == set(game.tasks())
    assert examples.split() == game.split() and chz.replace(game, seed=5).split() == game.split()
    assert chz.replace(game, split_seed=5).split()[1] != held_out
    with pytest.raises(ConfigError, match="num_test=100000 must be between"):
        chz.replace(game, num_test=100_000).split()


@pytest.mark.parametrize(("game", "examples"), GAMES, ids=ids)
def test_batches_depend_on_seed_and_index_alone(game: TextGameBuilder, examples: TextGameExamplesBuilder):
    game, examples = chz.replace(game, batch_size=5, group_size=3), chz.replace(examples, batch_size=6)
    train, _ = build(game)
    assert tasks_of(train, [7]) == tasks_of(build(game)[0], [7]) != tasks_of(train, [8])
    assert tasks_of(train, [7]) != tasks_of(build(chz.replace(game, seed=1))[0], [7])
    group: EnvGroupBuilder = pickle.loads(pickle.dumps(train.get_batch(0)[0]))
    assert len(asyncio.run(group.make_envs())) == 3 and group.logging_tags() == [game.tag]
    data, held_out = examples(RENDERER)
    assert held_out is not None and texts_of(data, 3) == texts_of(examples(RENDERER)[0], 3) != texts_of(data, 4)
    first = texts_of(data, 0)
    data.set_epoch(1)
    assert texts_of(data, 0) != first and texts_of(held_out, 0) == texts_of(held_out, 0)


@pytest.mark.parametrize(("game", "examples"), GAMES, ids=ids)
def test_demonstrations_are_won_episodes_of_the_environment(game: TextGameBuilder, examples: TextGameExamplesBuilder):
    env_of, rng = game.open_env(), np.random.default_rng(0)
    for task in game.tasks()[::7]:
        messages = examples.demonstration(task, rng)
        env = env_of(task)
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        if isinstance(env, GuessNumberEnv):
            # play without strategy may take longer than the game allows
            env.max_guesses = len(said)
        steps = play_by_hand(env, *said)
        assert asyncio.run(env_of(task).initial_messages()) == messages[:1]
        assert heard(steps) == [message["content"] for message in messages[1:] if message["role"] == "user"]
        assert steps[-1].reward > 0 and steps[-1].episode_done and not any(step.episode_done for step in steps[:-1])


# --- guess a number -----------------------------------------------------------------------------


def guessing(number: int = 27, max_guesses: int = 4) -> GuessNumberEnv:
    game = GuessNumberBuilder(guess_cost=0.1, max_guesses=max_guesses)
    return game.make_env((20, 51, number))


def test_guessing_by_hand():
    env = guessing()
    assert asyncio.run(env.initial_messages())[0]["content"] == "Guess my number from 20 to 51."
    steps = play_by_hand(env, "35", "27 ")
    assert heard(steps) == ["lower"] and [step.reward for step in steps] == [0, 0.9]
    assert steps[-1].metrics == {"consistent": 1, "solved": 1, "turns": 2} and "solved" not in steps[0].metrics
    lost = play_by_hand(guessing(max_guesses=3), "21", "20", "60")
    assert (
        heard(lost) == ["higher", "higher"]
        and [step.reward for step in lost] == [0, -0.2, -0.2]
        and lost[-1].episode_done
    )
    assert [step.metrics["consistent"] for step in lost] == [1, 0, 0]
    assert lost[-1].metrics["solved"] == 0 and lost[-1].metrics["turns"] == 3
    with pytest.raises(ParseError, match="one whole number"):
        play_by_hand(guessing(), "27 or 28")
    with pytest.raises(ConfigError, match="max_span <= 20 is needed"):
        chz.replace(GuessNumberBuilder(), max_span=21).tasks()


def test_halving_wins_every_game():
    for number in range(20, 52):
        env = guessing(number, max_guesses=6)
        for _ in range(6):
            step = play_by_hand(env, str(sum(env.possible) // 2))[-1]
            if step.episode_done:
                break
        assert step.metrics["solved"] == 1


# --- twenty questions ---------------------------------------------------------------------------


def asking(thing: str, answerer: PolicyAnswerer | None = None, max_questions: int = 20) -> TwentyQuestionsEnv:
    return TwentyQuestionsEnv(thing, max_questions, 0.02, answerer)


def test_the_table_tells_all_things_apart_and_is_spelt_right():
    assert len({frozenset(words.split()) for words in THINGS.values()}) == len(THINGS)
    assert {word for words in THINGS.values() for word in words.split()} == set(QUESTIONS)
    for word, question in QUESTIONS.items():
        assert answer_from_table("dog", question) == ("yes" if word in THINGS["dog"].split() else "no"), question


def test_questions_by_hand():
    steps = play_by_hand(
        asking("frog"),
        "Is it alive?",
        "Can it fly?",
        "Is it blue?",
        "A cat or a frog, not a dog?",
        "Is it a duck?",
        "a FROG",
    )
    # "cat" is no thing of the table, "dog" is
    assert heard(steps) == ["yes", "no", "unclear", "unclear", "no"]
    assert [step.metrics["unclear"] for step in steps] == [0, 0, 1, 1, 0, 0]
    assert (
        steps[-1].reward == pytest.approx(0.9) and steps[-1].metrics["solved"] == 1 and steps[-1].metrics["turns"] == 6
    )
    lost = play_by_hand(asking("frog", max_questions=1), "Is it wild?")
    assert lost[0].reward == 0 and lost[0].episode_done and lost[0].metrics["solved"] == 0
    assert answer_from_table("frog", "Is it not alive?") == answer_from_table("frog", "alive? wild?") == "unclear"
    with pytest.raises(ParseError):
        play_by_hand(asking("frog"), "42?")


def second_policy(*replies: str) -> PolicyAnswerer:
    return PolicyAnswerer(MessageCompleter(scripted([say(reply) for reply in replies]), RENDERER, 20))


def test_a_second_policy_answers_what_is_no_guess():
    steps = play_by_hand(
        asking("frog", second_policy("Yes.", "no, it is not")),
        "Is it green?",
        "Has it fur?",
        "Is it a duck?",
        "Is it a frog?",
    )
    assert heard(steps) == ["yes", "no", "no"] and steps[-1].metrics["solved"] == 1


# Trap: an answerer's nonsense turned into a reward.
def test_a_rollout_whose_answerer_talks_nonsense_has_no_reward():
    class Group(EnvGroupBuilder):
        async def make_envs(self) -> Sequence[Env]:
            return [
                EnvFromMessageEnv(RENDERER, asking("frog", answerer)) for answerer in (second_policy("maybe"), None)
            ]

    policy = Policy(scripted([say("Is it green?"), say("Is it a frog?"), say("Is it green?")]), max_tokens=30)
    group = asyncio.run(do_group_rollout(Group(), policy, (0,), RolloutLimits(max_retries=0)))
    assert group.get_total_rewards() == [1.0]
    assert [type(error) for error in group.errors] == [FrozenPolicyError] and "neither yes nor no" in str(
        group.errors[0]
    )


def test_the_answerer_is_chosen_on_the_command_line():
    arguments = ["env=envs.twenty_questions:TwentyQuestionsBuilder", "env.answerer=rl.frozen_policy:FrozenPolicy"]
    config = parse(
        play.Config, [*arguments, "env.answerer.base_model=tiny", "env.answerer.max_tokens=3", "env.parse.retries=2"]
    )
    assert isinstance(config.env, TwentyQuestionsBuilder) and config.env.parse.retries == 2
    assert config.env.answerer == FrozenPolicy(base_model="tiny", max_tokens=3)


# --- the calculator -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*(3+4)", 84),
        ("-7//2", -4),
        ("7%4-1", 2),
        ("1/3+1/6", Fraction(1, 2)),
        ("0.1+0.2", Fraction(3, 10)),
        ("2**10", 1024),
        ("2**-1", Fraction(1, 2)),
    ],
)
def test_the_calculator_is_exact(expression: str, value: int | Fraction):
    assert calculate(expression) == value and read_number(str(calculate(expression))) == value


@pytest.mark.parametrize(
    "expression",
    [
        *("", "1+", "x", "__import__('os')", "(1).real", "True", "1<2", "[1]", "1;2"),
        *("1/0", "0**-1", "2**0.5", "9**9**9", "9**99999999", "1e999", "(" * 150, "1+" * 150),
    ],
)
def test_the_calculator_refuses_the_rest(expression: str):
    with pytest.raises(CalculatorError):
        calculate(expression)


def calculator(max_calls: int = 2) -> CalculatorEnv:
    return CalculatorEnv("12*(3+4)", "{expression}=?", max_calls)


def test_tool_use_by_hand():
    steps = play_by_hand(calculator(), "First the sum.\ncalc: 3+4", "calc: 7/0", "So\nanswer: 84.0")
    assert heard(steps) == ["7", "error: division by zero"] and [step.reward for step in steps] == [0, 0, 1]
    assert [step.metrics.get("tool_error") for step in steps] == [0, 1, None]
    assert steps[-1].metrics == {"correct": 1, "tool_calls": 2}
    assert (
        play_by_hand(calculator(), "answer: 85")[0].reward == 0
        and play_by_hand(calculator(), "answer: lots")[0].reward == 0
    )
    too_many = play_by_hand(calculator(), "calc: 1", "calc: 1", "calc: 12*(3+4)")
    assert too_many[-1].episode_done and too_many[-1].reward == 0 and too_many[-1].metrics["correct"] == 0
    for unreadable in ("84", "calc: 1\nanswer: 84", "calc:"):
        with pytest.raises(ParseError, match="Write one line"):
            play_by_hand(calculator(), unreadable)


# --- a person plays -----------------------------------------------------------------------------


def run(*command: str, typed: str = "", cwd: Path) -> str:
    done = commands.run(*command, cwd=cwd, env={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, typed=typed)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Trap: a person who gets other limits than the model.
def test_a_person_plays_under_the_models_limits(tmp_path: Path):
    game = GuessNumberBuilder()
    first, second, third = (task[2] for task in tasks_of(build(game)[0], [0])[:3])
    wrong = first - 1 if first > 10 else first + 1
    typed = f"{wrong}\n{first}\n{second + 1}\n{second + 1}\n{third}00\n"
    options = [
        "env=envs.guess_number:GuessNumberBuilder",
        "env.impossible_cost=0",
        "renderer_name=plain",
        "limits.max_turns=2",
    ]
    output = run("-m", "rl.play", *options, "max_tokens=4", typed=typed, cwd=tmp_path)
    episodes = output.split("total reward ")
    assert (
        "Guess my number from" in episodes[0]
        and "answer in at most 4" in episodes[0]
        and episodes[0].count("Guess") == 1
    )
    assert ("higher" if wrong < first else "lower") in episodes[0]
    assert episodes[1].startswith("0.95\n") and "solved 1, turns 2" in episodes[0] and f"number: {first}" in episodes[0]
    assert "end of the episode (cut short: max_turns)" in episodes[1] and episodes[2].startswith("0\n")
    assert "(cut off: 5 tokens, the stop included)" in episodes[2] and "parse_error 1, truncated 1" in episodes[2]
    assert output.endswith("3 episodes played, mean reward -0.0166667\n") and "Traceback" not in output


class Seat(Env):
    """Two seats say one word each, and may do so in turn only."""

    def __init__(self, seat: int, said: list[str], changed: asyncio.Condition):
        self.seat, self.said, self.changed = seat, said, changed

    async def initial_observation(self):
        async with self.changed:
            await self.changed.wait_for(lambda: len(self.said) == self.seat)
        return RENDERER.build_generation_prompt([Message(role="user", content="so far: " + " ".join(self.said))]), [
            "]\n"
        ]

    async def step(self, action: list[int]) -> StepResult:
        async with self.changed:
            self.said.append(decode(TOKENIZER, action))
            self.changed.notify_all()
        return StepResult(float(self.seat), True, RENDERER.build_generation_prompt([]))


class Pair(EnvGroupBuilder):
    members_are_independent = False

    def __init__(self):
        self.said: list[str] = []

    async def make_envs(self) -> Sequence[Env]:
        changed = asyncio.Condition()
        return [Seat(seat, self.said, changed) for seat in range(2)]


def test_the_seats_of_a_game_are_played_in_turn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    typed = iter(["[one]", "[two\\", "three"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    pair = Pair()
    assert asyncio.run(play.play_group(pair, TOKENIZER, 20, RolloutLimits())) == [0, 1]
    assert pair.said == ["[one]\n", "[two\nthree]\n"]  # the stop is completed, not doubled
    shown = capsys.readouterr().out
    assert shown.index("--- seat 0: ") < shown.index("--- seat 1: ") < shown.index("so far: [one]")


# --- the recipe ---------------------------------------------------------------------------------


def test_the_recipe_warm_starts_and_trains_over_several_turns(tmp_path: Path):
    sizes = ["env.batch_size=2", "env.group_size=3", "env.n_batches=2", "env.num_test=10", "warm_start_nll=3"]
    run(str(ROOT / "recipes/guess_number/train.py"), *sizes, "eval_every=2", f"log_path={tmp_path}/run", cwd=tmp_path)
    first, second, last = read_metrics(tmp_path / "run")
    assert max(first["optim/logprob_gap_mean"], second["optim/logprob_gap_mean"]) < 1e-4
    assert {"test/env/all/solved", "test/env/all/turns"} <= first.keys() & last.keys()
    assert "env/all/parse_error" in second


@chz.chz
class CarelessGame(TextGameBuilder):
    listed: object = chz.field(default_factory=lambda: {"ant", "bee"})

    def tasks(self):
        return self.listed

    def open_env(self):
        return "an environment"


def test_tasks_without_an_order_and_an_env_that_is_no_function_are_refused():
    renderer = PlainRenderer(character_tokenizer(512))
    with pytest.raises(ConfigError, match="CarelessGame.tasks returned {.*}, not a list"):
        asyncio.run(CarelessGame(num_test=1)(renderer))
    with pytest.raises(
        ConfigError, match="CarelessGame.open_env returned 'an environment', not a function from a task"
    ):
        asyncio.run(CarelessGame(num_test=1, listed=["ant", "bee"])(renderer))
