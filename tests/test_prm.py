"""Process reward models: where steps lie, how they are labelled and trained on, and what becomes of
their scores.
"""

import asyncio
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import chz
import numpy as np
import pytest
import torch

from envs.arithmetic_chain import Chain, ChainBuilder, ChainExamplesBuilder, ChainTask
from envs.graders import LastLine
from envs.problem import GraderError
from envs.problem_env import ProblemEnv
from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.types import AdamParams, ModelInput, SampledSequence, SampleResponse, SamplingParams
from posttrain.renderers import get_renderer, stream
from posttrain.renderers.turns import decode
from posttrain.renderers.types import Renderer
from posttrain.tracking.metrics_log import read_metrics
from preference import steps, train_prm
from preference.best_of_n import compare_selections
from preference.prm import PrmReward, ProcessReward, ProcessRewardModel, StepScores
from preference.prm_labels import LabelConfig, StepRecord, label_solutions, read_records
from preference.solutions import Solution, grade, sample_solutions, solution_of
from preference.step_data import StepExamplesBuilder, step_cross_entropy, step_datum
from preference.steps import StepFormat, _tokens_up_to, split_response
from rl.types import TokensWithLogprobs, Trajectory, TrajectoryGroup, Transition
from tests.conftest import rounded
from tests.jsonl_files import write
from tests.test_tokenizer_kinds import KINDS, wrapped

LINES = StepFormat(answer_marker="#")
CHAIN = Chain(34, (7, -8))  # 34+7=41, 41-8=33, #33


@pytest.fixture(scope="module")
def plain() -> Renderer:
    return get_renderer("plain", load_tokenizer("tiny"))


def response(text: str, renderer: Renderer, ended: bool = True) -> list[int]:
    tokens = renderer.tokenizer.encode(text)
    return [*tokens, renderer.tokenizer.eos_token_id] if ended else tokens  # type: ignore[list-item]


# --- steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "separator", "spans", "strings"),
    [
        ("a=1\nb=2\n#2", "\n", [(0, 4), (4, 8), (8, 10)], ["a=1", "b=2", "#2"]),
        ("\n\na\n\n\n\nb\n\n", "\n\n", [(0, 7), (7, 10)], ["a", "b"]),
        ("one", "\n", [(0, 3)], ["one"]),
        (" \n ", "\n", [], []),
    ],
)
def test_spans_cover_the_text_and_blank_lines_are_no_steps(
    text: str, separator: str, spans: list[tuple[int, int]], strings: list[str]
) -> None:
    form = StepFormat(separator=separator)
    assert form.spans(text) == spans and form.strings(text) == strings


# Trap: steps found by token ids, or by encoding again.
@pytest.mark.parametrize("renderer_name", ["plain", "role_colon", "chat_template"])
def test_tokens_of_steps_are_located_without_encoding_again(renderer_name: str) -> None:
    renderer = get_renderer(renderer_name, load_tokenizer("tiny"))
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "é=1\n💡=2\n#2"}]
    tokens, weights = renderer.build_supervised_example(messages)  # type: ignore[arg-type]
    sampled = tokens[weights.index(1.0) :]
    steps = split_response(sampled, renderer, LINES)
    assert steps.strings == ["é=1", "💡=2", "#2"] and steps.malformed is None
    pieces = [
        decode(renderer.tokenizer, sampled[a:b]) for a, b in zip(steps.bounds[:-1], steps.bounds[1:], strict=True)
    ]
    assert pieces[0].lstrip() == "é=1\n" and pieces[1] == "💡=2\n" and pieces[2].startswith("#2")
    assert steps.bounds[-1] == len(sampled)


