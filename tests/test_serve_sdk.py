"""The unmodified Tinker SDK, in an environment of its own, against the server in a process of its
own: sdk_checks.py has the checks, sdk_restart.py what survives a killed server.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks import tinker_sdk
from posttrain.backend.errors import ConfigError
from posttrain.serve import wire
from tests.conftest import ROOT
from tests.processes import PATIENCE
from tests.tinker_messages import datum, pass_body

pytestmark = pytest.mark.slow
CHECKS = [
    *("capabilities", "supervised", "pipelined", "many_data", "losses", "reinforced", "custom_loss", "checkpoints"),
    *(
        "samplers",
        "sampling",
        "topk_samples",
        "several_targets",
        "last_n",
        "other_tokens",
        "two_hundred_at_once",
        "pickled",
        "abandoned",
        "sampled_while_training",
        "sessions",
        "external",
        "command_line",
        "rest",
        "bad_data",
        "concurrent",
    ),
]
ENGINE = os.environ.get("TINKER_TEST_ENGINE", "torch")  # vllm: the same checks with its sampler
OLDER = [
    *("capabilities", "supervised", "pipelined", "losses", "custom_loss", "checkpoints", "samplers", "sampling"),
    "rest",
]


def sdk_python(version: str) -> str:
    """Skips where it cannot be installed."""
    try:
        return tinker_sdk.sdk_python(version)
    except ConfigError as error:
        pytest.skip(str(error))


def _single_threaded() -> dict[str, str]:
    """Tiny models are slower with several threads, by far where other tests run beside."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


class Server:
    """`python -m posttrain.serve` with `micro` as "m". `program`: Python code to run in its place."""

    def __init__(self, folder: Path, *options: str, program: str = ""):
        command = [sys.executable, *(["-c", program] if program else ["-m", "posttrain.serve"])]
        command += ["--model", "m=micro", "port=0", f"backend.engine={ENGINE}"]
        self._command = [*command, f"checkpoint_dir={folder / 'checkpoints'}", *options]
        self._log = folder / "log"
        self.start()

    def start(self) -> None:
        with open(self._log, "a") as log:
            self.process = subprocess.Popen(
                self._command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, env=_single_threaded()
            )
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert " at http" in line, self._log.read_text()
        self.url = line.split(" at ")[1].strip()

    def environment(self) -> dict[str, str]:
        return {
            **_single_threaded(),
            "TINKER_BASE_URL": self.url,
            "TINKER_API_KEY": "tml-local",
            "TINKER_TELEMETRY": "0",
        }

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE)

    def log(self) -> str:
        return self._log.read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


def run_checks(server: Server, version: str, checks: list[str]) -> None:
    command = [sdk_python(version), str(ROOT / "tests" / "sdk_checks.py"), *checks]
    done = subprocess.run(command, env=server.environment(), capture_output=True, text=True, timeout=PATIENCE)
    found = [line for line in done.stdout.splitlines() if line.split(":")[0].split()[0] in checks]
    wrong = [line.replace("\\n", "\n") for line in found if not line.endswith(" ok")]
    assert len(found) == len(checks) and not wrong, "\n".join([*wrong, done.stderr[-3000:], server.log()[-3000:]])


@pytest.mark.parametrize("version", ["0.22.7", "0.25.0", "0.30.4", "0.36.0"])
def test_an_older_sdk(version: str, server: Server) -> None:
    """Before the newest, whose external checkpoints SDKs before 0.30 cannot list."""
    run_checks(server, version, OLDER)


def test_the_sdk(server: Server) -> None:
    run_checks(server, "0.38.0", CHECKS)
    assert "Traceback" not in server.log()


