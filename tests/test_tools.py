"""Tools: schemas of functions, calls that are answered, refused or malformed, episodes of several
turns in each format, the calculator and the search.
"""

import asyncio
import json
import math
import pickle
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import chz
import numpy as np
import pytest

from envs.calculator import CALCULATOR, SumsBuilder, SumsExamplesBuilder
from envs.retrieval import Index, RetrievalBuilder, RetrievalExamplesBuilder, score, words
from envs.tool_games import ToolGameBuilder, ToolGameExamplesBuilder
from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.tokenizers import character_tokenizer
from posttrain.renderers import get_tool_calls
from posttrain.renderers.chat_template import ChatTemplateRenderer
from posttrain.renderers.plain import PlainRenderer
from posttrain.renderers.turns import decode, encode
from posttrain.renderers.types import Message, Part, ToolCallPart
from posttrain.tracking.command_line import parse
from posttrain.tracking.jsonl import write_jsonl
from rl.config import Config
from rl.data_processing import trajectory_rows
from rl.message_env import EnvFromMessageEnv, MessageStep
from rl.names import ENVS
from rl.rollouts import Policy, RolloutLimits, do_single_rollout
from rl.tool_env import ToolEnv, ToolLimits
from rl.tools import MalformedCall, Tool, ToolError, answer_call, check_arguments, tool, tools_by_name
from rl.types import MalformedStep, RolloutError, Trajectory
from supervised.names import DATASETS
from supervised.train import Config as SupervisedConfig
from tests.processes import PATIENCE
from tests.test_message_env import scripted
from tests.test_message_parts import HERMES_CALL, HERMES_SECOND, WITH_TOOLS

TOKENIZER = character_tokenizer(2048)

# --- schemas ------------------------------------------------------------------------------------


