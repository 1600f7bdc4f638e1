"""The first half hour on a GPU: blocks of checks, the most important first, each in a process of
its own with a time limit.

    python benchmarks/gpu/first_light.py [--out FOLDER] [--blocks facts,trainer,...] [--seconds 1800]

`--blocks a,b+c`: b and c, which time nothing, run beside each other.

A block prints its record after each figure, one JSON object on a line; the last becomes
FOLDER/NAME.json, also while it runs, what else it prints goes to FOLDER/NAME.log. A block that fails or runs out of time
is recorded as such, with the figures it had, and the next one runs. A session that was cut off goes
on: first with the blocks that have no JSON, then with those that did not pass; training runs, which are in FOLDER/runs
until they are done, from their last checkpoint. FOLDER/first_light.json
has them all, the machine, and the aims (aims.py) with what was reached.
Without a GPU everything runs on the CPU, where the JSON says so. The exit status is the number of
blocks that did not pass.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the packages are two folders up
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks.gpu.aims import read_records, table

ROOT = Path(__file__).resolve().parents[2]
# Limits; about two thirds of them are needed (README.md). In the order of what a figure is worth, for a
# card that is lent for minutes.
SECONDS = {
    "facts": 60,
    "trainer": 120,
    "train_step": 240,
    "half_b_engine": 180,
    "sampling": 310,
    "large_models": 150,
    "warm_start": 150,
    "learning": 330,
    "belief_state": 60,
    "sleep": 120,
    "small_engines": 240,
    "star_graph_run": 300,
    "sampling_more": 420,
    "large_models_more": 300,
    "memory": 150,
    "reproducible": 180,
    "user_runs": 150,
    "attention": 90,
    "head": 60,
    "cluster": 240,  # of two GPUs
}
_writing = threading.Lock()  # of blocks beside each other
_running: set[int] = set()  # their processes
FEWEST_SECONDS = 20.0  # in which a block can tell anything
KEPT_SECONDS = 60.0  # for each of the next two that wait, if one before them hangs
KILL_SECONDS = 15.0  # that the end of a killed block may take
SHOWN_EVERY = 5.0  # seconds: the figures of a block that runs
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "VLLM_NO_USAGE_STATS": "1",
}


def has_passed(file: Path) -> bool:
    try:
        return json.loads(file.read_text())["passed"]
    except (OSError, ValueError, KeyError):
        return False


def last_record(lines: list[str]) -> dict[str, Any]:
    """Warnings of threads and of the interpreter's end may follow it."""
    for line in reversed(lines):
        try:
            if isinstance(record := json.loads(line), dict) and "passed" in record:
                return record
        except ValueError:
            continue
    return {"passed": False, "error": f"it printed no record; the last lines: {lines[-3:]}"}


def in_turn(groups: list[list[str]], out: Path) -> list[list[str]]:
    """First the blocks that have not run, then those that did not pass."""
    return sorted(groups, key=lambda names: all((out / f"{name}.json").exists() for name in names))


def limits(names: list[str], patience: float, left: float, later: int) -> list[float]:
    """Of blocks that run beside each other, before `later` ones. Each has half of its own limit, if so much is left."""
    kept = KEPT_SECONDS * min(later, 2)
    own = [patience * SECONDS[name] for name in names]
    return [min(left, most, max(left - kept, most / 2)) for most in own]


def end_left_behind(out: Path) -> None:
    """The blocks of a driver that was killed: in sessions of their own, they would run on beside the next ones."""
    for file in out.glob("*.pid"):
        block = int(file.read_text())
        with contextlib.suppress(OSError):
            if f"benchmarks.gpu.{file.stem}" in Path(f"/proc/{block}/cmdline").read_text():
                _kill(block)
        file.unlink()