# Trap: the text of every prefix, which is the square of a long solution's tokens.
@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_a_long_solution_are_those_of_its_prefixes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, decoded = wrapped(KINDS[kind]()), []
    tokens = tokenizer.encode("that is\n日本語 é=1\n💡\n\nyes or no\n " * 20, add_special_tokens=False)
    whole = decode(tokenizer, tokens)
    ends = [end for end, letter in enumerate(whole, start=1) if letter == "\n"]
    monkeypatch.setattr(stream, "decode", lambda *args: decoded.append(len(args[1])) or decode(*args))
    monkeypatch.setattr(steps, "decode", lambda *args: decoded.append(len(args[1])) or decode(*args))
    counts = _tokens_up_to(tokenizer, tokens, ends)
    prefixes = [decode(tokenizer, tokens[:n]) for n in range(len(tokens) + 1)]
    assert counts == [next(n for n, text in enumerate(prefixes) if text.startswith(whole[:end])) for end in ends]
    assert len(ends) == 100 and sum(decoded) < 1000 * len(ends)  # ten prefixes for each end would be 5,000


# Trap: the text of a whole block waits for the other half of its last character.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lines", [2, 40])
def test_steps_of_a_response_cut_off_in_a_character(kind: str, lines: int) -> None:
    tokenizer = wrapped(KINDS[kind]())
    tokens = tokenizer.encode("that is\n" * lines + "💡", add_special_tokens=False)[:-1]
    prefixes = [decode(tokenizer, tokens[:n]) for n in range(len(tokens) + 1)]
    ends = [end for end, letter in enumerate(prefixes[-1], start=1) if letter == "\n"]
    expected = [next(n for n, text in enumerate(prefixes) if text.startswith(prefixes[-1][:end])) for end in ends]
    assert _tokens_up_to(tokenizer, tokens, ends) == expected and len(set(expected)) == len(expected) >= lines - 1


def test_what_is_malformed(plain: Renderer) -> None:
    for text, ended, kind in [
        ("1\n#2", False, "truncated"),
        ("", True, "empty"),
        ("1\n2", True, "no_answer"),
        ("#2", True, None),
    ]:
        assert split_response(response(text, plain, ended), plain, LINES).malformed == kind


# --- labels -------------------------------------------------------------------------------------


class ScriptedSampler:
    """Answers a prefix with right completions as often as `share` says, then with wrong ones;
    counts what it was asked.
    """

    def __init__(self, renderer: Renderer, share: dict[str, int], dies_after: int | None = None):
        self.renderer, self.share, self.asked, self.dies_after = renderer, share, [], dies_after

    async def sample_async(self, prompt: ModelInput, num_samples: int, params: SamplingParams) -> SampleResponse:
        if self.dies_after == len(self.asked):
            raise KeyboardInterrupt
        prefix = decode(self.renderer.tokenizer, prompt.to_ints())
        self.asked.append((prefix, params.seed))
        right = self.share[prefix.split("=", 1)[1]]
        texts = ["#33"] * right + ["#0"] * (num_samples - right)
        return SampleResponse([SampledSequence(response(text, self.renderer), [], "stop") for text in texts])


def solve(text: str, renderer: Renderer, ended: bool = True, chain: Chain = CHAIN) -> tuple[ProblemEnv, Solution]:
    env = ProblemEnv(chain.problem, renderer)
    return env, solution_of(env, asyncio.run(grade(env, response(text, renderer, ended))))


GOOD: str = "34+7=41\n41-8=33\n#33"
BAD: str = "34+7=42\n42-8=34\n#34"
BROKEN: str = "34+7=41\n41"
SHARES = {"34+7=41\n": 6, "34+7=41\n41-8=33\n": 8, "34+7=42\n": 2, "34+7=42\n42-8=34\n": 0}


def label(sampler: ScriptedSampler, solutions: list[tuple[ProblemEnv, Solution]], path: Path, chunk_size: int = 64):  # noqa: ANN201
    config = LabelConfig(max_tokens=40, form=LINES, num_completions=8, chunk_size=chunk_size)
    return asyncio.run(label_solutions(sampler, solutions, config, path))  # type: ignore[arg-type]


