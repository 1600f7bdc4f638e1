"""The unmodified Tinker SDK, in an environment of its own, against the server in a process of its
own: sdk_checks.py has the checks.
"""

import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow
# The environments are kept between runs. They see the packages of this one, for torch.
ENVIRONMENTS = Path(os.environ.get("TINKER_SDK_VENVS", "~/.cache/posttrain/tinker-sdk")).expanduser()
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
OLDER = [
    *("capabilities", "supervised", "pipelined", "losses", "custom_loss", "checkpoints", "samplers", "sampling"),
    "rest",
]


def sdk_python(version: str) -> str:
    """A Python with this version of the SDK; skips where it cannot be installed."""
    folder = ENVIRONMENTS / version
    python, is_complete = folder / "bin" / "python", (folder / "complete").exists()
    if not is_complete:
        venv.create(folder, with_pip=True, clear=True)
    # anew each time: the checkout that made the environment may have gone
    site = next(folder.glob("lib/python*/site-packages"))
    here = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "packages_of_the_project.pth").write_text(f"{Path(here).resolve()}\n")
    if not is_complete:
        install = [str(python), "-m", "pip", "install", "-q", f"tinker=={version}"]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"tinker {version} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
        (folder / "complete").touch()
    return str(python)


def _single_threaded() -> dict[str, str]:
    """Tiny models are slower with several threads, by far where other tests run beside."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


class Server:
    """`python -m posttrain.serve` with `micro` as "m"."""

    def __init__(self, folder: Path, *options: str):
        command = [sys.executable, "-m", "posttrain.serve", "--model", "m=micro", "port=0", "backend.engine=torch"]
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
        self.process.wait(60)

    def log(self) -> str:
        return self._log.read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


def run_checks(server: Server, version: str, checks: list[str]) -> None:
    command = [sdk_python(version), str(ROOT / "tests" / "sdk_checks.py"), *checks]
    done = subprocess.run(command, env=server.environment(), capture_output=True, text=True, timeout=500)
    found = [line for line in done.stdout.splitlines() if line.split(":")[0].split()[0] in checks]
    wrong = [line.replace("\\n", "\n") for line in found if not line.endswith(" ok")]
    assert len(found) == len(checks) and not wrong, "\n".join([*wrong, done.stderr[-3000:], server.log()[-3000:]])


def test_the_sdk(server: Server) -> None:
    run_checks(server, "0.38.0", CHECKS)
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("version", ["0.22.7", "0.25.0", "0.30.4", "0.36.0"])
def test_an_older_sdk(version: str, server: Server) -> None:
    run_checks(server, version, OLDER)


def test_an_sdk_of_an_older_protocol_is_told_so_in_one_line(server: Server) -> None:
    script = [sdk_python("0.18.2"), "-c", "import tinker; tinker.ServiceClient()"]
    done = subprocess.run(script, env=server.environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode and "install one from 0.22.7 to 0.38" in done.stderr.splitlines()[-1]


def test_a_killed_server_is_continued_from_its_checkpoint_exactly(tmp_path: Path) -> None:
    """Three steps, kill -9 in the middle of later ones, restart, two steps: as five steps."""
    server = Server(tmp_path)
    try:
        script = [sdk_python("0.38.0"), str(ROOT / "tests" / "sdk_checks.py"), "train_and_save"]
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


def _logprobs_after(server: Server, script: list[str], path: str) -> list[float]:
    if server.process.poll() is not None:
        server.start()
    script = [*script, path] if path else [*script[:-1], "five_steps"]
    done = subprocess.run(script, env=server.environment(), capture_output=True, text=True, timeout=200)
    return next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
