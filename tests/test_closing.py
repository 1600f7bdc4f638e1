"""Clients, engines and processes that end, with calls in flight: an engine goes with its last client."""

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from envs.twenty_questions import TwentyQuestionsBuilder
from posttrain.backend import engines as engines_module
from posttrain.backend.config import BackendConfig
from posttrain.backend.engine import EngineThread
from posttrain.backend.errors import ClosedError, EngineError
from posttrain.backend.futures import InOrder
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer as load
from posttrain.backend.types import Datum
from rl import train
from rl.frozen_policy import FrozenPolicy
from rl.rollouts import RolloutLimits
from tests.calls_in_flight import LONG, PASSES, STEP
from tests.conftest import ROOT, policy_data, prompt_of
from tests.processes import PATIENCE, wait_until


def engines() -> set[threading.Thread]:
    gc.collect()
    return {thread for thread in threading.enumerate() if thread.name == "sampling-engine"}


@pytest.fixture
def new_engines() -> Callable[[], int]:
    """The number of engines opened since the test began and still there; engines of earlier tests
    may be ending meanwhile.
    """
    before = engines()
    return lambda: len(engines() - before)


def test_an_engine_goes_with_its_last_client(torch_service: ServiceClient, new_engines: Callable[[], int]) -> None:
    frozen = torch_service.create_sampling_client(base_model="micro")
    with torch_service.create_sampling_client(base_model="micro") as closed:
        thread: Any = closed._engine
        step = thread._engine.step
        thread._engine.step = lambda: (wait_until(lambda: thread._closing), step())[1]
        running = closed.sample(prompt_of(5), 40, LONG)
    assert isinstance(running.exception(PATIENCE), EngineError) and new_engines() == 1
    with pytest.raises(ClosedError):
        closed.sample(prompt_of(5), 1, LONG)
    training = torch_service.create_training_client("micro")
    live = training.save_weights_and_get_sampling_client()
    del training
    assert len(live.sample(prompt_of(5), 1, LONG).result(PATIENCE).sequences) == 1 and new_engines() == 2
    last = live.sample(prompt_of(5), 1, LONG)
    del live, frozen
    assert len(last.result(PATIENCE).sequences[0].tokens) == 100, "a call in flight holds its engine"
    wait_until(lambda: new_engines() == 0)
    for _ in range(3):
        service = ServiceClient(BackendConfig(engine="torch"))
        assert service.create_sampling_client(base_model="micro").sample(prompt_of(5), 1, LONG).result(PATIENCE)
    wait_until(lambda: new_engines() == 0)


