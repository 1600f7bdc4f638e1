"""vLLM in processes of Ray: two replicas through the RL loop, and one replica divided among two
processes. A process is killed in each.
"""

# Trap: new weights that reach one process of two; a dead process that its replica waits for.

import asyncio
import os
import signal
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import chz
import pytest

from posttrain.backend.config import BackendConfig
from posttrain.backend.left_behind import FOLDER
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import SamplingParams
from rl import train
from tests.processes import PATIENCE, actors, descendants, runs, title, wait_until
from tests.test_group_sources import config, metrics
from tests.test_replicas import PROMPTS, gap, step

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.usefixtures("cluster"),
    pytest.mark.needs_vllm,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"),
]
BACKEND = BackendConfig(engine="vllm", sampler_replicas=1, tensor_parallel=2, max_num_seqs=16, sampler_memory_gb=0.1)


def segments() -> set[str]:
    """Those that no process has mapped, as other runs on this machine have theirs."""
    names = {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "sem.mp", "vllm_", FOLDER))}
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # it has ended
            text = maps.read_text(errors="replace")
            names -= {name for name in names if f"/dev/shm/{name}" in text}
    return names


def test_a_replica_of_two_processes_follows_the_trainer_and_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # kernels are compiled, as on a machine's first run: that leaves semaphores in its processes
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    before = segments()  # of runs that were killed
    with ServiceClient(BACKEND, tmp_path) as service:
        client = service.create_training_client("tiny")
        for _ in range(2):
            sampler = client.save_weights_and_get_sampling_client()
            assert gap(client, sampler) < 2e-5
            step(client)
        workers = [pid for pid in descendants(os.getpid()) if title(pid).startswith("VLLM::Worker_TP")]
        assert len(workers) == 2
        # short: the two wait for each other at every layer, long on a busy machine
        params = SamplingParams(max_tokens=16, seed=3, stop=[])
        expected = sampler.sample(PROMPTS[0], 2, params).result(PATIENCE).sequences
        answer = sampler.sample(PROMPTS[0], 2, params)
        os.kill(workers[1], signal.SIGKILL)
        assert [s.tokens for s in answer.result(PATIENCE).sequences] == [s.tokens for s in expected]
        wait_until(lambda: not any(runs(pid) for pid in workers))
    wait_until(lambda: segments() <= before)


def test_the_rl_loop_goes_on_when_one_of_two_vllm_replicas_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed: list[int] = []

    def kill() -> None:
        wait_until(lambda: (tmp_path / "metrics.jsonl").exists() and metrics(tmp_path))
        killed.append(actors("SamplerActor")[0])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    backend = chz.replace(BACKEND, sampler_replicas=2, tensor_parallel=1)
    asyncio.run(train.main(config(tmp_path, backend=backend, model_name="tiny", max_steps=5, eval_every=0)))
    killer.join()
    rows = [row for row in metrics(tmp_path) if "optim/logprob_gap_mean" in row]
    assert len(rows) == 5 and max(row["optim/logprob_gap_mean"] for row in rows) < 1e-5
    assert "sampler replica" in (output := capsys.readouterr().out) and "a replacement starts" in output
