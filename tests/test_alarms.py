"""Every fault between sampler and trainer, made on purpose, ends the run at its start or within one
step; healthy runs raise no alarm.
"""

# Trap: weights, temperature, cached prefixes, masks or tokens that go wrong in a run.

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import posttrain.backend.trainer
import supervised.train
from envs.arithmetic import ArithmeticExamplesBuilder
from posttrain.backend.alarms import PROBE_SAMPLES, PROBE_TOKENS, Alarms, Gap, example_sequences, sampler_gaps
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import LogprobGapError, NonFiniteError
from posttrain.backend.routing import Router
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.torch_sampler import TorchSampler
from posttrain.backend.trainer import Trainer
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import (
    ForwardBackwardOutput,
    GetInfoResponse,
    ModelInput,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    TensorData,
)
from posttrain.tracking.command_line import run_command
from preference import train_dpo
from recipes.dpo.letters import SortedPreferredBuilder
from rl import train
from rl.group_sources import GroupSource
from rl.kl import KLPenalty
from rl.mismatch import MismatchCorrection
from tests.conftest import random_tokens, rounded
from tests.test_group_sources import LowTokenBuilder, config, metrics
from tests.test_sampling import train_a_little

MODES: dict[str, dict[str, Any]] = {
    "synchronous": {},
    "streaming": {"num_minibatches": 2},
    "asynchronous": {"max_steps_off_policy": 2},
    "substeps": {"num_substeps": 2},
}
Sabotage = Callable[[pytest.MonkeyPatch], None]