def test_labels_are_the_share_of_completions_that_are_right(plain: Renderer, tmp_path: Path) -> None:
    sampler = ScriptedSampler(plain, SHARES)
    broken_env, cut_off = solve(BROKEN, plain, ended=False)
    solutions = [
        solve(GOOD, plain),
        solve(BAD, plain),
        (broken_env, replace(cut_off, correct=True)),  # a grader may find the answer in it
        solve(GOOD, plain),
        solve("", plain),
    ]
    records, counts = label(sampler, solutions, tmp_path / "labels.jsonl")
    good, bad, broken = records
    assert (good.soft, good.label) == ([0.75, 1.0, 1.0], [1, 1, 1])
    assert (bad.soft, bad.label) == ([0.25, 0.0, 0.0], [1, 0, 0])
    assert (broken.soft, broken.label, broken.malformed) == ([0.75, 0.0], [1, 0], "truncated")
    assert counts == {"duplicate": 1, "empty": 1, "cached": 0, "labelled": 3, "failed": 0, "truncated": 1}
    assert len({seed for _, seed in sampler.asked}) == len(sampler.asked) == 5
    assert read_records(tmp_path / "labels.jsonl") == records
    no_room = LabelConfig(max_tokens=len("34+7=41\n"), form=LINES, num_completions=8)
    (record,), _ = asyncio.run(label_solutions(sampler, solutions[2:3], no_room, tmp_path / "short.jsonl"))  # type: ignore[arg-type]
    assert record.soft == [0.0, 0.0] and len(sampler.asked) == 5


# Trap: trained at the line break after a step, and scored in RL at the blank line after it.
def test_a_solution_with_blank_lines_is_trained_on_as_it_was_sampled(plain: Renderer, tmp_path: Path) -> None:
    shares = {"\n34+7=41\n\n": 6, "\n34+7=41\n\n41-8=33\n \n": 8}
    env, solution = solve("\n34+7=41\n\n41-8=33\n \n#33", plain)
    label(ScriptedSampler(plain, shares), [(env, solution)], tmp_path / "labels.jsonl")
    (record,) = read_records(tmp_path / "labels.jsonl")
    assert record.output == ["34+7=41", "41-8=33 ", "#33"] and record.soft == [0.75, 1.0, 1.0]
    datum = step_datum(record, plain, StepExamplesBuilder(path="", form=LINES, last_tokens=1))
    assert datum is not None and datum.model_input.to_ints() == [*solution.prompt, *solution.tokens]
    ends = len(solution.prompt) + np.array(split_response(solution.tokens, plain, LINES).last_tokens)
    assert np.flatnonzero(datum.loss_fn_inputs["weights"].array).tolist() == ends.tolist()
    assert json.loads((tmp_path / "labels.jsonl").read_text())["written"]


# Trap: a restarted labelling that repeats or changes labels.
def test_a_killed_labelling_goes_on_where_it_was(plain: Renderer, tmp_path: Path) -> None:
    solutions, path = [solve(GOOD, plain), solve(BAD, plain)], tmp_path / "labels.jsonl"
    with pytest.raises(KeyboardInterrupt):
        label(ScriptedSampler(plain, SHARES, dies_after=3), solutions, path, chunk_size=1)
    path.write_text(path.read_text() + '{"torn')
    again = ScriptedSampler(plain, SHARES)
    resumed, counts = label(again, solutions, path, chunk_size=1)
    whole, _ = label(ScriptedSampler(plain, SHARES), solutions, tmp_path / "whole.jsonl")
    assert counts["cached"] == 1 and counts["labelled"] == 1 and resumed == whole
    assert all("34+7=42" in prefix for prefix, _ in again.asked)
    label(again, solutions, path)
    assert len(again.asked) == 2


