"""Block `sampling`: tokens per second of 1,024 sequences of 128 + 256 tokens, of Qwen2.5-0.5B's shape
(on a CPU 64 of `tiny`): raw vLLM, our engine, environments, two engines. `sampling_more` has the rest.

    python -m benchmarks.gpu.sampling [--variants llm,ours,...] [--limit SECONDS]

All engines that the variants need start at once, each in a process of its own (sampling_engine.py)
with a KV cache of given size, so that they fit on one card together; once all are warm, the
variants are measured one after another, in the order given, and printed at once. An engine that
does not start is recorded with the last line it wrote, and one that is still starting when
START_SHARE of the limit is over, or takes ROUND_SECONDS for a round, is ended.

Memory, estimated: 11 GiB for each of `raw`, `ours`, `llm`, `ours-v2`, 7 for each process of
`processes-2` and `-4`, which share theirs.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from benchmarks.gpu.checks import Record
from benchmarks.gpu.sampling_engine import ON_GPU, ROWS

START_SHARE = 0.6
ROUND_SECONDS = 60.0  # that a round may take, of 9 to 30: an engine that hangs then ends, and the others are measured


@dataclass(frozen=True)
class Variant:
    """`processes` engines of one kind, sampling at the same time; see sampling_engine.py."""

    engine: str
    mode: str = "sample"
    processes: int = 1


FIRST = {
    "raw": Variant("raw", "logprobs"),
    "rollouts": Variant("ours", "rollouts"),
    "ours": Variant("ours"),
    "processes-2": Variant("plain", "logprobs", 2),
    "ours-profile": Variant("ours", "profile"),
}
MORE = {
    "llm-logprobs": Variant("llm", "logprobs"),
    "llm": Variant("llm"),
    "processes-4": Variant("plain", "logprobs", 4),
    "ours-v2": Variant("ours-v2"),
    "ours-v2-profile": Variant("ours-v2", "profile"),
    # the interpreter's switch interval 0.3 ms instead of 5
    "ours-busy-short": Variant("ours", "busy-short"),
    "ours-busy": Variant("ours", "busy"),  # last: it may take long
}
if find_spec("ray"):  # as a run has them
    MORE = {name: Variant(name) for name in ("replicas-2", "replicas-4")} | MORE
if not ON_GPU:  # where each engine takes 1.6 GiB
    FIRST.pop("processes-2")
    MORE = {name: MORE[name] for name in ("replicas-2", "llm-logprobs", "ours-busy-short") if name in MORE}
TWICE = ("raw", "rollouts")  # in turn, for their ratio
BEST = {  # all with logprobs, as training needs them
    "tokens/s, one engine": ("raw", "ours", "ours-v2", "llm-logprobs"),
    "tokens/s, several engines": ("processes-2", "processes-4"),
    "tokens/s, replicas": ("replicas-2", "replicas-4"),
}


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
    deadline = min(deadline, time.monotonic() + ROUND_SECONDS)
    answers = [engine.answer(deadline) for engine in engines]
    seconds = max(answer.pop("to") for answer in answers) - min(answer.pop("from") for answer in answers)
    found = {"tokens/s": round(sum(answer.pop("tokens") for answer in answers) / seconds), "s": round(seconds, 2)}
    return found | answers[0]


def main(default: Mapping[str, Variant] = FIRST) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    variants = FIRST | MORE
    parser.add_argument("--variants", default=",".join(default), help=f"of {', '.join(variants)}")
    limit = float(os.environ.get("BLOCK_SECONDS", "300")) - 5
    parser.add_argument("--limit", type=float, default=limit, help="seconds in all")
    arguments = parser.parse_args()
    begin, record = time.monotonic(), Record()
    wanted = {name: variants[name] for name in arguments.variants.split(",")}
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
        speeds: dict[str, list[float]] = {}
        for name in in_order(list(wanted)):
            variant = wanted[name]
            failed = [errors[engine] for engine in engine_names(variant) if engine in errors]
            try:
                if failed:
                    raise RuntimeError(failed[0])
                found = measure(variant, [engines[engine] for engine in engine_names(variant)], begin + arguments.limit)
                show(record, f"{name}, again" if name in speeds else name, found)
                speeds.setdefault(name, []).append(found["tokens/s"])
                for key, value in summary(speeds).items():
                    record.figure(key, value)
            except RuntimeError as error:
                show(record, name, {"error": str(error)})
                record.holds(name, False)
    finally:
        for engine in engines.values():
            engine.process.kill()
    record.print()


def in_order(names: list[str]) -> list[str]:
    """The pair of TWICE first, A, B, A, B."""
    pair = [name for name in names if name in TWICE]
    return (2 * pair if len(pair) == 2 else pair) + [name for name in names if name not in TWICE]


def summary(speeds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Of the figures so far: the fastest of each kind, and what environments leave of an engine's speed,
    each at its best round."""
    best = {name: max(values) for name, values in speeds.items()}
    found = {
        key: max(best[name] for name in names if name in best)
        for key, names in BEST.items()
        if not best.keys().isdisjoint(names)
    }
    if best.keys() >= set(TWICE):
        found["rollouts / raw"] = best["rollouts"] / best["raw"]
    return found


def show(record: Record, name: str, value: Any) -> None:
    record.figure(name, value)
    print(f"{name}: {value}", flush=True)


if __name__ == "__main__":
    main()
