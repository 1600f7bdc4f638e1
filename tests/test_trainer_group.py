"""Training clients over two processes that Ray starts: the numbers of one process, one group for all
clients, the same errors, and a death that everybody hears of and that leaves nothing.
"""

# Trap: calls that reach the ranks in different orders; a lost rank that its peers wait for.

import os
import signal
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError, DataError, TrainerLostError
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams
from tests.commands import Command
from tests.conftest import policy_data, rounded
from tests.processes import actors, descendants, runs, wait_until
from tests.test_scalar_model import bce, scalar_data

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.usefixtures("cluster"),
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"),
]
SETTINGS = BackendConfig(engine="torch", micro_batch_tokens=60, trainer_processes=2)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    with ServiceClient(SETTINGS, tmp_path_factory.mktemp("two")) as service:
        yield service


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[ServiceClient]:
    with ServiceClient(BackendConfig(engine="torch", micro_batch_tokens=60), tmp_path) as service:
        yield service


def square(data: list[Datum], p_D: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    return torch.stack([p.square().mean() for p in p_D]).sum(), {}


def trained(client: TrainingClient) -> list[float]:
    """Numbers of two steps, a custom loss among them."""
    numbers = []
    for step, client_pass in enumerate(
        (lambda: client.forward_backward(policy_data(7), "ppo"), lambda: client.forward_backward_custom(policy_data(3), square))
    ):  # fmt: skip
        passed, stepped = client_pass(), client.optim_step(AdamParams(1e-4 * step))
        numbers += [passed.result().metrics["loss:sum"], stepped.result().metrics["grad_norm"]]
    output = client.forward(policy_data(5, seed=1), "ppo").result()
    return numbers + [output.metrics["ratio:mean"], float(output.loss_fn_outputs[3]["logprobs"].array.sum())]


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_clients_over_two_processes_train_and_sample_as_over_one(
    service: ServiceClient, alone: ServiceClient, lora: LoraConfig | None
) -> None:
    client, expected = (s.create_training_client("tiny", lora) for s in (service, alone))
    assert trained(client) == pytest.approx(trained(expected), rel=rounded(1e-4))
    wait_until(lambda: len(actors("TrainerRank")) == 2)  # those of another test may still be ending
    samples = [
        c.save_weights_and_get_sampling_client()
        .sample(ModelInput.from_ints([5, 6, 7]), 1, SamplingParams(max_tokens=9, seed=2))
        .result()
        .sequences[0]
        for c in (client, expected)
    ]
    assert samples[0].tokens == samples[1].tokens
    assert samples[0].logprobs == pytest.approx(samples[1].logprobs, abs=rounded(1e-4))
    saved = client.save_state("two").result().path
    expected.load_state_with_optimizer(saved).result()
    assert [c.forward(policy_data(4), "ppo").result().metrics["loss:sum"] for c in (client, expected)] == (
        pytest.approx([client.forward(policy_data(4), "ppo").result().metrics["loss:sum"]] * 2, rel=rounded(1e-5))
    )


def test_a_snapshot_keeps_its_weights(service: ServiceClient) -> None:
    client = service.create_training_client("tiny")
    snapshot, prompt = client.save_weights_and_get_sampling_client(), ModelInput.from_ints([5, 6, 7, 8])
    before = snapshot.compute_logprobs(prompt).result()
    client.forward_backward(policy_data(7), "importance_sampling")
    client.optim_step(AdamParams(1e-2)).result()
    after = client.save_weights_and_get_sampling_client().compute_logprobs(prompt).result()
    assert snapshot.compute_logprobs(prompt).result() == before != after


def test_scalar_models_and_errors(service: ServiceClient, alone: ServiceClient) -> None:
    clients = [s.create_scalar_client("tiny") for s in (service, alone)]
    for client in clients:
        client.forward_backward(scalar_data(6), bce)
        client.optim_step(AdamParams(1e-2)).result()
    outputs = [client.forward(scalar_data(4, seed=1), bce).result() for client in clients]
    assert outputs[0].metrics == pytest.approx(outputs[1].metrics, rel=1e-3)
    texts = []
    for client in [s.create_training_client("tiny") for s in (service, alone)]:
        bad = policy_data(3)
        bad[1] = Datum(bad[1].model_input, {"target_tokens": bad[1].loss_fn_inputs["target_tokens"]})
        with pytest.raises(DataError) as error:
            client.forward_backward(bad, "ppo").result()
        texts.append(str(error.value))
        with pytest.raises(DataError):
            client.optim_step(AdamParams(1e-3)).result()
        with pytest.raises(DataError):
            client.forward_backward_custom(policy_data(3), lambda data, p_D: (torch.zeros(()), {})).result()
        client.optim_step(AdamParams(1e-3)).exception()
    assert texts[0] == texts[1]
    with pytest.raises(ConfigError, match="cannot be sent to the training processes"):
        lock = threading.Lock()
        clients[0].forward(scalar_data(2), lambda p, inputs: (p + bool(lock), {})).result()


def test_clients_of_several_threads_share_the_ranks(service: ServiceClient) -> None:
    """Their calls interleave, in the same order in both ranks."""
    clients = [service.create_training_client("micro", seed=seed) for seed in range(3)]
    futures = [client.forward_backward(policy_data(3, seed=k), "ppo") for k in range(6) for client in clients]
    wait_until(lambda: len(actors("TrainerRank")) == 2)
    assert all(future.result().metrics["num_loss_tokens:sum"] for future in futures)


def test_a_dead_rank_ends_all_and_everybody_hears_of_it(tmp_path: Path) -> None:
    before = set(actors("TrainerRank"))
    with ServiceClient(SETTINGS, tmp_path) as service:
        clients = [service.create_training_client("tiny") for _ in range(2)]
        futures = [client.forward_backward(policy_data(60), "ppo") for _ in range(20) for client in clients]
        pids = set(actors("TrainerRank")) - before
        assert len(pids) == 2
        futures[0].result()
        os.kill(max(pids), signal.SIGKILL)
        killed = time.monotonic()
        errors = [future.exception() for future in futures]
        print(f"known after {time.monotonic() - killed:.1f} s")
        assert isinstance(errors[-1], TrainerLostError) and isinstance(errors[-2], TrainerLostError)
        assert all(error is None or isinstance(error, TrainerLostError) for error in errors)
        with pytest.raises(TrainerLostError, match="has died.*resume the run"):
            clients[0].optim_step(AdamParams(1e-3)).result()
        wait_until(lambda: not any(runs(pid) for pid in pids))


def command(folder: Path, steps: int, *options: str, kills: tuple[str, str, int] | None = None) -> Command:
    """A supervised run in two ranks."""
    run = [f"dataset.n_batches={steps}", "dataset.batch_size=4", f"log_path={folder}", "eval_every=0", *options]
    backend = ["model_name=micro", "backend.engine=torch", "backend.trainer_processes=2"]
    return Command("-m", "supervised.train_cli", "dataset=arithmetic", *run, *backend, kills=kills)


def steps_of(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def test_a_run_goes_on_from_its_checkpoint_when_a_rank_dies(tmp_path: Path) -> None:
    """In the same command, to the bits of a run in which none died."""
    whole = command(tmp_path / "whole", 24)
    options, kills = ("save_every=4", "backend.trainer_restarts=1"), ("TrainerRank", "metrics.jsonl", 12)
    killed = command(tmp_path / "killed", 24, *options, kills=kills)
    for run in (whole, killed):
        assert run.wait() == 0, run.output()[-2000:]
    assert "0 more allowed (backend.trainer_restarts)" in killed.output() and "has died" in killed.output()
    weights = [tmp_path / name / "checkpoints/final/model.safetensors" for name in ("whole", "killed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert steps_of(tmp_path / "killed") == 24


def test_two_runs_beside_each_other_are_independent(tmp_path: Path) -> None:
    """Two commands on one machine, started together; one is killed, the other goes on until it is told to stop."""
    both = [tmp_path / name for name in ("killed", "other")]
    killed, other = (command(folder, 100_000) for folder in both)
    wait_until(lambda: min(map(steps_of, both)) > 3 or killed.poll() is not None or other.poll() is not None, 500)
    family = descendants(killed.pid)
    assert other.poll() is None and len(actors("TrainerRank", killed.pid)) == 2
    killed.kill()
    killed.wait()
    before = steps_of(tmp_path / "other")
    wait_until(lambda: steps_of(tmp_path / "other") > before + 20 or other.poll() is not None)
    other.send_signal(signal.SIGTERM)
    assert other.wait() == 130, other.output()[-2000:]
    assert "its state is saved" in other.output() and steps_of(tmp_path / "other") > before + 20
    wait_until(lambda: not any(runs(pid) for pid in family))