# Trap: seconds for a vocabulary of 130,000, for each of a run's models and each model of a server.
def test_clients_of_one_model_share_its_tokenizer(
    torch_service: ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(
        engines_module, "load_tokenizer", lambda name, length: (read.append(name), load(name, length))[1]
    )
    first = torch_service.create_training_client("micro")
    second, frozen = torch_service.create_training_client("micro"), torch_service.create_sampling_client(None, "micro")
    assert first.get_tokenizer() is second.get_tokenizer() is frozen.get_tokenizer() and read == ["micro"]


def test_the_engine_of_a_frozen_policy_goes_with_the_run_that_asked_it(
    tmp_path: Path, new_engines: Callable[[], int]
) -> None:
    answerer = FrozenPolicy(
        base_model="micro", renderer_name="plain", max_tokens=3, backend=BackendConfig(engine="torch")
    )
    completer = answerer.open_completer()
    assert new_engines() == 1
    del completer
    wait_until(lambda: new_engines() == 0)
    env = TwentyQuestionsBuilder(answerer=answerer, batch_size=1, group_size=2, n_batches=1)
    config = train.Config(
        env=env,
        model_name="micro",
        renderer_name="plain",
        max_tokens=2,
        eval_every=0,
        log_path=str(tmp_path / "run"),
        limits=RolloutLimits(max_failed_fraction=1.0),
        backend=BackendConfig(engine="torch"),
    )
    asyncio.run(train.main(config))
    del config, env
    wait_until(lambda: new_engines() == 0)


def test_opening_a_client_that_is_cancelled_or_fails_leaves_no_engine(
    torch_service: ServiceClient, new_engines: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cancelled() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1e-3):
                await torch_service.create_sampling_client_async(base_model="micro")

    asyncio.run(cancelled())
    wait_until(lambda: new_engines() == 0)
    monkeypatch.setattr(
        "posttrain.backend.torch_sampler.TorchSampler.load_weights", lambda self, weights: {}["missing"]
    )
    with pytest.raises(KeyError):
        torch_service.create_sampling_client(base_model="micro")
    wait_until(lambda: new_engines() == 0)


def test_closing_fails_what_waits_and_refuses_what_comes(torch_service: ServiceClient) -> None:
    client = torch_service.create_training_client("micro")
    began = threading.Event()
    client._thread.submit(lambda: (began.set(), wait_until(lambda: client._thread._closed)))
    waiting = [PASSES["forward_backward"](client, 0), client.save_state("never")]
    assert began.wait(PATIENCE)
    client.close()
    for future in waiting:
        assert isinstance(future.exception(PATIENCE), ClosedError)
    with pytest.raises(ClosedError):
        client.optim_step(STEP)

    thread = InOrder("test")
    inner: list[BaseException | None] = []

    def waits_for_its_own_thread() -> None:
        inner.append(pytest.raises(RuntimeError, thread.submit(int).result).value)
        thread.close()

    thread.submit(waits_for_its_own_thread).result(PATIENCE)
    assert isinstance(inner[0], RuntimeError)


def test_an_interrupted_start_leaves_no_engine(new_engines: Callable[[], int]) -> None:
    def fails() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EngineThread(fails, deterministic=True)  # type: ignore[arg-type]
    wait_until(lambda: new_engines() == 0)


SCRIPT = """
import asyncio
import posttrain.backend as tinker
from posttrain.backend.config import BackendConfig
service = tinker.ServiceClient(BackendConfig(engine="torch"))
client = service.create_training_client("micro")
sampler = client.save_weights_and_get_sampling_client()
prompt, params = tinker.ModelInput.from_ints([5, 6, 7]), tinker.SamplingParams(max_tokens=400, stop=[])
async def main():
    async with asyncio.timeout(0.2):
        await asyncio.gather(*(sampler.sample_async(prompt, 8, params) for _ in range(50)))
try:
    asyncio.run(main())
except TimeoutError:
    print("gave up")
left = [sampler.sample(prompt, 8, params) for _ in range(50)]
frozen = service.create_sampling_client(base_model="micro")
left.append(frozen.sample(prompt, 8, params))
left.append(client.save_state("left"))
"""


def test_a_process_ends_cleanly_with_calls_in_flight(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "gave up\n", "")
    assert (tmp_path / "checkpoints" / "left").is_dir(), "a call that was accepted is carried out"


def test_ctrl_c_ends_processes_before_it_waits_for_their_calls(tmp_path: Path) -> None:
    """A rank that stands still never answers: the second and the third Ctrl-C hung."""
    killed = threading.Event()
    ranks: Any = SimpleNamespace(kill=killed.set)
    cluster: Any = SimpleNamespace(close=lambda: None)

    def until_killed(data_D: Sequence[Datum], p_D: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return p_D[0].sum(), {"killed": float(killed.wait(PATIENCE))}

    with pytest.raises(KeyboardInterrupt), ServiceClient(BackendConfig(engine="torch"), tmp_path) as service:
        service._cluster, service._ranks = cluster, ranks
        client = service.create_training_client("micro")
        call = client.forward_backward_custom(policy_data(1), until_killed)
        raise KeyboardInterrupt
    assert call.result().metrics["killed"]
