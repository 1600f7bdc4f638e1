"""The sampling matrix: tokens per second of 1,024 sequences of 128 + 256 tokens, of Qwen2.5-0.5B's
shape (on a CPU 64 of `tiny`).

    python -m benchmarks.gpu.sampling [--variants llm,ours,...] [--limit SECONDS]

All engines that the variants need start at once, each in a process of its own (sampling_engine.py)
with a KV cache of given size, so that they fit on one card together; once all are warm, the
variants are measured one after another, in the order given, and printed at once. An engine that
does not start is recorded with the last line it wrote, and one that is still starting when
START_SHARE of the limit is over is ended.

Memory, estimated: 11 GiB for each of `llm`, `ours`, `ours-v2`, `ours-tuned`, 7 for each process of
`processes-2` and `-4` (which share theirs): 72 for all. Starting no more than four at a time would
save memory only while graphs are recorded, and cost a minute: all start at once.
"""

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.checks import Record
from benchmarks.gpu.sampling_engine import ON_GPU, ROWS

START_SHARE = 0.6


@dataclass(frozen=True)
class Variant:
    """`processes` engines of one kind, sampling at the same time; see sampling_engine.py."""

    engine: str
    mode: str = "sample"
    processes: int = 1


VARIANTS = {
    "llm": Variant("llm"),
    "llm-logprobs": Variant("llm", "logprobs"),
    "ours": Variant("ours"),
    "ours-tuned": Variant("ours-tuned"),
    "ours-v2": Variant("ours-v2"),
    "ours-v2-tuned": Variant("ours-v2-tuned"),
    "processes-2": Variant("plain", "logprobs", 2),
    "processes-4": Variant("plain", "logprobs", 4),
    "rollouts": Variant("ours", "rollouts"),
    "ours-profile": Variant("ours", "profile"),
    "ours-tuned-profile": Variant("ours-tuned", "profile"),
    "ours-v2-profile": Variant("ours-v2", "profile"),
    # the interpreter's switch interval 0.3 ms instead of 5
    "ours-busy-short": Variant("ours", "busy-short"),
    "ours-busy": Variant("ours", "busy"),  # last: it may take long
}
DEFAULT = [name for name in VARIANTS if name != "ours-v2-tuned"]
if not ON_GPU:  # two engines: each takes 1.6 GiB
    DEFAULT = ["llm", "llm-logprobs", "ours", "rollouts", "ours-profile", "ours-busy-short"]


@dataclass
class EngineProcess:
    """A child and what it wrote."""

    name: str
    process: "subprocess.Popen[str]"
    # None: its output has ended
    answers: "queue.Queue[dict[str, Any] | None]" = field(default_factory=queue.Queue)
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=30))

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@@"):
                self.answers.put(json.loads(line[2:]))
            elif line.strip():
                self.last_lines.append(line.strip())
                print(f"[{self.name}] {line}", end="", file=sys.stderr)
        self.answers.put(None)

    def send(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: `answer` says why
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()

    def answer(self, deadline: float) -> dict[str, Any]:
        """RuntimeError with the last line that speaks of an error, if it ended or the time is
        over.
        """
        try:
            answer = self.answers.get(timeout=max(deadline - time.monotonic(), 0.01))
        except queue.Empty:
            self.process.kill()
            raise RuntimeError(f"{self.name}: no answer in time") from None
        if answer is None:
            self.answers.put(None)
            errors = (
                [line for line in self.last_lines if "Error" in line] or list(self.last_lines) or ["it wrote nothing"]
            )
            raise RuntimeError(f"{self.name}: {errors[-1]}")
        return answer


def start_engine(name: str) -> EngineProcess:
    command = [sys.executable, "-m", "benchmarks.gpu.sampling_engine", name.split("#")[0]]
    environment = {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | os.environ
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    engine = EngineProcess(name, process)
    threading.Thread(target=engine.read, daemon=True).start()
    return engine


def engine_names(variant: Variant) -> list[str]:
    return [f"{variant.engine}#{i}" for i in range(variant.processes)]


def measure(variant: Variant, engines: list[EngineProcess], deadline: float) -> dict[str, Any]:
    """One round: all tokens over the time from the first start to the last end."""
    for engine in engines:
        engine.send({"mode": variant.mode, "rows": ROWS // variant.processes})
    answers = [engine.answer(deadline) for engine in engines]
    seconds = max(answer.pop("to") for answer in answers) - min(answer.pop("from") for answer in answers)
    found = {"tokens/s": round(sum(answer.pop("tokens") for answer in answers) / seconds), "s": round(seconds, 2)}
    return found | answers[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=",".join(DEFAULT), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--limit", type=float, default=420, help="seconds in all")
    arguments = parser.parse_args()
    begin, record = time.monotonic(), Record()
    wanted = {name: VARIANTS[name] for name in arguments.variants.split(",")}
    names = dict.fromkeys(name for variant in wanted.values() for name in engine_names(variant))
    engines = {name: start_engine(name) for name in names}
    errors: dict[str, str] = {}
    try:
        for name, engine in engines.items():
            try:
                seconds = engine.answer(begin + START_SHARE * arguments.limit)["start"]
                show(record, f"{name}: start, s", round(seconds, 1))
            except RuntimeError as error:
                errors[name] = str(error)
        for name, variant in wanted.items():
            failed = [errors[engine] for engine in engine_names(variant) if engine in errors]
            try:
                if failed:
                    raise RuntimeError(failed[0])
                found = measure(variant, [engines[engine] for engine in engine_names(variant)], begin + arguments.limit)
                show(record, name, found)
            except RuntimeError as error:
                show(record, name, {"error": str(error)})
                record.holds(name, False)
    finally:
        for engine in engines.values():
            engine.process.kill()
    record.print()


def show(record: Record, name: str, value: Any) -> None:
    record.figure(name, value)
    print(f"{name}: {value}", flush=True)


if __name__ == "__main__":
    main()