def test_an_sdk_of_an_older_protocol_is_told_so_in_one_line(server: Server) -> None:
    script = [sdk_python("0.18.2"), "-c", "import tinker; tinker.ServiceClient()"]
    done = subprocess.run(script, env=server.environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode and "install one from 0.22.7 to 0.38" in done.stderr.splitlines()[-1]


def test_a_killed_server_is_continued_from_its_checkpoint_exactly(tmp_path: Path) -> None:
    """Three steps, kill -9 in the middle of later ones, restart, two steps: as five steps."""
    server = Server(tmp_path)
    try:
        script = [sdk_python("0.38.0"), str(ROOT / "tests" / "sdk_restart.py"), "train_and_save"]
        trains = subprocess.Popen(script, env=server.environment(), stdout=subprocess.PIPE, text=True)
        assert trains.stdout
        path = next(json.loads(line) for line in trains.stdout if line.startswith('"tinker://'))
        server.process.kill()
        trains.kill()
        server.process.wait()
        continued = _logprobs_after(server, script, path)
        straight = _logprobs_after(server, script, "")
    finally:
        server.close()
    assert continued == straight


SLOW_SAVES = """
import time
from posttrain.backend import atomic_folder
from posttrain.serve.command import main

fsync = atomic_folder._fsync

def slow(file):
    print("writing", file.name, flush=True)
    time.sleep(0.2)
    fsync(file)

atomic_folder._fsync = slow
main()
"""


def test_a_save_that_sigterm_meets_leaves_checkpoints_whole(tmp_path: Path) -> None:
    """The one that it would have replaced is there, old or new; one of a new name is there or is not."""
    server = Server(tmp_path, program=SLOW_SAVES)
    assert server.process.stdout

    def call(path: str, /, **body: Any) -> dict[str, Any]:
        response = httpx.post(f"{server.url}/api/v1/{path}", json=body, timeout=PATIENCE)
        assert response.status_code == 200, response.text
        return response.json()

    def result(accepted: dict[str, Any]) -> dict[str, Any]:
        return call("retrieve_future", request_id=accepted["request_id"])

    def logprobs(model_id: str, seq_id: int) -> list[float]:
        content = pass_body(model_id, seq_id, [datum()], forward_only=True)
        headers = {"content-type": "application/x-protobuf"}
        accepted = httpx.post(f"{server.url}/api/v1/forward_backward", content=content, headers=headers).json()
        answer = httpx.post(f"{server.url}/api/v1/retrieve_future", json=accepted, timeout=PATIENCE).content
        output = wire.MESSAGES["ForwardBackwardOutput"].FromString(answer)
        return np.frombuffer(output.loss_fn_outputs[0].fields["logprobs"].data, "<f4").tolist()

    def loaded(number: int, path: str) -> str:
        session = call("create_session")["session_id"]
        return result(call("load_weights", session_id=session, model_seq_id=number, path=path, optimizer=True))[
            "model_id"
        ]

    def trained(model_id: str, seq_id: int) -> None:
        headers = {"content-type": "application/x-protobuf"}
        content = pass_body(model_id, seq_id, [datum()])
        httpx.post(f"{server.url}/api/v1/forward_backward", content=content, headers=headers)
        result(call("optim_step", model_id=model_id, seq_id=seq_id + 1, adam_params={"learning_rate": 0.01}))

    session = call("create_session")["session_id"]
    model_id = f"{session}:train:0"
    result(call("create_model", session_id=session, model_seq_id=0, base_model="m", lora_config={"rank": 4}))
    result(call("save_weights", model_id=model_id, seq_id=1, path="a"))
    old = logprobs(model_id, 2)
    trained(model_id, 3)
    new = logprobs(model_id, 5)
    next(line for line in server.process.stdout if "optimizer" in line)  # of the first save
    call("save_weights", model_id=model_id, seq_id=6, path="a", overwrite=True)
    call("save_weights", model_id=model_id, seq_id=7, path="b")
    next(line for line in server.process.stdout if line.startswith("writing"))
    server.close()
    server.start()
    try:
        path = f"tinker://{model_id}/weights/"
        assert logprobs(loaded(0, path + "a"), 1) in (old, new) and old != new
        kept = [c["tinker_path"] for c in httpx.get(f"{server.url}/api/v1/checkpoints").json()["checkpoints"]]
        assert path + "b" not in kept or logprobs(loaded(1, path + "b"), 1) == new
        assert not [*tmp_path.rglob(".*.tmp")]
    finally:
        server.close()


def _logprobs_after(server: Server, script: list[str], path: str) -> list[float]:
    if server.process.poll() is not None:
        server.start()
    script = [*script, path] if path else [*script[:-1], "five_steps"]
    done = subprocess.run(script, env=server.environment(), capture_output=True, text=True, timeout=PATIENCE)
    return next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
