"""Answers judged in pairs, answers scored by a model, win rates, and judges that fail: nothing is
scored silently.
"""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import chz
import numpy as np
import pytest

from envs.completion_env import GoldReward
from envs.kind_words import KindWordsPrompts, prompt
from envs.pairwise import PairwiseBuilder, PairwisePreferenceGroupBuilder, matchups
from envs.reward_model_env import RewardModelGroupBuilder
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.renderers import get_renderer
from posttrain.renderers.types import Message, Renderer, Tokenizer
from posttrain.tracking.metrics_log import read_metrics
from preference.bradley_terry import ScalarModel
from preference.judges import EndpointJudge, EndpointJudgeBuilder, RuleJudge
from preference.reward_types import Judge, JudgeBuilder, JudgeError, RewardModel, judge_all
from preference.types import Comparison
from preference.win_rate import WinRateEvaluator, win_rate
from rl import train
from rl.rollouts import Policy, do_group_rollout
from rl.types import EnvGroupBuilder, TokensWithLogprobs, TrajectoryGroup
from tests.conftest import rounded

SHORTER = RuleJudge(lambda comparison, answer: -float(len(answer)))


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return get_renderer("plain", load_tokenizer("tiny"))


@dataclass(frozen=True)
class Scripted(Policy):
    """Says the g-th answer as member g; without an end if the answer has a "|"."""

    answers_G: Sequence[str] = ()

    async def __call__(self, ob, stop, seed, max_tokens=None) -> TokensWithLogprobs:
        answer = self.answers_G[seed[1]]
        tokens = load_tokenizer("tiny").encode(answer.replace("|", "")) + ([] if "|" in answer else [1])
        return TokensWithLogprobs(tokens, [0.0] * len(tokens), "length" if "|" in answer else "stop")


def rolled_out(builder: EnvGroupBuilder, answers_G: Sequence[str]) -> TrajectoryGroup:
    policy = Scripted(client=None, max_tokens=64, answers_G=answers_G)  # type: ignore[arg-type]
    return asyncio.run(do_group_rollout(builder, policy, (0,)))


# --- groups -------------------------------------------------------------------------------------


def test_matchups_leave_nobody_alone():
    assert matchups(3, "all_pairs_one_way", 4) == [(0, 1), (0, 2), (1, 2)]
    assert matchups(2, "all_pairs_both_ways", 4) == [(0, 1), (1, 0)]
    for size in range(2, 20):
        pairs = matchups(size, "all_pairs_both_ways", 4)
        assert {member for pair in pairs for member in pair} == set(range(size)) and len(set(pairs)) == len(pairs)
        assert all((b, a) in pairs for a, b in pairs)
    assert len(matchups(8, "all_pairs_both_ways", 4)) == 2 * 12  # two chunks of four, instead of 56


def test_win_minus_loss_and_format_by_hand(renderer):
    builder = PairwisePreferenceGroupBuilder(
        prompt("Ada"), renderer, SHORTER, num_envs=4, gold=lambda _, answer: float(len(answer))
    )
    group = rolled_out(builder, [" a", " bbb", " cc|", " dd"])
    assert [m["win_minus_loss"] for m in group.metrics_G] == pytest.approx([1, -1, 0, 0])
    # format_coef 1: cut off by max_tokens
    assert group.get_total_rewards() == pytest.approx([1, -1, 0 - 1.0, 0])
    assert [t.transitions[0].metrics["gold"] for t in group.trajectories_G] == [2, 4, 3, 3]


def test_a_judge_of_graded_scores_that_likes_a_side_cancels_out(renderer):
    # any async callable will do; it adds 0.4 for side B
    async def judge(comparison: Comparison) -> float:
        a, b = (len(side[0]["content"]) for side in (comparison.completion_A, comparison.completion_B))
        return 0.2 * np.sign(a - b) + 0.4

    builder = PairwisePreferenceGroupBuilder(prompt("Ada"), renderer, judge, num_envs=3)
    group = rolled_out(builder, [" a", " bb", " ccc"])
    assert group.final_rewards_G == pytest.approx([0.2, 0.0, -0.2])


def test_a_lonely_survivor_and_a_failing_judge_leave_no_reward(renderer):
    lonely = rolled_out(PairwisePreferenceGroupBuilder(prompt("Ada"), renderer, SHORTER, num_envs=1), [" a"])
    assert lonely.trajectories_G == [] and "nothing to compare it with" in str(lonely.errors[0])

    async def broken(comparison: Comparison) -> float:
        return float("nan")

    group = rolled_out(PairwisePreferenceGroupBuilder(prompt("Ada"), renderer, broken, num_envs=2), [" a", " b"])
    assert group.final_rewards_G == [] and [type(error) for error in group.errors] == [JudgeError] * 2


