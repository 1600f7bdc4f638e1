"""The cost of the wire: the same RL step through the Tinker SDK and posttrain.serve, and in process.

    python benchmarks/serve.py [--rounds N]

The SDK has an environment of its own (tinker_sdk.py). Both sides sample with torch from the
same adapter of `small`, with the same seeds, and take turns; a round's ratio is that of its median
steps, by the clock and by CPU time (of client and server together). Bytes are those of HTTP bodies. Also:
samples of one token a second with 2,000 outstanding, and 50 clients at once, with the server's
memory. Left out: other machines, GPUs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the packages are one folder up
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import posttrain.backend as tinker
from benchmarks.report import ROOT, alternate, over, wait_until_quiet, write_report
from benchmarks.serve_side import one_token_samples, rl_steps
from benchmarks.tinker_sdk import sdk_python
from posttrain.backend.config import BackendConfig
from posttrain.backend.types import LoraConfig
from posttrain.serve.app import create_app
from posttrain.serve.bases import open_bases
from posttrain.serve.local_server import LocalServer
from posttrain.serve.state import State
from posttrain.serve.store import Store

STEP: dict[str, Any] = {
    "model": "small",
    "rank": 16,
    "groups": 8,
    "group_size": 8,
    "prompt_tokens": 32,
    "max_tokens": 16,
    "steps": 4,
}
SAMPLES, CLIENTS = 2000, 50
SDK = "0.38.0"


class Server:
    """A server process on a free port, and what /proc and its counters say of it."""

    def __init__(self, model: str, folder: str, *options: str):
        command = [
            sys.executable,
            "-m",
            "posttrain.serve",
            "--model",
            model,
            "port=0",
            "backend.engine=torch",
            *options,
        ]
        self.process = subprocess.Popen(
            [*command, f"checkpoint_dir={folder}"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout
        self.url = self.process.stdout.readline().split(" at ")[1].strip()

    def mib(self) -> float:
        """Its largest resident memory so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024


@contextmanager
def server(model: str, *options: str) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        running = Server(model, folder, *options)
        try:
            yield running
        finally:
            running.process.terminate()
            running.process.wait()


def sdk_side(python: str, url: str, **settings: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"TINKER_BASE_URL": url, "TINKER_API_KEY": "tml-local"}
    command = [python, str(ROOT / "benchmarks" / "serve_side.py"), json.dumps({**STEP, **settings})]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, _ = process.communicate()
    assert process.returncode == 0, output[-2000:]
    return json.loads(output.splitlines()[-1])


class Counted:
    """An ASGI application whose bodies are counted."""

    def __init__(self, app: Any):
        self._app, self.received, self.sent = app, 0, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counted_receive() -> Any:
            message = await receive()
            self.received += len(message.get("body", b""))
            return message

        async def counted_send(message: Any) -> None:
            self.sent += len(message.get("body", b""))
            await send(message)

        await self._app(scope, counted_receive, counted_send)


def step_bytes(python: str) -> list[float]:
    """Bytes of HTTP bodies of a step, to the server and back: of four steps less those of one."""
    totals = []
    with tempfile.TemporaryDirectory() as folder, tinker.ServiceClient(BackendConfig(engine="torch")) as service:
        state = State(service, open_bases([STEP["model"]], None), Store(Path(folder)))
        app = Counted(create_app(state))
        with LocalServer(app) as at:
            for steps in (1, 4):
                before = app.received, app.sent
                answer(sdk_side(python, at.url, side="step", steps=steps))
                totals.append((app.received - before[0], app.sent - before[1]))
    return [(four - one) / 3 for one, four in zip(*totals, strict=True)]


def in_process() -> list[tuple[float, float]]:
    with tinker.ServiceClient(BackendConfig(engine="torch", share_engines=True)) as service:
        client = service.create_training_client(STEP["model"], LoraConfig(STEP["rank"], 1), 0)
        return rl_steps(STEP, client, tinker, sdk=False)[1:]  # the first opens the engine


def samples_in_process() -> float:
    with tinker.ServiceClient(BackendConfig(engine="torch")) as service:
        sampler = service.create_sampling_client(base_model="tiny")
        one_token_samples(sampler, tinker, 20)
        return one_token_samples(sampler, tinker, SAMPLES)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    python = sdk_python(SDK)
    load = wait_until_quiet()
    figures: dict[str, Any] = {}
    with server("small") as at:
        runs = alternate(
            {
                "in_process": in_process,
                "wire": lambda: answer(sdk_side(python, at.url, side="step", server=at.process.pid))["seconds"][1:],
            },
            options.rounds,
        )
    ratios: dict[str, Any] = {}
    for which, unit in enumerate(("seconds", "CPU seconds")):
        medians = {side: [statistics.median(step[which] for step in steps) for steps in runs[side]] for side in runs}
        figures |= {f"{unit} of a step, {side}": values for side, values in medians.items()}
        ratios[f"{unit} of an RL step, SDK and server / in process"] = over(medians["wire"], medians["in_process"])
    to, back = step_bytes(python)
    ratios |= {
        "kB of HTTP bodies of a step, to the server": to / 1000,
        "kB of HTTP bodies of a step, back": back / 1000,
    }
    with server("tiny") as at:
        before = at.mib()
        settings = {"model": "tiny", "samples": SAMPLES, "server": at.process.pid}
        done = answer(sdk_side(python, at.url, side="samples", **settings))
        ratios[f"samples of one token per second, {SAMPLES} outstanding, SDK and server"] = done["per_second"]
        ratios["samples of one token per second, in process"] = samples_in_process()
        ratios["CPU ms of such a sample in the SDK"] = done["client_ms"]
        ratios["CPU ms of such a sample in the server"] = done["server_ms"]
        ratios["the server's memory before them, MiB"], ratios["after them, MiB"] = before, at.mib()
    small = {"model": "tiny", "samples": 40, "steps": 1, "groups": 2, "group_size": 2, "rank": 4}
    with server("tiny") as at:
        many = sdk_side(python, at.url, side="clients", clients=CLIENTS, **small)
        ratios[f"{CLIENTS} clients at once, each with an adapter: finished"] = answer(many)["finished"]
        ratios["the server's memory after them, MiB"] = at.mib()
    settings = {**STEP, "samples": SAMPLES, "clients": CLIENTS, "rounds": options.rounds, "sdk": f"tinker {SDK}"}
    write_report("serve", figures, settings, load, ratios)


if __name__ == "__main__":
    main()
