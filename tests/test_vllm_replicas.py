"""vLLM in processes of Ray: two replicas through the RL loop, and one replica divided among two
processes. A process is killed in each.
"""

# Trap: new weights that reach one process of two; a dead process that its replica waits for.

import asyncio
import os
import signal
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import chz
import pytest

from posttrain.backend.config import BackendConfig
from posttrain.backend.left_behind import FOLDER
from posttrain.backend.sampler_pool import SamplerPool
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import SamplingParams
from posttrain.backend.weight_versions import Policy, WeightVersion
from rl import train
from tests.processes import actors, descendants, runs, title, wait_until
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
    """Files in shared memory that no running process has, but this one's."""
    names = {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "sem.mp", "vllm_", FOLDER))}
    return {name for name in names if not _is_of_another(name)}


def _is_of_another(name: str) -> bool:
    if name.startswith(FOLDER):
        pid = int(name.split("-")[-2])
        return pid != os.getpid() and runs(pid)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if f"/dev/shm/{name}" in Path(f"/proc/{pid}/maps").read_text():
                return True
    return False


def test_a_replica_of_two_processes_follows_the_trainer_and_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # kernels are compiled, as on a machine's first run: that leaves semaphores in its processes
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("TMPDIR", temporary := tempfile.mkdtemp())  # short: sockets have names of 107 bytes
    before = segments()  # of other runs on this machine
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
        expected = sampler.sample(PROMPTS[0], 2, params).result(300).sequences
        answer = sampler.sample(PROMPTS[0], 2, params)
        os.kill(workers[1], signal.SIGKILL)
        assert [s.tokens for s in answer.result(300).sequences] == [s.tokens for s in expected]
        wait_until(lambda: not any(runs(pid) for pid in workers))
    wait_until(lambda: segments() <= before)
    os.rmdir(temporary)  # it is empty: a killed vLLM leaves sockets


def test_the_rl_loop_goes_on_when_one_of_two_vllm_replicas_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sync = SamplerPool.sync

    def sync_and_kill(pool: SamplerPool, policy: Policy, version: WeightVersion) -> None:
        sync(pool, policy, version)
        if version.number == 2:  # three batches are to come
            os.kill(actors("SamplerActor")[0], signal.SIGKILL)

    monkeypatch.setattr(SamplerPool, "sync", sync_and_kill)
    backend = chz.replace(BACKEND, sampler_replicas=2, tensor_parallel=1)
    asyncio.run(train.main(config(tmp_path, backend=backend, model_name="tiny", max_steps=5, eval_every=0)))
    rows = [row for row in metrics(tmp_path) if "optim/logprob_gap_mean" in row]
    assert len(rows) == 5 and max(row["optim/logprob_gap_mean"] for row in rows) < 1e-5
    assert "sampler replica" in (output := capsys.readouterr().out) and "a replacement starts" in output