def test_a_verifier_that_fails_leaves_no_label(
    plain: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solutions = [solve(GOOD, plain)]

    async def fail(self: LastLine, answer: str, gold: str) -> bool:
        raise GraderError("down")

    with monkeypatch.context() as patch:
        patch.setattr(LastLine, "is_right", fail)
        records, counts = label(ScriptedSampler(plain, SHARES), solutions, tmp_path / "labels.jsonl")
        assert records == [] and counts["failed"] == 1
    assert label(ScriptedSampler(plain, SHARES), solutions, tmp_path / "labels.jsonl")[1]["labelled"] == 1


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({"input": "q", "label": [1]}, "no field 'output'"),
        ({"input": "q", "output": ["a", "b"], "label": [1]}, "label must be"),
        ({"input": "q", "output": ["a"], "label": [2]}, "label must be"),
        ({"input": "q", "output": [], "label": []}, "output must be"),
        ({"input": "q", "output": ["a"], "label": [1], "soft": [1.5]}, "soft must be"),
        ({"input": None, "output": ["a"], "label": [1]}, "input must be a text"),
        ({"input": "q", "output": ["a"], "label": [1], "output_prefix": ["b"]}, "output_prefix must be a text"),
        ({"input": "q", "output": ["a"], "label": [1], "id": 7}, "id must be a text"),
    ],
)
def test_bad_records_are_named_by_file_and_line(line: dict, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "prm.jsonl"
    write(file, {"input": "q", "output": ["a"], "label": [1]}, line)
    with pytest.raises(DataError, match=rf"prm.jsonl:2: .*{complaint}"):
        read_records(file)


def test_records_with_the_names_of_trl_are_read(tmp_path: Path) -> None:
    file = write(tmp_path / "prm.jsonl", {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]})
    assert read_records(file) == [StepRecord("q", ["a", "b"], [1, 0])]


def test_questions_that_are_held_out_in_a_file_of_their_own_are_not_trained_on(
    plain: Renderer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"train": ["1+1=", "1+2=", "1+1="], "test": ["1+1=", "1+3="]}
    for name, questions in rows.items():
        records = [{"input": q, "output": ["2", "#2"], "label": [1, 1], "output_prefix": None} for q in questions]
        write(tmp_path / f"{name}.jsonl", *records)
    paths: dict[str, Any] = {"path": str(tmp_path / "train.jsonl"), "test_path": str(tmp_path / "test.jsonl")}
    train, test = StepExamplesBuilder(**paths, form=LINES)(plain)
    assert test is not None and len(test.get_batch(0)) == 2
    (left,) = train.get_batch(0)
    assert decode(plain.tokenizer, left.model_input.to_ints()).startswith("1+2=")
    assert "2 solutions of held-out questions dropped" in capsys.readouterr().out


# --- the loss -----------------------------------------------------------------------------------


def loss_of(logits: list[float], labels: list[float], weights: list[float]) -> tuple[list[float], float]:
    """Per token, and as the batch sees it: sum w BCE / (sum w + 1e-6)."""
    inputs = {"labels": torch.tensor(labels, dtype=torch.float32), "weights": torch.ones(len(labels))}
    each, _ = step_cross_entropy(torch.tensor(logits, dtype=torch.float32), inputs)
    inputs["weights"] = torch.tensor(weights) / (sum(weights) + 1e-6)
    return each.tolist(), float(step_cross_entropy(torch.tensor(logits, dtype=torch.float32), inputs)[0].sum())


def test_loss_equals_the_worked_cases() -> None:
    each, total = loss_of([2, 1, -0.5, 0.3, 0, 0], [1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0])
    assert each == pytest.approx([0.126928, 0.313262, 0.974077, 0.854355, 0.693147, 0.693147], abs=1e-6)
    assert total == pytest.approx(0.7087103, abs=1e-6)
    assert loss_of([2, -0.5, 1.5], [1, 0, 1], [1, 1, 1])[1] == pytest.approx(0.2674728, abs=1e-6)
    assert loss_of([0], [0.75], [1])[1] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(("last_tokens", "weighted"), [(None, 20), (1, 3), (3, 9)])
def test_labels_are_copied_to_the_tokens_of_their_step(plain: Renderer, last_tokens: int | None, weighted: int) -> None:
    record = StepRecord("34+7-8=", GOOD.split("\n"), [1, 0, 0], [0.75, 0.25, 0])
    datum = step_datum(record, plain, StepExamplesBuilder(path="", form=LINES, labels="soft", last_tokens=last_tokens))
    assert datum is not None
    arrays = {name: value.array for name, value in datum.loss_fn_inputs.items()}
    assert arrays["weights"].sum() == weighted and not arrays["weights"][:7].any()
    ends = np.flatnonzero(arrays["step_ends"])
    assert ends.tolist() == [7 + 7, 7 + 15, 7 + 19] and arrays["labels"][ends].tolist() == [0.75, 0.25, 0]
    assert datum.model_input.length == 7 + 20