def test_a_group_is_scored_by_a_reward_model_in_one_call(renderer):
    class Length(RewardModel):
        calls = 0

        async def score(self, conversations_D: Sequence[Sequence[Message]]) -> list[float]:
            self.calls += 1
            return [float(len(conversation[-1]["content"])) for conversation in conversations_D]

    model = Length()
    builder = RewardModelGroupBuilder(prompt("Ada"), renderer, model, num_envs=3, coef=0.5)
    group = rolled_out(builder, [" a", " bbb", " cc|"])
    assert model.calls == 1 and group.get_total_rewards() == pytest.approx([1.0, 2.0, 1.5 - 1.0])
    assert [metrics["proxy"] for metrics in group.metrics_G] == [2.0, 4.0, 3.0]


def test_only_members_that_cannot_be_scored_are_lost(renderer, torch_service):
    class Odd(RewardModel):
        async def score(self, conversations_D: Sequence[Sequence[Message]]) -> list[float]:
            return [float("nan"), 1.0, float("inf"), 2.0]

    group = rolled_out(RewardModelGroupBuilder(prompt("Ada"), renderer, Odd(), num_envs=4), [" a", " b", " c", " d"])
    assert group.get_total_rewards() == [1.0, 2.0] and [type(error) for error in group.errors] == [JudgeError] * 2
    scalar = ScalarModel(torch_service.create_scalar_client("tiny"), renderer)
    builder = RewardModelGroupBuilder(prompt("Ada"), renderer, scalar, num_envs=3)
    group = rolled_out(builder, [" a", " b" * 300, " c"])
    assert group.get_total_rewards() == [0.0, 0.0]  # of the untrained model
    assert "the reward model's context 512" in str(group.errors[0]) and len(group.errors) == 1
    lost = rolled_out(builder, [" b" * 300] * 3)
    assert lost.trajectories_G == [] and len(lost.errors) == 3


# --- win rate -----------------------------------------------------------------------------------


def test_win_rate_by_hand():
    # B wins; a side is preferred, whatever is on it; A wins
    mean, stderr = win_rate([1.0, 1.0, -1.0], [-1.0, 1.0, 1.0])
    assert mean == pytest.approx(0.5) and stderr == pytest.approx(0.5 / np.sqrt(3))
    assert win_rate([1.0], [-1.0])[0] == 1.0 and np.isnan(win_rate([1.0], [-1.0])[1])


def test_a_policy_against_itself_wins_half_and_against_a_longer_one_wins_all(renderer, torch_service):
    client = torch_service.create_sampling_client(base_model="tiny")
    prompts = [prompt(name) for name in ("Ada", "Ben", "Cleo")]
    itself = asyncio.run(WinRateEvaluator(prompts, renderer, SHORTER, max_tokens=5, temperature=0.0)(client, client))
    assert itself == {"win_rate": 0.5, "win_rate_stderr": 0.0, "swap_agreement": 1.0, "prompts": 3.0}
    evaluator = WinRateEvaluator(
        prompts, renderer, RuleJudge(lambda _, answer: answer.count("a")), max_tokens=40, seed=3
    )
    result = asyncio.run(evaluator(client, client))
    forward = [
        one.completion_B[0]["content"].count("a") - one.completion_A[0]["content"].count("a")
        for one in evaluator.comparisons
    ]
    assert result["win_rate"] == pytest.approx(np.mean([(np.sign(gap) + 1) / 2 for gap in forward]))
    # two streams of random numbers
    assert all(one.completion_A != one.completion_B for one in evaluator.comparisons)


# --- judges behind an endpoint ------------------------------------------------------------------