def ended(records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """As they come. Whoever stops the driver stops the blocks."""
    try:
        yield from records
    except BaseException:
        for block in list(_running):
            _kill(block)
        raise


def run_block(name: str, out: Path, limit: float) -> dict[str, Any]:
    """The block's own record, or one that says how it ended. Written, and into the summary."""
    start = time.monotonic()
    command = [sys.executable, "-m", f"benchmarks.gpu.{name}"]
    with open(out / f"{name}.log", "w+") as log:
        process = subprocess.Popen(
            command,
            env=os.environ | ENVIRONMENT | {"BLOCK_SECONDS": str(limit), "BLOCK_RUNS": str((out / "runs").resolve())},
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        _running.add(process.pid)
        pid = out / f"{name}.pid"
        pid.write_text(str(process.pid))
        try:
            ending = f"exit status {watched(process, name, out, start + limit)}"
        except subprocess.TimeoutExpired:
            ending = f"ran out of its {limit:.0f} s"
        finally:
            _kill(process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KILL_SECONDS)  # a driver of a GPU may hold it, whatever it is sent
            _running.remove(process.pid)
            pid.unlink(missing_ok=True)
        log.seek(0)
        lines = log.read().strip().splitlines()
    record = last_record(lines)
    if "error" in record:
        record |= {"error": f"{ending}; the last lines: {[line for line in lines if not line.startswith('{')][-3:]}"}
    record |= {"block": name, "seconds": round(time.monotonic() - start, 1)}
    keep(record, name, out)
    return record


def watched(process: "subprocess.Popen[bytes]", name: str, out: Path, end: float) -> int:
    """Its exit status. Keeps its figures while it runs: whatever ends this machine, they were sent back.
    TimeoutExpired at `end`."""
    while True:
        left = end - time.monotonic()
        try:
            return process.wait(max(0.0, min(left, SHOWN_EVERY)))
        except subprocess.TimeoutExpired:
            if left <= SHOWN_EVERY:
                raise
        record = last_record((out / f"{name}.log").read_text(errors="replace").splitlines())
        if "device" in record:  # it has printed one
            keep(record, name, out)


def keep(record: dict[str, Any], name: str, out: Path) -> None:
    """In a file of its own, and in the summary."""
    with _writing:
        write(out / f"{name}.json", record)
        write_summary(out)


def write(file: Path, content: dict[str, Any]) -> None:
    """At once: somebody may send it back meanwhile."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(new, file)


def _kill(block: int) -> None:
    """And its engines, which would keep the GPU's memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(block, signal.SIGKILL)


def write_summary(out: Path) -> None:
    """One file for benchmarks/results: of a machine that is lent, it may be all that comes back."""
    records = read_records(out, SECONDS)
    aims = [
        dict(zip(("aim", "block", "figure", "bound", "found", "verdict"), row, strict=True)) for row in table(records)
    ]
    summary = {"benchmark": "gpu/first_light", **records.get("facts", {}).pop("machine", {}), "aims": aims}
    summary["blocks"] = records
    write(out / "first_light.json", summary)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("first_light"))
    parser.add_argument("--blocks", default=",".join(SECONDS))
    parser.add_argument("--seconds", type=float, default=1e9, help="for all blocks together")
    parser.add_argument("--patience", type=float, default=1.0, help="factor of each block's limit, for a slow machine")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    arguments.out.mkdir(parents=True, exist_ok=True)
    end_left_behind(arguments.out)
    failed = 0
    groups = in_turn([names.split("+") for names in arguments.blocks.split(",")], arguments.out)
    waiting_of = [[name for name in names if not has_passed(arguments.out / f"{name}.json")] for names in groups]
    for place, (names, waiting) in enumerate(zip(groups, waiting_of, strict=True), start=1):
        for name in names:
            if name not in waiting:
                print(f"{name}: passed before")
        if not waiting:
            continue
        if (left := end - time.monotonic()) < FEWEST_SECONDS:
            print(f"{', '.join(waiting)}: no time left")
            failed += len(waiting)
            continue
        with ThreadPoolExecutor(len(waiting)) as together:
            of_each = limits(waiting, arguments.patience, left, sum(map(bool, waiting_of[place:])))
            records = together.map(run_block, waiting, [arguments.out] * len(waiting), of_each)
            for name, record in zip(waiting, ended(records), strict=True):
                failed += not record["passed"]
                print(f"{name}: {'passed' if record['passed'] else 'FAILED'} in {record['seconds']} s", flush=True)
                for key, value in record.items():
                    print(f"    {key}: {value}", flush=True)
    for what, _, _, bound, found, verdict in table(read_records(arguments.out, SECONDS)):
        print(f"{verdict:<13} {what}: {found or '-'} ({bound})", flush=True)
    return failed


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as a machine's time limit ends it
    sys.exit(main())