def wrapped(patch: pytest.MonkeyPatch, owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Puts `around(original, *args)` in the place of `owner.name`."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args: around(original, *args))


def stale_weights(patch: pytest.MonkeyPatch) -> None:
    """From the first step on, syncs do nothing."""
    patch.setattr(TorchSampler, "load_weights", lambda self, new: None)


def one_weight_not_sent(patch: pytest.MonkeyPatch) -> None:
    def without(load: Any, self: Any, new: Any) -> None:
        load(self, ((name, tensor) for name, tensor in new if "layers.1.mlp.up_proj" not in name))

    wrapped(patch, TorchSampler, "load_weights", without)


def wrong_temperature(patch: pytest.MonkeyPatch) -> None:
    def hotter(add: Any, self: Any, request: Any) -> None:
        request.params = replace(request.params, temperature=request.params.temperature * 1.1)
        add(self, request)

    wrapped(patch, TorchSampler, "add", hotter)


def shifted_logprobs(patch: pytest.MonkeyPatch) -> None:
    def shifted(step: Any, self: Any) -> Any:
        finished = step(self)
        for _, sampled in finished:
            sampled.sequence.logprobs[:] = [*sampled.sequence.logprobs[1:], sampled.sequence.logprobs[0]]
        return finished

    wrapped(patch, TorchSampler, "step", shifted)


def trainer_ignores_temperature(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("posttrain.backend.batching._temperatures", lambda data_D: None)


def members_of_a_row_see_each_other(patch: pytest.MonkeyPatch) -> None:
    """And the trainer, which looks for that when it is opened, sees nothing."""

    def causal(mask: Any, ends_BT: Any, *rest: Any) -> Any:
        return mask(ends_BT.new_full(ends_BT.shape, ends_BT.shape[1]), *rest)

    for mask in ("dense_mask", "tree_mask"):  # the second, and whole sequences without a mask, on a GPU
        wrapped(patch, posttrain.backend.trainer, mask, causal)
    patch.setattr(Trainer, "whole_sequences", property(lambda trainer: False, lambda trainer, _: None), raising=False)
    patch.setattr("posttrain.backend.trainer.check_rows", lambda trainer: None)
    patch.setattr("posttrain.backend.model_checks.row_gap", lambda *_: 0.0)  # of packed rows


AT_START = [
    one_weight_not_sent,
    wrong_temperature,
    shifted_logprobs,
    trainer_ignores_temperature,
    members_of_a_row_see_each_other,
]


def run(folder: Path, **settings: Any) -> None:
    asyncio.run(train.main(config(folder, temperature=0.8, **settings)))


# The comparison at the start precedes what the modes do differently.
@pytest.mark.parametrize(
    ("mode", "sabotage"),
    [*(("synchronous", fault) for fault in AT_START), ("asynchronous", wrong_temperature)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_faults_are_found_before_the_first_step(
    mode: str, sabotage: Sabotage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch)
    with pytest.raises(
        LogprobGapError, match="comparison at the start: .*differ by .*Likely causes.*backend.alarm=warn"
    ):
        run(tmp_path, **MODES[mode])
    assert not (tmp_path / "checkpoints" / "final").exists()


@pytest.mark.parametrize(
    ("mode", "sabotage"),
    [
        *(("synchronous", fault) for fault in [stale_weights, *AT_START]),
        *((mode, fault) for mode in MODES if mode != "synchronous" for fault in (stale_weights, wrong_temperature)),
        ("asynchronous", shifted_logprobs),  # where no later rollout is on-policy
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_faults_that_begin_with_the_first_step_end_it(
    mode: str, sabotage: Sabotage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a healthy start, at the learning rate of a real run; a checkpoint is due after every
    step, and none is written.
    """

    def armed(set_policy: Any, self: GroupSource, step: int, client: Any) -> None:
        if step == 0:
            sabotage(monkeypatch)
        set_policy(self, step, client)

    wrapped(monkeypatch, GroupSource, "set_policy", armed)
    with pytest.raises(LogprobGapError, match="step 0: "):
        run(tmp_path, save_every=1, learning_rate=3e-4, **MODES[mode])
    assert not list((tmp_path / "checkpoints").glob("*"))
    (record,) = metrics(tmp_path)
    assert record["alarms/total"] >= 1


@pytest.mark.parametrize(
    ("module", "dataset"),
    [(supervised.train, ArithmeticExamplesBuilder(batch_size=8)), (train_dpo, SortedPreferredBuilder())],
    ids=["sft", "dpo"],
)
def test_runs_without_a_sampler_compare_a_batch_with_its_sequences_alone(
    module: Any, dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step, and before DPO computes its reference."""

    def settings(folder: str) -> Any:
        backend = BackendConfig(engine="torch")
        return module.Config(
            dataset=dataset, log_path=str(tmp_path / folder), max_steps=1, eval_every=0, backend=backend
        )

    asyncio.run(module.main(settings("healthy")))
    assert metrics(tmp_path / "healthy")[0]["alarms/total"] == 0
    members_of_a_row_see_each_other(monkeypatch)
    with pytest.raises(LogprobGapError, match="comparison at the start: logprobs in a batch and alone differ"):
        asyncio.run(module.main(settings("broken")))
    assert not (tmp_path / "broken" / "reference_logprobs.jsonl").exists()


def test_a_prefix_cache_that_is_not_dropped_is_found_at_the_first_sync(
    vllm_client: TrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM keeps blocks of 128 tokens on a CPU. A prompt's own logprobs are computed without the
    cache, so only sampling shows it.
    """
    tokens = random_tokens(np.random.default_rng(5), 160)
    engine = vllm_client.save_weights_and_get_sampling_client()._engine._engine._engine  # type: ignore[attr-defined]

    def gaps_after_a_step() -> tuple[Gap, Gap]:
        train_a_little(vllm_client, 1)
        sampler = vllm_client.save_weights_and_get_sampling_client()
        # as a rollout would
        sampler.sample(ModelInput.from_ints(tokens[:150]), 1, SamplingParams(max_tokens=1, seed=0)).result()
        return asyncio.run(sampler_gaps(vllm_client, sampler, tokens, 150, 0.8, PROBE_SAMPLES, PROBE_TOKENS, True))

    healthy = gaps_after_a_step()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "reset_prefix_cache", lambda **_: True)
        whole, sampled = gaps_after_a_step()
    again = gaps_after_a_step()
    assert sampled.mean > 0.01 and whole.mean < 1e-4
    assert max(gap.mean for gap in (*healthy, *again)) < rounded(1e-4)


@pytest.mark.parametrize("stale", [None, 0, 2])
def test_the_probe_asks_each_replica(stale: int | None) -> None:
    """One of three has other weights; the trainer's logprobs are all 0."""

    class Replicas:
        num_replicas, router = 3, Router(3, deterministic=True)

        def logprob(self, prompt: ModelInput) -> float:
            return -0.5 if self.router.open(self.router.group_of(prompt.to_ints()), 1, range(3)) == stale else 0.0

        async def compute_logprobs_async(self, prompt: ModelInput) -> list[float | None]:
            return [None, *[self.logprob(prompt)] * (prompt.length - 1)]

        async def sample_async(self, prompt: ModelInput, count: int, params: SamplingParams) -> SampleResponse:
            logprob = self.logprob(prompt)
            return SampleResponse([SampledSequence([7 - int(logprob)], [logprob], "stop")] * count, None, None)

    class Client:
        async def forward(self, data_D: Any, loss_fn: Any) -> ForwardBackwardOutput:
            zeros_D = [TensorData(np.zeros(datum.model_input.length, np.float32)) for datum in data_D]
            return ForwardBackwardOutput([{"logprobs": zeros_T} for zeros_T in zeros_D], {})

    client: Any = Client()
    gaps = asyncio.run(sampler_gaps(client, Replicas(), [1, 5, 6, 7], 2, 1.0, 2, 1))  # type: ignore[arg-type]
    for gap in gaps:
        assert (gap.mean, gap.largest) == ((0, 0) if stale is None else (pytest.approx(0.5 / 3), 0.5))


def test_weights_that_a_step_made_infinite_are_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not as a gap between sampler and trainer, which they are too. Nothing is saved but the
    data.
    """

    def overflowing(optim_step: Any, self: Trainer, adam: Any) -> Any:
        response = optim_step(self, adam)
        with torch.no_grad():
            next(iter(self.named_trainable.values())).mul_(float("inf"))
        return response

    wrapped(monkeypatch, Trainer, "optim_step", overflowing)
    with pytest.raises(NonFiniteError, match="tensors are not finite.*The data are in"):
        run(tmp_path, save_every=1)
    assert list(tmp_path.glob("nonfinite_*.jsonl")) and not list((tmp_path / "checkpoints").glob("*"))


def test_a_warning_lets_the_run_go_on_and_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong_temperature(monkeypatch)
    run(tmp_path, env=LowTokenBuilder(n_batches=2), backend=BackendConfig(engine="torch", alarm="warn"))
    said = capsys.readouterr().out
    assert "WARNING comparison at the start" in said and "WARNING step 1" in said
    last = metrics(tmp_path)[-1]
    assert last["alarms/total"] == last["alarms/sampled"] + last["alarms/rollouts"] == 5
    assert (tmp_path / "checkpoints" / "final").exists() and "alarms/total" in said


def test_a_run_that_an_alarm_stopped_exits_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong_temperature(monkeypatch)
    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(SystemExit) as ended:
        run_command(lambda _: run(tmp_path), BackendConfig)
    assert ended.value.code == 2 and "another temperature" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [
        *MODES.values(),
        {"lora_rank": 4, "max_steps_off_policy": 1},
        {"kl": KLPenalty(coef=0.1), "mismatch": MismatchCorrection(mode="truncate"), "num_substeps": 2},
    ],
    ids=str,
)
def test_healthy_runs_raise_no_alarm(settings: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path, env=LowTokenBuilder(n_batches=4), **settings)
    records = metrics(tmp_path)
    assert len(records) == 4 and all(record["alarms/total"] == 0 for record in records)
    gaps = [value for record in records for name, value in record.items() if name in GAPS]
    assert max(gaps) < rounded(1e-5)
    on_policy = [record["progress/batch"] for record in records if "optim/on_policy_logprob_gap" in record]
    assert on_policy == ([0] if settings.get("max_steps_off_policy") else [0, 1, 2, 3])


GAPS = ("optim/on_policy_logprob_gap", "optim/probe_logprob_gap", "optim/probe_sampled_gap")


@pytest.mark.parametrize(
    ("device", "dtype", "gap", "rings"),
    [
        ("cpu", "float32", Gap(9e-4, 0.01), False),
        ("cpu", "float32", Gap(2e-3, 0.01), True),
        ("cpu", "float32", Gap(1e-4, 0.1), True),  # one sequence of many
        ("cpu", "float32", Gap(float("nan"), 0.0), True),
        ("cuda:0", "float32", Gap(5e-3, 0.1), False),
        ("cuda:0", "bfloat16", Gap(0.03, 0.8), False),
        ("cuda:0", "bfloat16", Gap(0.06, 0.8), True),
    ],
)
def test_limits_are_those_of_the_device_and_its_dtype(device: str, dtype: str, gap: Gap, rings: bool) -> None:
    alarms = Alarms(GetInfoResponse("m", 0, 1, 1, 512, device, dtype), "stop")
    alarms.compare("sampler", gap, "two numbers", "none")
    assert alarms.metrics()["alarms/total"] == float(rings)
    if rings:
        with pytest.raises(LogprobGapError, match="step 7: two numbers differ"):
            alarms.decide("step 7")
    alarms.decide("step 8")


def test_rounding_grows_as_the_temperature_falls() -> None:
    alarms = Alarms(GetInfoResponse("m", 0, 1, 1, 512, "cuda:0", "bfloat16"), "stop")
    for temperature in (0.7, 0.5):
        alarms.compare("sampled", Gap(0.06, 0.8), "two numbers", "none", temperature)
    alarms.decide("a limit of 0.05 / temperature")
    for temperature in (1.0, 2.0):
        alarms.compare("sampled", Gap(0.06, 0.8), "two numbers", "none", temperature)
        with pytest.raises(LogprobGapError, match="rounding explains 0.05"):
            alarms.decide("and no less than 0.05")


def test_the_gap_by_hand() -> None:
    gap = Gap.between([np.array([-1.0, -2.0]), np.array([-3.0])], [np.array([-1.5, -2.0]), np.array([-2.0])])
    assert (gap.mean, gap.largest) == (0.5, 1.0) and Gap.between([], []) == Gap(0.0, 0.0)


# Trap: transformers warned of "indexing errors" in a run of a short context, of a text that is cut before it is read.
def test_the_text_of_the_check_at_the_start_is_no_warning_of_a_short_context(tmp_path: Path) -> None:
    with ServiceClient(BackendConfig(engine="torch", max_length=64), tmp_path) as service:
        client = service.create_training_client("micro")
        assert max(map(len, example_sequences(client))) < 64
        assert "sequence-length-is-longer-than-the-specified-maximum" not in client.get_tokenizer().deprecation_warnings