class Endpoint(ThreadingHTTPServer):
    """Answers with the next of `replies`: a completion's text, or raw bytes, or a status code;
    calls `before` first.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), EndpointHandler)
        self.requests: list[dict] = []
        self.replies: list[str | bytes | int] = []
        self.before: Callable[[], object] = lambda: None
        self.drip: bytes = b""  # sent before the rest, and then a byte now and then, for ever
        self.hung_up = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1/"


class EndpointHandler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body | {"path": self.path, "key": self.headers.get("Authorization")})
        self.server.before()
        if self.server.drip:
            self._drip()
            return
        reply = self.server.replies.pop(0) if len(self.server.replies) > 1 else self.server.replies[0]
        self.send_response(reply if isinstance(reply, int) else 200)
        self.end_headers()
        if isinstance(reply, str):
            reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()
        if isinstance(reply, bytes):
            self.wfile.write(reply)

    def _drip(self) -> None:
        try:
            self.wfile.write(self.server.drip)
            while True:
                self.wfile.write(b"x")
                time.sleep(0.02)
        except OSError:
            self.server.hung_up.set()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Endpoint() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(endpoint: Endpoint, **settings) -> float:
    judge = EndpointJudge(
        EndpointJudgeBuilder(base_url=endpoint.url, model="m", **({"retries": 0, "timeout": 600.0} | settings))
    )
    return asyncio.run(
        judge(
            Comparison(
                prompt("Ada"), [Message(role="assistant", content="one")], [Message(role="assistant", content="two")]
            )
        )
    )


def test_an_endpoint_judges(endpoint, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "k1")
    for reply, score in (("B", 1.0), ("I like the first.\n\n**A**", -1.0), ("tie.", 0.0)):
        endpoint.replies = [reply]
        assert ask(endpoint, api_key_variable="JUDGE_KEY") == score
    request = endpoint.requests[0]
    assert request["path"] == "/v1/chat/completions" and request["model"] == "m" and request["key"] == "Bearer k1"
    shown = request["messages"][0]["content"]
    assert shown.index("Ada:") < shown.index("[A]\none") < shown.index("[B]\ntwo")


# Trap: a judge that is down, answers garbage, or likes one side.
@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("Both have their merits, A and B.", "not with A, B or Tie"),
        ("", "no completion"),
        (b"<html>", "no completion"),
        (b'{"choices": []}', "no completion"),
        (b'{"choices": [{"message": {"content": null}}]}', "no completion"),
        (503, "503"),
    ],
)
def test_garbage_is_an_error_and_never_a_score(endpoint, reply, message):
    endpoint.replies = [reply]
    with pytest.raises(JudgeError, match=message):
        ask(endpoint)


def test_time_outs_and_dead_endpoints_are_errors_and_a_retry_may_succeed(endpoint):
    endpoint.replies, answer = ["A"], threading.Event()
    endpoint.before = answer.wait
    with pytest.raises(JudgeError, match="no answer in 0.2 s"):
        ask(endpoint, timeout=0.2)
    answer.set()
    endpoint.replies = [500, "B"]
    assert ask(endpoint, retries=1) == 1.0
    endpoint.shutdown()
    endpoint.server_close()
    with pytest.raises(JudgeError, match="connection"):
        ask(endpoint)


# Trap: a judge that drips a byte at a time.
@pytest.mark.parametrize(
    "before", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nServer: ", b"H"], ids=["body", "header", "status"]
)
def test_an_endpoint_that_drips_is_left_when_the_time_is_over(endpoint: Endpoint, before: bytes):
    endpoint.drip = before
    threads = {thread.name for thread in threading.enumerate() if not thread.daemon}
    with pytest.raises(JudgeError, match="no answer in 0.5 s|illegal|peer"):
        ask(endpoint, timeout=0.5)
    assert endpoint.hung_up.wait(600)
    assert {
        thread.name for thread in threading.enumerate() if not thread.daemon
    } <= threads  # nothing keeps the command from ending


def test_many_judgements_are_under_way_at_once(endpoint):
    """An endpoint that answers only when eight requests wait for it answers all sixteen."""
    endpoint.replies, endpoint.before = ["B"], threading.Barrier(8, timeout=600).wait
    judge: Judge = EndpointJudge(
        EndpointJudgeBuilder(base_url=endpoint.url, model="m", max_concurrent=8, timeout=600.0)
    )
    sides = [[Message(role="assistant", content=text)] for text in ("one", "two")]
    assert asyncio.run(judge_all(judge, [Comparison(prompt("Ada"), *sides)] * 16)) == [1.0] * 16


# --- end to end ---------------------------------------------------------------------------------


def ascii_share(answer: str) -> float:
    return float(np.mean([character < "\x80" for character in answer])) if answer else 0.0


@chz.chz
class AsciiJudgeBuilder(JudgeBuilder):
    def __call__(self, tokenizer: Tokenizer) -> Judge:
        return RuleJudge(lambda _, answer: ascii_share(answer))


@chz.chz
class AsciiPrompts(KindWordsPrompts):
    def gold(self) -> GoldReward:
        return lambda _, answer: ascii_share(answer)


def test_reinforcement_learning_from_a_judge_of_pairs(tmp_path):
    env = PairwiseBuilder(
        prompts=AsciiPrompts(), judge=AsciiJudgeBuilder(), batch_size=16, group_size=4, format_coef=0.0
    )
    with pytest.raises(ConfigError, match="a pair needs at least 2"):
        asyncio.run(chz.replace(env, group_size=1)(get_renderer("plain", load_tokenizer("tiny"))))
    config = train.Config(
        env=env,
        model_name="micro",
        renderer_name="plain",
        max_tokens=12,
        max_steps=8,
        learning_rate=1e-2,
        eval_every=0,
        save_every=0,
        log_path=str(tmp_path / "run"),
        backend=BackendConfig(engine="torch"),
    )
    asyncio.run(train.main(config))
    records = read_metrics(tmp_path / "run")
    gold = [record["env/all/gold"] for record in records]
    assert gold[0] < 0.6 and gold[-1] > 0.8
    # what one wins, others lose
    assert all(abs(record["env/all/win_minus_loss"]) < rounded(1e-6) for record in records)