def test_the_broken_last_step_is_not_trained_on(plain: Renderer) -> None:
    hard = StepExamplesBuilder(path="", form=LINES)
    broken = StepRecord("34+7-8=", BROKEN.split("\n"), [1, 0], malformed="truncated")
    datum = step_datum(broken, plain, hard)
    assert datum is not None and datum.loss_fn_inputs["weights"].array.sum() == 8
    assert step_datum(StepRecord("q", ["41"], [0], malformed="no_answer"), plain, hard) is None
    with pytest.raises(DataError, match="no field 'soft'"):
        step_datum(broken, plain, chz.replace(hard, labels="soft"))


# --- training and scores ------------------------------------------------------------------------


def test_what_follows_the_first_error_can_be_left_out(plain: Renderer) -> None:
    config = StepExamplesBuilder(path="", form=LINES, until_first_error=True, last_tokens=1)
    datum = step_datum(StepRecord("34+7-8=", BAD.split("\n"), [1, 0, 0]), plain, config)
    assert datum is not None and np.flatnonzero(datum.loss_fn_inputs["step_ends"].array).tolist() == [7 + 7, 7 + 15]
    assert datum.loss_fn_inputs["weights"].array.sum() == 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that tells "+" steps (good) from "-" steps (bad), by the command's own loop."""
    folder = tmp_path_factory.mktemp("prm")
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(200):
        signs = rng.choice(["+", "-"], 2)
        steps = [f"{rng.integers(10, 99)}{sign}{rng.integers(1, 9)}" for sign in signs]
        labels = [*(int(s == "+") for s in signs), 1]
        rows.append({"input": f"{rng.integers(1000)}=", "output": [*steps, "#1"], "label": labels})
    path = write(folder / "labels.jsonl", *rows)
    dataset = StepExamplesBuilder(path=path, test_size=30, form=LINES, batch_size=32)
    config = train_prm.Config(
        dataset=dataset, num_epochs=5, learning_rate=2e-3, renderer_name="plain", log_path=str(folder / "run")
    )
    metrics = asyncio.run(train_prm.main(config))
    assert (
        metrics["test/accuracy"] > 0.97 and metrics["test/first_error"] > 0.97 and 0.5 <= metrics["test/majority"] < 0.8
    )
    return folder / "run"


def test_training_starts_at_ln_2_and_learns(trained: Path) -> None:
    first = read_metrics(trained)[0]
    assert first["train_loss"] == pytest.approx(math.log(2), abs=rounded(1e-5)) == first["test/loss"]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_held_out_loss_does_not_depend_on_the_batches(reduction: str, tmp_path: Path, torch_service: ServiceClient):
    """Trap: the mean of the batches' losses, of which the last batch may be short."""
    texts = [["1+1", "#2"], ["12+34", "46+1", "#47"], ["1", "#1"]]
    rows = [{"input": f"{i}=", "output": text, "label": [i % 2] * len(text)} for i, text in enumerate(texts)]
    path = write(tmp_path / "rows.jsonl", *rows)
    client = torch_service.create_scalar_client("tiny", None, 0)
    renderer = get_renderer("plain", load_tokenizer("tiny"))
    config = StepExamplesBuilder(path=path, form=LINES, reduction=reduction)
    train_set, _ = chz.replace(config, batch_size=3)(renderer)
    batch = train_set.get_batch(0)
    client.forward_backward(batch, step_cross_entropy).result()  # from a head of zeros all losses are ln 2
    client.optim_step(AdamParams(learning_rate=1e-2)).result()
    expected = client.forward(batch, step_cross_entropy).result().metrics["loss:sum"]
    apart = chz.replace(config, path=write(tmp_path / "other.jsonl", rows[0] | {"input": "9="}), test_path=config.path)
    for size in (1, 2, 3):
        _, test_set = chz.replace(apart, batch_size=size)(renderer)
        assert test_set is not None
        found = asyncio.run(train_prm.StepEvaluator(test_set)(client))
        assert found["test/loss"] == pytest.approx(expected, rel=rounded(1e-5)) != pytest.approx(math.log(2), rel=0.01)


