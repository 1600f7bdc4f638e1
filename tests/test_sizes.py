"""What grows with a run's size grows no faster. Sizes and counts, never seconds."""

import asyncio
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.backend import prompt_scores
from posttrain.backend.batching import micro_batches
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import DataError
from posttrain.backend.logprobs import target_logprobs
from posttrain.backend.ranges import RangeError
from posttrain.backend.spans import Span
from posttrain.backend.trainer import Trainer
from posttrain.backend.types import Datum, LoraConfig, ModelInput, TensorData
from posttrain.tracking import plots, progress, transcripts
from posttrain.tracking.progress import counted
from posttrain.tracking.run_folder import RunFolder
from posttrain.tracking.timeline import Timeline
from posttrain.tracking.transcripts import TranscriptGroup, TranscriptMember, TranscriptTurn, write_transcripts
from rl.data_processing import rows_of
from rl.group_sources import GroupSource
from rl.rollout_state import group_from_json, group_to_json
from rl.rollouts import do_single_rollout
from rl.types import Env, EnvGroupBuilder, StepResult, TokensWithLogprobs, Trajectory, TrajectoryGroup
from supervised.data import datum_from_tokens_weights
from tests.conftest import ROUNDING, gradients, policy_data, random_tokens, rounded

NEW = list(range(1000, 1050))  # above 256 each int is an object


class Talk(Env):
    """Each observation is all that was said, then NEW; or, with `rewrites`, not what was said before."""

    def __init__(self, turns: int, rewrites: bool = False):
        self.turns, self.rewrites, self.tokens = turns, rewrites, [*NEW]

    async def initial_observation(self) -> tuple[ModelInput, None]:
        return ModelInput.from_ints(self.tokens), None

    async def step(self, action: list[int]) -> StepResult:
        self.turns -= 1
        self.tokens = [*([self.turns] if self.rewrites else []), *self.tokens, *action, *NEW]
        return StepResult(1.0, not self.turns, ModelInput.from_ints(self.tokens))


class Speaker:
    async def __call__(self, ob: ModelInput, *_: Any) -> TokensWithLogprobs:
        return TokensWithLogprobs([token + ob.length for token in NEW], [-0.5] * len(NEW))


def talk(turns: int, rewrites: bool = False) -> Trajectory:
    return asyncio.run(do_single_rollout(Speaker(), Talk(turns, rewrites), (0,)))  # type: ignore[arg-type]


def group_of(trajectory: Trajectory) -> TrajectoryGroup:
    return TrajectoryGroup([trajectory], [0.0], [{}])


def bytes_of_talk(turns: int) -> int:
    tracemalloc.start()
    kept = talk(turns)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(kept.transitions) == turns
    return size


def test_an_episode_keeps_each_token_once() -> None:
    bytes_of_talk(1)  # what the first call alone takes
    assert bytes_of_talk(32) < 3 * bytes_of_talk(16)
    assert len(json.dumps(group_to_json(group_of(talk(32))))) < 2.5 * len(json.dumps(group_to_json(group_of(talk(16)))))


class NoGroup(EnvGroupBuilder):
    async def make_envs(self) -> list[Env]:
        return []


@pytest.mark.parametrize("rewrites", [False, True])
def test_saved_observations_are_whole_again(rewrites: bool) -> None:
    group = group_of(talk(4, rewrites))
    saved = json.loads(json.dumps(group_to_json(group)))
    older = json.loads(json.dumps(saved))  # with every observation whole, and no mark
    for turn, transition in zip(older["trajectories"][0]["turns"], group.trajectories_G[0].transitions, strict=True):
        turn["ob"] = transition.ob.to_ints()
        assert turn.pop("continues") == (not rewrites and transition.ob.length > len(NEW))
    for file in (saved, older):
        again = group_from_json(file, NoGroup())
        pairs = zip(again.trajectories_G[0].transitions, group.trajectories_G[0].transitions, strict=True)
        assert all(a.ob.to_ints() == b.ob.to_ints() and a.ac == b.ac for a, b in pairs)
        assert [row.tokens for row in rows_of([again])] == [row.tokens for row in rows_of([group])]
    assert len(rows_of([group])) == (4 if rewrites else 1)


def test_token_ids_of_kept_data_are_shared() -> None:
    first, second = (datum_from_tokens_weights(range(1000, 1010), [1.0] * 10).model_input for _ in range(2))
    assert first == ModelInput.from_ints(range(1000, 1009))
    assert all(type(a) is int and a is b for a, b in zip(first.to_ints(), second.to_ints(), strict=True))


