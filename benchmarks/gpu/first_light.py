"""The first half hour on a GPU: blocks of checks, the most important first, each in a process of
its own with a time limit.

    python benchmarks/gpu/first_light.py [--out FOLDER] [--blocks facts,trainer,...]

A block prints one JSON object on its last line, which becomes FOLDER/NAME.json; what else it prints
goes to FOLDER/NAME.log. A block that fails or runs out of time is recorded as such and the next one
runs. Blocks whose JSON says that they passed are skipped, so that a session that was cut off goes
on. Without a GPU everything runs on the CPU, where the JSON says so. The exit status is the number
of blocks that did not pass.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Limits. Blocks up to `belief_state` need no vLLM.
SECONDS = {
    "facts": 60,
    "trainer": 120,
    "attention": 90,
    "head": 60,
    "train_step": 120,
    "large_models": 90,
    "belief_state": 60,
    "small_engines": 240,
    "memory": 150,
    "half_b_engine": 180,
    "sampling": 430,
    "user_runs": 150,
    "cluster": 240,
}
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


def run_block(name: str, out: Path) -> dict[str, Any]:
    """The block's own record, or one that says how it ended."""
    start = time.monotonic()
    command = [sys.executable, "-m", f"benchmarks.gpu.{name}"]
    with open(out / f"{name}.log", "w+") as log:
        try:
            process = subprocess.run(
                command,
                env=os.environ | ENVIRONMENT,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=SECONDS[name],
            )
            ending = f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            ending = f"ran out of its {SECONDS[name]} s"
        log.seek(0)
        lines = log.read().strip().splitlines()
    try:
        record = json.loads(lines[-1])
    except (IndexError, ValueError):
        record = {"passed": False, "error": f"{ending}; the last lines: {lines[-3:]}"}
    return record | {"block": name, "seconds": round(time.monotonic() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("first_light"))
    parser.add_argument("--blocks", default=",".join(SECONDS))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in arguments.blocks.split(","):
        file = arguments.out / f"{name}.json"
        if has_passed(file):
            print(f"{name}: passed before")
            continue
        record = run_block(name, arguments.out)
        file.write_text(json.dumps(record, indent=2) + "\n")
        failed += not record["passed"]
        print(f"{name}: {'passed' if record['passed'] else 'FAILED'} in {record['seconds']} s", flush=True)
        for key, value in record.items():
            print(f"    {key}: {value}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