def reward(trained: Path, **options: object) -> PrmReward:
    return chz.replace(PrmReward(path=str(trained / "checkpoints" / "final"), form=LINES), **options)


def group_of(texts: list[tuple[str, bool]], renderer: Renderer) -> TrajectoryGroup:
    trajectories = []
    for text, ended in texts:
        tokens = response(text, renderer, ended)
        ob = ModelInput.from_ints(renderer.tokenizer.encode("7="))
        trajectories.append(Trajectory([Transition(ob, TokensWithLogprobs(tokens, [0.0] * len(tokens)), 1.0, True)]))
    return TrajectoryGroup(trajectories, [0.0] * len(texts), [{} for _ in texts])


def test_rewards_are_outcome_plus_the_worst_step(trained: Path, plain: Renderer, torch_service: ServiceClient) -> None:
    texts = [("34+7\n41+8\n#1", True), ("34+7\n41-8\n#1", True), ("34+7\n41+8", False), ("", True)]
    group = group_of(texts, plain)
    stage = asyncio.run(reward(trained)(torch_service, None, plain))  # type: ignore[arg-type]
    metrics = asyncio.run(stage([group]))
    good, bad, cut, empty = [member["prm"] for member in group.metrics_G]
    assert good > 1 and bad < -1 and cut == empty == -5.0
    assert group.get_total_rewards() == pytest.approx([1 + 0.2 * good, 1 + 0.2 * bad, 0.0, 0.0])
    assert metrics == {
        "prm/mean": pytest.approx(np.mean([good, bad, cut, empty])),
        "prm/steps": (3 + 3 + 2 + 1) / 4,
        "prm/truncated": 0.25,
        "prm/empty": 0.25,
        "prm/no_answer": 0.0,
    }


def test_step_advantages_are_the_changes_of_the_probability(plain: Renderer) -> None:
    class Scripted(ProcessRewardModel):
        max_length = 100  # type: ignore[assignment]

        async def score(self, responses_D: list[tuple[list[int], list[int]]]) -> list[StepScores]:  # type: ignore[override]
            return [StepScores(np.log(np.array(p) / (1 - np.array(p))), bounds, None) for p, bounds in SCRIPT]

    SCRIPT = [([0.8, 0.5, 0.9], [0, 2, 3, 5]), ([0.4], [0])]
    group = group_of([("ab\nc", True), ("", True)], plain)
    stage = ProcessReward(Scripted(None, plain, LINES), PrmReward(path="", per_step=True, coef=2.0))  # type: ignore[arg-type]
    first, second = (trajectory.transitions[0] for trajectory in group.trajectories_G)
    for times in (1, 2):  # added to what a turn has
        asyncio.run(stage([group]))
        assert first.token_advantages == pytest.approx(times * np.array([0.4, 0.4, -0.6, 0.8, 0.8]))
    assert second.token_advantages == pytest.approx([-0.8]) and group.get_total_rewards() == [1.0, 1.0]


def test_scores_do_not_depend_on_what_is_scored_beside(
    trained: Path, plain: Renderer, torch_service: ServiceClient
) -> None:
    model = reward(trained).load(plain.tokenizer, torch_service)
    pairs = [
        (plain.tokenizer.encode("7="), response(text, plain))
        for text in ("34+7\n41-8\n#1", "", "1+1\n#1", "34+7\n41-8\n#2")
    ]
    together = asyncio.run(model.score(pairs))
    alone = [asyncio.run(model.score([pair]))[0] for pair in pairs]
    for a, b in zip(together, alone, strict=True):
        assert np.allclose(a.logits_S, b.logits_S, atol=rounded(1e-4))
    assert [len(scores.logits_S) for scores in together] == [3, 1, 2, 3]