def plan(
    place: str,
    days: int,
    budget: float | None = None,
    kind: Literal["quick", "slow"] = "slow",
    stops: list[str] = [],  # noqa: B006 - never changed
    seats: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Plans a journey
    of some days.

    More for the reader of the code.

    Args:
        place: where to,
            in one word
        days (int): how long

    Returns:
        place: not a parameter
    """
    return {"place": place, "days": days, "stops": stops}


def test_a_function_becomes_a_schema():
    assert tool(plan).spec == {
        "name": "plan",
        "description": "Plans a journey of some days.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "where to, in one word"},
                "days": {"type": "integer", "description": "how long"},
                "budget": {"anyOf": [{"type": "number"}, {"type": "null"}]},
                "kind": {"enum": ["quick", "slow"]},
                "stops": {"type": "array", "items": {"type": "string"}},
                "seats": {"anyOf": [{"type": "object", "additionalProperties": {"type": "integer"}}, {"type": "null"}]},
            },
            "required": ["place", "days"],
        },
    }


def test_arguments_are_checked_against_the_schema():
    spec = tool(plan).spec
    good = {"place": "Rome", "days": 3}
    for extra in ({}, {"budget": None}, {"budget": 3}, {"kind": "quick"}, {"stops": ["a"]}, {"seats": {"a": 1}}):
        check_arguments(spec, good | extra)
    for wrong, error in (
        ({"place": "Rome"}, "plan needs 'days'"),
        (good | {"dys": 1}, "plan takes no 'dys'; it takes place, days"),
        (good | {"days": "3"}, "plan: days must be of type integer"),
        (good | {"days": True}, "plan: days must be of type integer"),
        (good | {"budget": "3"}, "plan: budget must be of type number or must be of type null"),
        (good | {"kind": "fast"}, 'plan: kind must be one of "quick", "slow"'),
        (good | {"stops": [1]}, "plan: stops holds something that must be of type string"),
        (good | {"seats": {"a": "b"}}, "holds something that must be of type integer"),
    ):
        with pytest.raises(MalformedCall) as raised:
            check_arguments(spec, wrong)
        assert error in str(raised.value)


def no_docstring(x: int) -> int:
    return x


def no_type(x) -> None:  # noqa: ANN001
    """Does."""


def odd_type(x: int, when: complex) -> None:
    """Does."""


def many(*texts: str) -> None:
    """Does."""


def keys(table: dict[int, str]) -> None:
    """Does."""


def unknown(x: "Nothing") -> None:  # type: ignore[name-defined]  # noqa: F821
    """Does."""


def described(x: int) -> None:
    """Does.

    Args:
        y: what
    """


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (no_docstring, "the tool 'no_docstring' has no docstring"),
        (no_type, "the tool 'no_type', parameter 'x' has no type"),
        (odd_type, "the tool 'odd_type', parameter 'when': complex has no JSON schema"),
        (many, r"the tool 'many', parameter 'texts': models call by keyword"),
        (keys, r"the tool 'keys', parameter 'table': dict has no JSON schema"),
        (unknown, "the tool 'unknown': name 'Nothing' is not defined"),
        (described, r"the tool 'described': its docstring describes \['y'\], which it does not take"),
    ],
)
def test_a_function_without_a_schema_is_an_error_that_names_it(function: Any, error: str):
    with pytest.raises(ConfigError, match=error):
        tool(function)
    with pytest.raises(ConfigError, match=error):
        ToolEnv([], [function], lambda _: 1.0)


def test_two_tools_of_one_name_are_an_error():
    with pytest.raises(ConfigError, match="two tools have one name: plan, plan"):
        tools_by_name([plan, tool(plan)])


# --- one call -----------------------------------------------------------------------------------


async def slow(seconds: float) -> str:
    """Waits."""
    await asyncio.sleep(seconds)
    return "done"


def fails(how: str) -> str:
    """Fails."""
    raise {"tool": ToolError("no"), "down": RolloutError("the server is down")}.get(how, KeyError(how))


def called(name: str, **arguments: Any) -> ToolCallPart:
    return {"type": "tool_call", "id": "call00001", "name": name, "arguments": arguments}


TOOLS = tools_by_name([plan, slow, fails, CALCULATOR])


def answer(name: str, timeout: float = PATIENCE, **arguments: Any) -> str:
    return asyncio.run(answer_call(called(name, **arguments), TOOLS, timeout))


def test_a_call_is_answered_in_text():
    assert answer("slow", seconds=0) == "done" and answer("calculator", expression="1/3") == "1/3"
    assert json.loads(answer("plan", place="é", days=1)) == {"place": "é", "days": 1, "stops": []}
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("plam", {}, "no tool is called 'plam'; did you mean plan?"),
        ("x", {}, "no tool is called 'x'; there are plan, slow, fails, calculator"),
        ("fails", {"how": "tool"}, "no"),
        ("fails", {"how": "k"}, "KeyError: 'k'"),
        ("calculator", {"expression": "1/0"}, "division by zero"),
    ]
    for name, arguments, error in refused:
        with pytest.raises(ToolError) as raised:
            answer(name, **arguments)
        assert str(raised.value) == error
    with pytest.raises(ToolError, match="slow took longer than 0.01 s"):
        answer("slow", timeout=0.01, seconds=60)
    # Trap: a tool that is down taken for an answer.
    with pytest.raises(RolloutError, match="the server is down"):
        answer("fails", how="down")
    no_more = RuntimeError("can't start new thread")
    with patch("threading.Thread.start", side_effect=no_more), pytest.raises(RolloutError, match="concurrent_rollouts"):
        answer("plan", place="é", days=1)


# --- an episode by hand -------------------------------------------------------------------------


def said(*parts: Part) -> Message:
    return {"role": "assistant", "content": "", "parts": [*parts]}


def step(env: ToolEnv, *parts: Part) -> MessageStep:
    return asyncio.run(env.step(said(*parts)))


UNREADABLE: Part = {"type": "unparsed_tool_call", "id": "call00001", "name": "", "text": "{", "error": "not JSON: x"}


def an_env(**limits: Any) -> ToolEnv:
    return ToolEnv([], list(TOOLS.values()), lambda text: float(text == "84"), ToolLimits(**limits))


def test_an_episode_by_hand():
    env = an_env()
    first = step(env, called("calculator", expression="12*7"), {**called("fails", how="tool"), "id": "call00002"})
    assert first.next_messages == [
        Message(role="tool", content="84", name="calculator", tool_call_id="call00001"),
        Message(role="tool", content="error: no", name="fails", tool_call_id="call00002"),
    ]
    assert first.metrics == {"well_formed": 1.0, "tool_error": 0.5} and not first.episode_done and first.reward == 0
    assert first.logs == {"call 1": "calculator(expression='12*7') = 84", "call 2": "fails(how='tool') = error: no"}
    second = step(env, UNREADABLE, called("nobody"), called("plan"), called("calculator", expression="1"))
    assert [message["content"] for message in second.next_messages] == [
        "error: this call cannot be read, not JSON: x",
        "error: no tool is called 'nobody'; there are plan, slow, fails, calculator",
        "error: plan needs 'place'",
        "1",
    ]
    assert second.metrics == {"well_formed": 0.25, "tool_error": 0.0} and second.reward == 0
    last = step(env, {"type": "text", "text": "84"})
    assert last.episode_done and last.reward == 1
    assert last.metrics == {
        "calls": 6,
        "malformed_calls": 3,
        "tool_errors": 1,
        "refused_calls": 0,
        "call_turns": 2,
        "answered": 1,
        "correct": 1,
    }


def test_limits_on_calls_and_turns():
    env = an_env(max_calls=2, max_turns=2)
    one = called("calculator", expression="1")
    texts = [message["content"] for message in step(env, one, one, one).next_messages]
    assert texts == ["1", "1", "error: there are no more than 2 calls. Answer now."]
    refused = step(env, one)
    assert "no more than 2 calls" in refused.next_messages[0]["content"] and "well_formed" not in refused.metrics
    ended = step(env, one)  # a third turn of calls
    assert ended.episode_done and ended.reward == 0 and ended.metrics["answered"] == ended.metrics["correct"] == 0
    assert ended.metrics["refused_calls"] == 3 and ended.metrics["calls"] == 2


def test_async_calls_run_together_and_others_in_order():
    order: list[int] = []

    def note(number: int, wait: float) -> str:
        """Notes."""
        time.sleep(wait)
        order.append(number)
        return str(number)

    started: list[int] = []
    both = asyncio.Barrier(2)

    async def meet(number: int) -> str:
        """Returns only if two calls run at once."""
        started.append(number)
        await both.wait()
        return str(number)

    async def episode() -> list[MessageStep]:
        env = ToolEnv([], [note, meet], lambda _: 0.0)
        notes = [called("note", number=1, wait=0.05), called("note", number=2, wait=0)]
        return [await env.step(said(*notes)), await env.step(said(called("meet", number=1), called("meet", number=2)))]

    steps = asyncio.run(episode())
    assert order == [1, 2]
    assert [[m["content"] for m in one.next_messages] for one in steps] == [["1", "2"], ["1", "2"]]


def test_scores_may_be_async_and_have_metrics():
    async def score(text: str) -> tuple[float, dict[str, float]]:
        return 0.5, {"letters": float(len(text))}

    last = step(ToolEnv([], [plan], score), {"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "abc"})
    assert last.reward == 0.5 and last.metrics["letters"] == 3 and last.metrics["correct"] == 0


# --- episodes in tokens -------------------------------------------------------------------------

CALL = '{"expression": "1+2"}'
EPISODES = {
    "qwen3, no thought": [f"{HERMES_CALL}<|im_end|>", "3<|im_end|>"],
    "qwen2_5": [f"{HERMES_CALL}\n{HERMES_SECOND}<|im_end|>", "3<|im_end|>"],
    "qwen3": [f"<think>\nA sum.\n</think>\n\n{HERMES_CALL}<|im_end|>", "<think>\nSo.\n</think>\n\n3<|im_end|>"],
    "llama3_1": [f'{{"name": "calculator", "parameters": {CALL}}}<|eot_id|>', "3<|eot_id|>"],
    "gptoss": [
        "<|channel|>analysis<|message|>A sum.<|end|><|start|>assistant<|channel|>commentary to=functions.calculator "
        f"<|constrain|>json<|message|>{CALL}<|call|>",
        "<|channel|>final<|message|>3<|return|>",
    ],
    "mistral": [f'[TOOL_CALLS][{{"name": "calculator", "arguments": {CALL}}}]</s>', "3</s>"],
    "chatml": [f"{HERMES_CALL}<|im_end|>", "3<|im_end|>"],
}


def test_a_score_that_is_no_number_is_named():
    with pytest.raises(MalformedStep, match="the function `score` of ToolEnv: the reward is None, not a number"):
        step(ToolEnv([], [plan], lambda text: None), {"type": "text", "text": "abc"})  # type: ignore[arg-type]


def roll_out(name: str, written: list[str], score: Any = None) -> Trajectory:
    renderer = WITH_TOOLS[name.split(",")[0]]
    env = ToolEnv([Message(role="user", content="1+2?")], [CALCULATOR], score or (lambda text: float(text == "3")))
    policy = Policy(scripted([encode(renderer.tokenizer, text) for text in written]), max_tokens=500)
    return asyncio.run(do_single_rollout(policy, EnvFromMessageEnv(renderer, env), (0,), RolloutLimits()))


# Trap: a tool's answer that makes the template rewrite what was sampled, so that every turn becomes
# a sequence of its own, or is trained on with other tokens.
@pytest.mark.parametrize("name", EPISODES)
def test_an_episode_with_calls_is_one_sequence(name: str):
    # written as the template would not, too: spaces, line breaks, the order of a header
    for spaced in (False, True):
        written = [text.replace('": ', '" : ') if spaced else text for text in EPISODES[name]]
        trajectory = roll_out(name, written)
        assert trajectory.reward == 1 and trajectory.transitions[-1].metrics["malformed_calls"] == 0
        assert len(trajectory_rows(trajectory)) == 1
        first, second = trajectory.transitions
        whole = decode(WITH_TOOLS[name.split(",")[0]].tokenizer, second.ob.to_ints() + second.ac.tokens)
        assert written[0] in whole and whole.endswith(written[1]) and whole.count(written[0]) == 1
    renderer = WITH_TOOLS[name.split(",")[0]]  # what follows the sampled tokens is what the template writes
    message, _ = renderer.parse_response(first.ac.tokens)
    answers = [
        Message(role="tool", content="3" if i == 0 else "7", name="calculator", tool_call_id=call["id"])
        for i, call in enumerate(get_tool_calls(message))
    ]
    again = renderer.build_generation_prompt([Message(role="user", content="1+2?"), message, *answers]).to_ints()
    spoken = len(first.ob.to_ints() + first.ac.tokens)
    assert again[-(len(second.ob.to_ints()) - spoken) :] == second.ob.to_ints()[spoken:]


@pytest.mark.parametrize("name", EPISODES)
def test_a_malformed_call_is_told_to_the_model_and_counted(name: str):
    broken = EPISODES[name][0].replace('"1+2"}', '"1+2"')
    trajectory = roll_out(name, [broken, EPISODES[name][1]])
    heard = decode(WITH_TOOLS[name.split(",")[0]].tokenizer, trajectory.transitions[1].ob.to_ints())
    assert "error: this call cannot be read" in heard and "not JSON" in heard
    assert trajectory.transitions[0].metrics["well_formed"] < 1 and trajectory.transitions[0].reward == 0
    assert trajectory.transitions[-1].metrics["malformed_calls"] == 1
    assert len(trajectory_rows(trajectory)) == 1


def test_templates_that_drop_an_empty_thought_render_each_turn_anew():
    """Qwen3 without thinking: the prompt has an empty thought that the next prompt lacks."""
    qwen3 = ChatTemplateRenderer(WITH_TOOLS["qwen3"].tokenizer, {"enable_thinking": False}, [CALCULATOR.spec])
    env = EnvFromMessageEnv(qwen3, ToolEnv([Message(role="user", content="1+2?")], [CALCULATOR], lambda _: 1.0))
    answers = [encode(qwen3.tokenizer, f"{HERMES_CALL}<|im_end|>"), encode(qwen3.tokenizer, "3<|im_end|>")]
    trajectory = asyncio.run(do_single_rollout(Policy(scripted(answers), max_tokens=99), env, (0,), RolloutLimits()))
    assert trajectory.reward == 1 and len(trajectory_rows(trajectory)) == 2


# --- environments by name -----------------------------------------------------------------------

RENDERER = ChatTemplateRenderer(TOKENIZER)
GAMES: list[tuple[ToolGameBuilder, ToolGameExamplesBuilder]] = [
    (SumsBuilder(num_tasks=150, num_test=20), SumsExamplesBuilder(num_tasks=150, num_test=20)),
    (RetrievalBuilder(num_people=40, num_test=20), RetrievalExamplesBuilder(num_people=40, num_test=20)),
]


@pytest.mark.parametrize(("game", "examples"), GAMES, ids=["calculator", "retrieval"])
@pytest.mark.parametrize("use_tools", [True, False])
def test_demonstrations_are_won_episodes(
    game: ToolGameBuilder, examples: ToolGameExamplesBuilder, use_tools: bool
) -> None:
    game, examples = chz.replace(game, use_tools=use_tools), chz.replace(examples, use_tools=use_tools)
    env_of, rng = game.open_env(), np.random.default_rng(0)  # type: ignore[attr-defined]

    async def play(task: Any) -> None:
        env, messages = env_of(task), examples.demonstration(task, rng)
        assert messages[:1] == await env.initial_messages()
        steps = [(message, await env.step(message)) for message in messages if message["role"] == "assistant"]
        heard = [reply["content"] for _, step in steps for reply in step.next_messages]
        assert heard == [message["content"] for message in messages if message["role"] == "tool"]
        assert steps[-1][1].reward == 1 and steps[-1][1].metrics["calls"] == len(heard) and bool(heard) == use_tools

    for task in game.tasks()[::9]:
        asyncio.run(play(task))
    train, test = asyncio.run(game(RENDERER))
    group = pickle.loads(pickle.dumps(train.get_batch(0)[0]))
    first = decode(TOKENIZER, asyncio.run(asyncio.run(group.make_envs())[0].initial_observation())[0].to_ints())
    assert ("To call: <tool_call>" in first) == use_tools and test is not None
    unlisted, _ = asyncio.run(chz.replace(game, list_tools=False)(RENDERER))
    short = asyncio.run(asyncio.run(unlisted.get_batch(0)[0].make_envs())[0].initial_observation())[0]
    assert "To call" not in decode(TOKENIZER, short.to_ints())


def test_questions_of_a_file_that_occur_twice_and_answers_of_an_article(tmp_path: Path):
    rows = [{"question": f"Which letter is number {n % 6}?", "answer": "A"} for n in range(12)]
    write_jsonl(tmp_path / "questions.jsonl", rows)
    write_jsonl(tmp_path / "corpus.jsonl", [{"text": "A is the first letter."}])
    paths: dict[str, Any] = {"corpus": str(tmp_path / "corpus.jsonl"), "questions": str(tmp_path / "questions.jsonl")}
    train, test = RetrievalBuilder(**paths, num_test=3).split()
    assert train and not {task.question for task in train} & {task.question for task in test}
    # nothing is left of "A" without its article: an empty answer is not equal to it
    assert [score(said, ("A",)) for said in ("", " ", "a", "A", "the")] == [0, 0, 1, 1, 0]
    assert score("the Rhine.", ("Rhine",)) == 1


def test_environments_and_examples_by_name():
    for name in ("calculator", "retrieval"):
        config = parse(Config, [f"env={name}", "env.limits.max_calls=3", "renderer_name=chat_template"], {"env": ENVS})
        assert isinstance(config.env, ToolGameBuilder) and config.env.limits.max_calls == 3
        with pytest.raises(ConfigError, match="PlainRenderer cannot write tools: use renderer_name=chat_template"):
            asyncio.run(config.env(PlainRenderer(TOKENIZER)))
        data = parse(SupervisedConfig, [f"dataset={name}", "dataset.batch_size=2"], {"dataset": DATASETS})
        weighted = data.dataset(RENDERER)[0].get_batch(0)[0]
        weights = weighted.loss_fn_inputs["weights"].array
        targets = weighted.loss_fn_inputs["target_tokens"].array
        trained = decode(TOKENIZER, targets[weights > 0].tolist())
        assert (
            trained.startswith("<tool_call>\n{") and trained.endswith("<|im_end|>") and "tool_response" not in trained
        )


def bm25(passages: list[str], query: str, k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Robertson and Zaragoza 2009, equation 3.15, with Lucene's idf, written out."""
    bags = [Counter(words(passage)) for passage in passages]
    mean = sum(bag.total() for bag in bags) / len(bags)
    scores = []
    for bag in bags:
        score = 0.0
        for word in words(query):
            having = sum(word in other for other in bags)
            idf = math.log(1 + (len(bags) - having + 0.5) / (having + 0.5))
            score += idf * bag[word] / (bag[word] + k1 * (1 - b + b * bag.total() / mean))
        scores.append(score)
    return scores


def test_search_against_bm25_written_out():
    passages = ["Ada lives in Tolm.", "Bea lives in Quor, near Tolm, by the sea.", "Tolm: Tolm!", "Nothing here."]
    index = Index(passages, most=3)
    for query in ("Tolm", "tolm lives", "sea Ada", "where is Tolm's sea"):
        scores = bm25(passages, query)
        order = sorted((i for i, score in enumerate(scores) if score > 0), key=lambda i: -scores[i])
        assert index.find(query) == [passages[i] for i in order[:3]]
    assert index.search("zzz") == index.search("") == "nothing was found"
    assert index.search("Ada") == "Ada lives in Tolm."


def test_a_corpus_of_files(tmp_path: Path):
    corpus, questions = tmp_path / "corpus.jsonl", tmp_path / "questions.jsonl"
    corpus.write_text('{"title": "Tolm", "text": "A town by the sea."}\n{"text": "Quor is a hill."}\n')
    questions.write_text(
        '{"question": "What is Quor?", "answer": ["a hill", "hill"]}\n{"question": "Tolm?", "answer": "town"}\n'
    )
    game = RetrievalBuilder(corpus=str(corpus), questions=str(questions), num_test=1)
    assert game.index().find("tolm") == ["Tolm: A town by the sea."]
    env = game.open_env()(game.tasks()[0])
    assert step(env, {"type": "text", "text": "The Hill."}).reward == 1
    assert step(env, {"type": "text", "text": "a town"}).reward == 0
    questions.write_text('{"question": "What is Quor?", "answer": 3}\n')
    with pytest.raises(DataError, match=r"questions.jsonl:1: the field 'answer' must be a text or a list of texts"):
        chz.replace(game, corpus_seed=1).tasks()
    with pytest.raises(ConfigError, match="two files that belong together"):
        RetrievalBuilder(corpus=str(corpus))
    assert isinstance(game.tools()[0], Tool)