def test_what_data_of_a_row_share_gets_its_logprobs_once() -> None:
    """A prompt's positions of weight 0, but for another target or temperature; and their gradients."""
    rng, trainer = np.random.default_rng(0), Trainer("tiny", BackendConfig(engine="torch"))
    prompt, data = random_tokens(rng, 30), []
    for member in range(6):
        tokens = prompt + random_tokens(rng, 4)
        target_T, temperature_T = np.array(tokens[1:]), np.full(len(tokens) - 1, 0.8, np.float32)
        target_T[7] = 5 if member in (2, 3) else target_T[7]
        temperature_T[9] = 1.5 if member == 4 else 0.8
        mask = (np.arange(len(target_T)) >= len(prompt) - 1).astype(np.float32)
        inputs = {"target_tokens": target_T, "weights": mask, "temperature": temperature_T}
        data.append(Datum(ModelInput.from_ints(tokens[:-1]), inputs))
    (batch,) = micro_batches(data, range(6), 1024, trainer.device, share=True)
    # data 3 is the row's first: four have another target than it, and one another temperature
    assert len(batch.others.datum_N) == 6 * 29 and len(batch.others.rows_M) == 29 + 4 + 1

    def of_all(data_D: list[Datum], logprobs_D: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return torch.cat(logprobs_D).square().sum(), {}

    found = trainer.run_custom(data, of_all).loss_fn_outputs
    gradients_of_row = gradients(trainer)
    trainer.zero_grad()
    for datum, output in zip(data, found, strict=True):
        alone = trainer.run_custom([datum], of_all).loss_fn_outputs[0]
        assert np.allclose(output["logprobs"].array, alone["logprobs"].array, atol=rounded(5e-6))
    for name, gradient in gradients(trainer).items():
        assert (gradients_of_row[name] - gradient).norm() <= ROUNDING * gradient.norm(), name


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_a_loop_that_reads_losses_alone_computes_no_other_logprobs(
    lora: LoraConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []

    def counting(hidden_NH: torch.Tensor, *rest: Any) -> torch.Tensor:
        computed.append(len(hidden_NH))
        return target_logprobs(hidden_NH, *rest)

    trainer, data = Trainer("tiny", BackendConfig(engine="torch"), lora=lora), policy_data(6)
    data[2].loss_fn_inputs["mask"].array[:] = 0  # nothing of it is computed
    mask_N = np.concatenate([datum.loss_fn_inputs["mask"].array for datum in data]) > 0
    monkeypatch.setattr("posttrain.backend.trainer.target_logprobs", counting)
    results = []
    for wanted in (True, False):
        computed.clear()
        output = trainer.run(data, "importance_sampling", all_logprobs=wanted)
        assert sum(computed) == (len(mask_N) if wanted else mask_N.sum())
        results.append((output.metrics, gradients(trainer), output.loss_fn_outputs))
        trainer.zero_grad()
    (metrics, gradient, outputs), (metrics_alone, gradient_alone, outputs_alone) = results
    assert metrics == metrics_alone
    assert all(torch.equal(gradient[name], gradient_alone[name]) for name in gradient)
    all_N, alone_N = (np.concatenate([o["logprobs"].array for o in fields]) for fields in (outputs, outputs_alone))
    assert np.isnan(alone_N[~mask_N]).all() and np.array_equal(alone_N[mask_N], all_N[mask_N])


def test_a_long_preparation_counts_what_it_has_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(counted("abc", "reading")) == ["a", "b", "c"]
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    assert list(counted(range(3), "reading")) == [0, 1, 2]
    assert capsys.readouterr().out.splitlines()[-1] == "reading: 2 of 3, ETA 0s"


# Trap: with too few spans kept, a step of many rollouts seems idle.
def test_the_shares_of_a_step_count_all_its_rollouts() -> None:
    timeline, rollouts = Timeline(), 50_000
    for start in np.linspace(0, 9, rollouts):
        timeline.spans._closed.append(Span("sampling", float(start), float(start) + 1))
    shares = timeline.shares(0, 10)
    assert shares["sampling"] == pytest.approx(1) and shares["idle"] == pytest.approx(0)
    assert shares["rollouts_in_flight"] == pytest.approx(rollouts / 10)


# Trap: asyncio.wait looks at every group for each that finishes: 8 s of the event loop in a step of 4,096 groups.
def test_a_step_asks_each_of_its_groups_once_for_its_end() -> None:
    asked: list[int] = []

    class Counted(asyncio.Future[TrajectoryGroup]):
        def add_done_callback(self, *args: Any, **keywords: Any) -> None:
            asked.append(1)
            super().add_done_callback(*args, **keywords)

    async def body() -> None:
        source = GroupSource([], 1, 1, num_minibatches=4)  # type: ignore[arg-type]
        groups = {p: Counted() for p in range(40)}
        source._groups[0] = {**groups}

        order, parts = np.random.default_rng(0).permutation(40).reshape(4, 10), source.minibatches(0)
        for finished in order.tolist():  # a part is there once its last group is, and not before
            part = asyncio.ensure_future(anext(parts))
            for p in finished:
                await asyncio.sleep(0.001)
                assert not part.done()
                groups[p].set_result(TrajectoryGroup([], [], [], tags=[str(p)]))
            assert [int(group.tags[0]) for group in await part] == sorted(finished)
        assert await anext(parts, None) is None and not source._groups

    asyncio.run(asyncio.wait_for(body(), 60))  # a part that never comes
    assert len(asked) == 40


# Trap: all records of a long run at once, gigabytes where it has a million steps.
def test_a_resume_and_a_plot_of_a_long_run_take_little_memory(tmp_path: Path) -> None:
    steps, run = 20_000, RunFolder(tmp_path)
    numbers = json.dumps({f"metric/{i}": i / 7 for i in range(40)})[1:]
    lines = [f'{{"step": {step}, "optim/loss": {step / 3}, {numbers}\n' for step in range(steps)]
    run.metrics_file.write_text("".join(lines))
    peaks, kept = [], {"step", "optim/loss"}
    tracemalloc.start()
    run.truncate_metrics(steps - 1)
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.reset_peak()
    records = plots._records(tmp_path, ["optim/loss", "optim/lr"])
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert run.metrics_file.read_text() == "".join(lines[:-1])
    assert len(records) == steps - 1 and all(record.keys() == kept for record in records)
    assert peaks[0] < 1e6 and peaks[1] < 500 * steps  # each of the whole records has 4,000


def test_a_page_of_long_rollouts_has_fewer_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcripts, "PAGE_TOKENS", 25)
    for length, shown in ((1, 4), (10, 3), (30, 1)):
        groups = [TranscriptGroup([TranscriptMember([TranscriptTurn("ask", ["t"] * length)], 1.0)]) for _ in range(4)]
        page = write_transcripts(tmp_path, length, groups)
        assert page.read_text().count('class="group"') == shown
        assert (f"the first {shown} groups are shown" in page.read_text()) == (shown < 4)
        assert len(page.with_suffix(".jsonl").read_text().splitlines()) == 4


# Trap: the time of a step that grows with the steps before it.
def test_a_timeline_keeps_the_spans_of_its_last_steps() -> None:
    timeline = Timeline()
    for step in range(50):
        timeline.spans._closed.extend(Span("sampling", 10.0 * step, 10.0 * step + 9) for _ in range(100))
        shares = timeline.metrics(10.0 * step, 10.0 * step + 10)
        assert shares["time/share/sampling"] == pytest.approx(0.9)
    assert len(timeline.spans._closed) == 300


# Trap: over a vocabulary of 256,000, 4096 positions were 30 GB of a prompt's distributions.
def test_distributions_of_a_prompt_are_bounded_by_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(block.stop - block.start for block in prompt_scores.blocks(32_000, 256_000)) * 256_000 <= 2**26
    assert [*prompt_scores.blocks(5000, 260)] == [slice(0, 4096), slice(4096, 5000)]
    logprobs_TV = torch.randn(50, 11, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    targets_TK = np.arange(100).reshape(50, 2) % 11

    def scored(targets_TK: np.ndarray | None, draws: int, temperature: float = 0.7) -> prompt_scores.ScoredPrompt:
        wanted = prompt_scores.PromptScores(targets_TK, draws, temperature, seed=4)
        return prompt_scores.score_prompt(wanted, 50, 11, logprobs_TV.__getitem__)

    at_once = scored(targets_TK, 3)
    monkeypatch.setattr(prompt_scores, "ELEMENTS", 7 * 11)
    assert scored(targets_TK, 3) == at_once
    assert scored(targets_TK, 0) == prompt_scores.ScoredPrompt(target_logprobs=at_once.target_logprobs)
    assert scored(None, 3) == prompt_scores.ScoredPrompt(alt_tokens=at_once.alt_tokens)
    greedy = scored(None, 2, temperature=0.0).alt_tokens
    assert greedy is not None and not greedy.logprobs.array.any()
    assert greedy.tokens.array.tolist() == [[best, best] for best in logprobs_TV.argmax(-1).tolist()]


def test_what_a_prompt_is_asked_for_is_bounded_by_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_scores, "MOST_SCORES", 6)
    for targets in (None, TensorData([[8, -1]] * 3), TensorData([[8]] * 3), TensorData(np.zeros((3, 0), np.int64))):
        prompt_scores.check_scores(4, 9, targets, draws=1)
    with pytest.raises(RangeError, match="prompt_alt_tokens_k"):
        prompt_scores.check_scores(4, 9, None, draws=2)
    with pytest.raises(DataError, match="asks for 9 logprobs: at most 6"):
        prompt_scores.check_scores(4, 9, TensorData([[8, -1, 0]] * 3), draws=0)
    assert [*prompt_scores.blocks(2, 2**27)] == [slice(0, 1), slice(1, 2)]  # a distribution is never cut