def test_aggregation_equals_the_worked_cases() -> None:
    scores = StepScores(np.array([2, -0.5, 1.5]), [], None)
    assert [scores.aggregate(how) for how in ("min", "product", "last")] == pytest.approx(
        [0.3775407, 0.2718735, 0.8175745], abs=1e-7
    )
    assert scores.aggregate("mean", "logit") == pytest.approx(1.0) and scores.aggregate("min", "logit") == -0.5
    for outcome, logits, combined in [(1, [2, 1, 3], 1.2), (1, [-6, 1], -0.2), (0, [4, 2], 0.4), (0, [-5, 0], -1)]:
        assert outcome + 0.2 * StepScores(np.array(logits), [], None).aggregate("min", "logit") == pytest.approx(
            combined
        )
    with pytest.raises(ConfigError, match="product is of probabilities"):
        scores.aggregate("product", "logit")


def test_ways_to_choose() -> None:
    def group(*answers: str) -> list[Solution]:
        return [Solution("q", [], [], answer, answer == "1") for answer in answers]

    groups = [group("1", "2", "2", ""), group("1", "2", "1", "3"), group("2", "1", "", "")]
    alone = [compare_selections([g], [[0.0] * len(g)])["majority"] for g in [*groups, group("1", "2"), group("", "")]]
    assert alone == [0, 1, 0, 1, 0], "a tie goes to the answer that was sampled first; no answer is no vote"
    found = compare_selections(groups, [[5, 1, 2, 3], [0, 9, 1, 2], [0, 1, 0, 0]])
    assert found["best_of_n"] == pytest.approx(2 / 3) and found["any"] == 1 and found["sampled"] == pytest.approx(1 / 3)
    assert found["majority"] == pytest.approx(1 / 3) and found["gain"] == pytest.approx(1 / 3)
    assert found["best_of_n_se"] == pytest.approx(np.std([1, 0, 1], ddof=1) / 3**0.5)


# --- chains -------------------------------------------------------------------------------------


def test_chains_and_their_first_wrong_step(plain: Renderer) -> None:
    assert CHAIN.question == "34+7-8=" and "\n".join(CHAIN.steps) == GOOD
    assert CHAIN.first_wrong_step(GOOD.split("\n")) is None and CHAIN.first_wrong_step(BAD.split("\n")) == 0
    assert CHAIN.first_wrong_step(["34+7=41"]) == 1 and CHAIN.first_wrong_step([*CHAIN.steps, "#33"]) == 3
    env, solution = solve(GOOD, plain)
    assert solution.correct and solution.answer == "33" and not solve(GOOD, plain, ended=False)[1].correct
    assert env.problem.grader.extract("34+7=41\n33") is None and not solve(BAD, plain)[1].correct


def test_held_out_chains_are_never_trained_on(plain: Renderer) -> None:
    task = ChainTask(num_steps=2)
    held_out = {chain.question for chain in task.test_chains()}
    assert len(held_out) == 200
    for seed in range(3):
        rl, test = asyncio.run(ChainBuilder(num_steps=2, seed=seed)(plain))
        drawn = [builder.env_thunk().question() for i in range(20) for builder in rl.get_batch(i)]  # type: ignore[attr-defined]
        examples, _ = ChainExamplesBuilder(num_steps=2, seed=seed)(plain)
        shown = [
            decode(plain.tokenizer, datum.model_input.to_ints()).split("=")[0] + "="
            for datum in examples.get_batch(seed)
        ]
        assert not held_out & {*drawn, *shown}
        assert test is not None and {b.env_thunk().question() for b in test.get_batch(0)} <= held_out  # type: ignore[attr-defined]
    totals = [int(step.split("=")[-1].strip("#")) for chain in task.chains(300, [5]) for step in chain.steps]
    assert min(totals) >= 0 and max(totals) <= 99
    with pytest.raises(ConfigError, match="there are fewer than 30 such chains"):
        ChainTask(num_steps=1, max_total=9, max_term=1).draw(30, [0])


def test_sampled_solutions_are_graded_and_reproducible(plain: Renderer, torch_service: ServiceClient) -> None:
    client = torch_service.create_sampling_client(base_model="tiny")
    problems = [ProblemEnv(problem, plain) for problem in ChainTask(num_steps=2).draw(3, [1])]
    first, second = (asyncio.run(sample_solutions(client, problems, 2, SamplingParams(12, 7))) for _ in range(2))
    assert first == second and [len(group) for group in first] == [2, 2, 2]
    assert len({tuple(solution.tokens) for group in first for solution in group}) == 6
