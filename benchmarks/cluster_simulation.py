"""What 8 to 512 GPUs would reach: a simulation from measured per-call costs, a trace of our own
rollouts, and the router itself.

    python benchmarks/cluster_simulation.py            # the tables; about a minute
    python benchmarks/cluster_simulation.py --measure  # first measures the costs on this machine again
    python benchmarks/cluster_simulation.py --report results.json

Rollouts are decoded event by event on replicas whose step slows with the sequences and the context
in it. Training is arithmetic over the rows that batching.py gives to each rank. Efficiency is the
GPU seconds that the arithmetic needs, without tails, communication and waiting, over the GPU
seconds of a step. Left out: pipelining of publish and load, failures, reward models, evaluation.
"""

import argparse
import heapq
import itertools
import json
import math
import os
import sys
import tempfile
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

if not __package__:  # run as a file: the packages are one folder up
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np

from benchmarks import cluster as bench
from benchmarks.report import RESULTS, machine, rounded
from posttrain.backend import routing
from posttrain.backend.batching import _batches, _cut, _Row
from posttrain.backend.config import BackendConfig
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer

# --- assumed, nothing of it is measured here ------------------------------------------------------

FLOPS, MEMORY, GPU_BYTES = 989e12, 3.35e12, 80e9  # H100 SXM: NVIDIA's data sheet, bf16 dense and HBM3
TRAIN_SHARE, PREFILL_SHARE, DECODE_SHARE = 0.4, 0.5, 0.6  # of FLOPS, FLOPS and MEMORY; assumed
NODE, NODE_LINK, NET_LINK = 8, 450e9, 50e9  # GPUs of a node; bytes/s a GPU: NVLink 4 and 400 Gb/s, by data sheet
LINK_SHARE = 0.7  # of the links that FSDP or a broadcast reaches; assumed
FILE_NODE, FILE_SHARED = 10e9, 20e9  # bytes/s: shared memory of a node; a shared file system, in all; assumed
PCIE = 50e9  # bytes/s of a GPU from and to the host, PCIe 5; assumed
STEP_SECONDS = 0.004  # a decoding step's host time; assumed
PROMPT, RESPONSE, TURN_SECONDS = 500, 2000, 0.5  # mean tokens of a rollout; an environment's answer; assumed
GROUP, ROLLOUTS_OF_GPU = 8, 16  # rollouts of a group; of a step, for each GPU; assumed
LETTER = {"sampling": "A", "stragglers": "T", "training": "R", "sync": "Y", "driver": "D"}
SIZES = (8, 16, 32, 64, 128, 256, 512)
BUSY = 192  # rollouts of a replica, where policies of routing are compared
SEQUENCES, PASS_TOKENS = 256, 16384  # backend.max_num_seqs and backend.micro_batch_tokens
OFF_POLICY = 2  # batches ahead, where asynchronous


@dataclass(frozen=True)
class Model:
    """Shapes from the models' config.json: Qwen2.5-7B and -32B, Llama-3-70B. `tp`: GPUs of a replica."""

    name: str
    weights: float
    kv_bytes: int  # of a token: 2 (K, V) x layers x KV heads x head size x 2 bytes
    tp: int


MODELS = (
    Model("7B", 7.6e9, 2 * 28 * 4 * 128 * 2, 1),
    Model("32B", 32.8e9, 2 * 64 * 8 * 128 * 2, 2),
    Model("70B", 70.6e9, 2 * 80 * 8 * 128 * 2, 4),
)
MOST_GROUPS = 96  # of a trace
TRACE, COSTS = RESULTS / "rollout_trace.json", RESULTS / "cluster_costs-cpu.json"

# --- sampling ------------------------------------------------------------------------------------


@dataclass(eq=False)
class Rollout:
    group: routing.SamplingGroup
    turns: list[tuple[float, float]]  # tokens that its context gains, and that are sampled
    turn: int = 0
    context: float = 0.0
    replica: int = 0


class Replica:
    """Open sequences advance together: one that joins at `tokens` ends that many later. Prefills
    stall it. The cache forgets what was used longest ago."""

    def __init__(self, model: Model):
        self.model, self.clock, self.tokens, self.stall, self.context = model, 0.0, 0.0, 0.0, 0.0
        self.open: list[tuple[float, int, Rollout]] = []
        self.waiting: list[tuple[int, Rollout]] = []
        self.cache: OrderedDict[object, float] = OrderedDict()  # tokens of a group's prompt or a rollout
        self.cached = self.prefilled = self.asked = 0.0
        self.room = (model.tp * GPU_BYTES * 0.9 - 2 * model.weights) / model.kv_bytes  # tokens

    def next_end(self) -> float:
        if not self.open:
            return float("inf")
        left = max(0.0, self.open[0][0] - self.tokens)
        return self.clock + self.stall + left * step_seconds(self.model, len(self.open), self.context)

    def to(self, now: float) -> None:
        seconds, self.clock = now - self.clock, now
        paid = min(seconds, self.stall)
        self.stall -= paid
        if self.open:
            self.tokens += (seconds - paid) / step_seconds(self.model, len(self.open), self.context)

    def add(self, number: int, rollout: Rollout) -> None:
        gained, sampled = rollout.turns[rollout.turn]
        prompt = rollout.context + gained
        if self.open and (len(self.open) == SEQUENCES or self.context + prompt + sampled > self.room):
            self.waiting.append((number, rollout))
            return
        known = min(prompt, max(self.cache.get(rollout, 0.0), self.cache.get(rollout.group, 0.0)))
        self.asked, self.prefilled = self.asked + prompt, self.prefilled + prompt - known
        self.stall += 2 * self.model.weights * (prompt - known) / (self.model.tp * FLOPS * PREFILL_SHARE)
        rollout.context = prompt + sampled
        self.keep(rollout.group, rollout.turns[0][0])
        self.keep(rollout, rollout.context)
        self.context += rollout.context
        heapq.heappush(self.open, (self.tokens + sampled, number, rollout))

    def keep(self, key: object, tokens: float) -> None:
        self.cached += tokens - self.cache.pop(key, 0.0)
        self.cache[key] = tokens
        while self.cached > self.room:
            self.cached -= self.cache.popitem(last=False)[1]

    def finish(self) -> Rollout:
        rollout = heapq.heappop(self.open)[2]
        self.context -= rollout.context
        waiting, self.waiting = self.waiting, []
        for number, other in waiting:
            self.add(number, other)
        return rollout


def step_seconds(model: Model, sequences: int, context: float) -> float:
    """Of a token of each: the host, then the weights and the context read, or the arithmetic."""
    read = (2 * model.weights + context * model.kv_bytes) / (model.tp * MEMORY * DECODE_SHARE)
    return STEP_SECONDS + max(read, 2 * model.weights * sequences / (model.tp * FLOPS * PREFILL_SHARE))


class RoundRobin(routing.Router):
    def _choose(self, group: routing.SamplingGroup, serving: Sequence[int]) -> int:
        self._next += 1
        return serving[self._next % len(serving)]


def rollouts_of(trace: Sequence[Sequence[Sequence[Sequence[int]]]], groups: int) -> list[list[Rollout]]:
    """Groups of the trace, drawn again, with its turns; its tokens scaled to PROMPT and RESPONSE."""
    rng = np.random.default_rng(0)
    members = [rollout for group in trace for rollout in group]
    prompt = PROMPT / np.mean([rollout[0][0] for rollout in members])
    response = RESPONSE / np.mean([sum(sampled for _, sampled in rollout) for rollout in members])
    drawn = []
    for place in rng.integers(len(trace), size=groups):
        group = routing.SamplingGroup(zlib.crc32(str(len(drawn)).encode()))
        turns = [[(prompt * g, response * s) for g, s in rollout] for rollout in trace[place]]
        drawn.append([Rollout(group, turns_of) for turns_of in turns])
    return drawn


@dataclass
class Sampled:
    seconds: float  # until the last rollout
    steady: float  # that the middle third of the tokens would take for all
    cache_hits: float
    group_seconds: float  # mean of a group


def sample(model: Model, replicas: int, groups: Sequence[Sequence[Rollout]], router: routing.Router) -> Sampled:
    """All groups begin at once."""
    places, numbers, serving = [Replica(model) for _ in range(replicas)], itertools.count(), range(replicas)
    events: list[tuple[float, int, int, Rollout | None]] = []  # a replica's next end, or a rollout's next turn
    newest = [0] * replicas  # of each replica's events
    done: list[tuple[float, float]] = []
    ends: dict[routing.SamplingGroup, float] = {}

    def look_at(replica: int) -> None:
        newest[replica] = number = next(numbers)
        if (end := places[replica].next_end()) < float("inf"):
            heapq.heappush(events, (end, number, replica, None))

    def submit(now: float, rollout: Rollout) -> None:
        rollout.replica = router.open(rollout.group, 1, serving)
        places[rollout.replica].to(now)
        places[rollout.replica].add(next(numbers), rollout)
        look_at(rollout.replica)

    for rollout in itertools.chain(*groups):
        submit(0.0, rollout)
    while events:
        now, number, replica, waiting = heapq.heappop(events)
        if waiting:
            submit(now, waiting)
        elif number == newest[replica]:
            places[replica].to(now)
            rollout = places[replica].finish()
            look_at(replica)
            router.close(rollout.group, 1, replica)
            done.append((now, rollout.turns[rollout.turn][1]))
            rollout.turn += 1
            if rollout.turn < len(rollout.turns):
                heapq.heappush(events, (now + TURN_SECONDS, next(numbers), replica, rollout))
            else:
                ends[rollout.group] = now
    total = np.cumsum([tokens for _, tokens in done])
    first, last = (done[int(np.searchsorted(total, share * total[-1]))][0] for share in (1 / 3, 2 / 3))
    hits = 1 - sum(place.prefilled for place in places) / sum(place.asked for place in places)
    return Sampled(done[-1][0], 3 * (last - first), float(hits), float(np.mean(list(ends.values()))))


# --- a step --------------------------------------------------------------------------------------


def train_seconds(model: Model, ranks: int, tokens: float, passes: int) -> float:
    """Of the rank with most tokens and passes: a pass is its arithmetic, or its weights gathered twice
    and its gradients reduced, whichever is longer."""
    link = LINK_SHARE * (NODE_LINK if ranks <= NODE else min(NODE_LINK, NODE * NET_LINK))
    return max(6 * model.weights * tokens / (FLOPS * TRAIN_SHARE), passes * (2 + 2 + 4) * model.weights / link)


def cut(ranks: int, lengths: Sequence[float]) -> tuple[float, int]:
    """The most tokens and the most passes of a rank, as batching.py divides the rows."""
    rows_R = _cut([_Row([], [], [], int(length)) for length in sorted(lengths, reverse=True)], ranks)
    tokens = max(sum(row.length for row in rows) for rows in rows_R)
    return tokens, max(len(_batches(rows, PASS_TOKENS, True)) for rows in rows_R)


def sync_seconds(model: Model, gpus: int, ranks: int, replicas: int, how: str) -> tuple[float, float]:
    """Publish and load."""
    size = 2 * model.weights
    if how == "nccl":  # not offered: one broadcast, in which both sides are
        seconds = size / (LINK_SHARE * (NODE_LINK if gpus <= NODE else NET_LINK))
        return seconds, seconds
    on_node = min(replicas, NODE // model.tp)
    read = on_node * size / FILE_NODE
    written = size / FILE_NODE
    if gpus > NODE:  # a node reads a file once
        written, read = size / FILE_SHARED, max(read, math.ceil(replicas / on_node) * size / FILE_SHARED)
    return size / ranks / PCIE + written, read + size / model.tp / PCIE


def layouts(model: Model, gpus: int) -> list[tuple[int, int]]:
    """Ranks and replicas that fit: 16 bytes a weight in three quarters of the ranks' memory."""
    least = math.ceil(16 * model.weights / (0.75 * GPU_BYTES))
    return [(gpus - r * model.tp, r) for r in range(1, gpus // model.tp) if gpus - r * model.tp >= least]


def step(model: Model, gpus: int, asynchronous: bool, how: str, trace: Any, costs: dict[str, float]) -> dict[str, Any]:
    """The best layout's figures; of the layouts, the one that arithmetic without tails prefers."""
    groups_of_step = ROLLOUTS_OF_GPU * gpus // GROUP
    batches = 1 + OFF_POLICY * asynchronous
    groups = rollouts_of(trace, groups_of_step * batches)
    rollouts = [rollout for group in groups for rollout in group]
    tokens = sum(sampled for r in rollouts for _, sampled in r.turns) / batches
    lengths = [sum(g + s for g, s in r.turns) for r in rollouts[: len(rollouts) // batches]]
    train_work = 6 * model.weights * sum(lengths) / (FLOPS * TRAIN_SHARE)
    mean = float(np.mean(lengths))
    full = int(min(SEQUENCES, Replica(model).room / mean))
    sample_work = tokens * step_seconds(model, full, full * mean) / full * model.tp

    def estimate(layout: tuple[int, int]) -> float:
        ranks, replicas = layout
        count = max(1, min(full, len(rollouts) // replicas))
        sampling = tokens / replicas * step_seconds(model, count, count * mean) / count
        both = (
            sampling,
            train_seconds(model, ranks, sum(lengths) / ranks, math.ceil(sum(lengths) / ranks / PASS_TOKENS)),
        )
        publish, load = sync_seconds(model, gpus, ranks, replicas, how)
        return max(both[0] + load, both[1] + publish) if asynchronous else sum(both) + publish + load

    if not (fits := layouts(model, gpus)):
        return {}
    ranks, replicas = min(fits, key=estimate)
    sampled = sample(model, replicas, groups, routing.Router(replicas, deterministic=False))
    train, (publish, load) = (
        train_seconds(model, ranks, *cut(ranks, lengths)),
        sync_seconds(model, gpus, ranks, replicas, how),
    )
    calls = sum(len(r.turns) for r in rollouts) / batches
    driver = costs["driver s a call"] * calls + costs["driver s a sampled token"] * tokens
    driver += costs["driver s a trained token"] * sum(lengths)
    if asynchronous:
        parts = {"sampling": sampled.steady / batches + load, "training": train + publish, "driver": driver}
        seconds = max(parts.values())
    else:
        tail = sampled.seconds - sampled.group_seconds  # most groups wait for the last
        parts = {"sampling": sampled.seconds - tail, "stragglers": tail, "training": train, "sync": publish + load}
        parts["driver"] = max(0.0, driver - sampled.seconds)
        seconds = sum(parts.values())
    bottleneck = max(parts, key=lambda name: parts[name])
    if asynchronous and bottleneck != "driver":
        share = load / parts["sampling"] if bottleneck == "sampling" else publish / parts["training"]
        bottleneck = "sync" if share > 0.5 else bottleneck
    efficiency = (train_work + sample_work) / (gpus * seconds)
    return {"ranks": ranks, "replicas": replicas, "seconds": seconds, "efficiency": efficiency, "by": bottleneck}


# --- measured ------------------------------------------------------------------------------------


def measure_one() -> dict[str, float]:
    """Processor seconds of calls, which other work on the machine hardly moves; in one process."""
    with tempfile.TemporaryDirectory() as folder, ServiceClient(BackendConfig(engine="torch"), folder) as service:
        client = service.create_training_client("tiny")
        sampler = client.save_weights_and_get_sampling_client(follow=True)
        decoded = {8 * n: least_cpu(partial(bench.sample, sampler, n))[0] for n in (8, 16, 32)}
        trained = {n * bench.LENGTH: least_cpu(partial(bench.train, client, n))[0] for n in (16, 32, 64)}
    of_sequence, step = np.polyfit(list(decoded), [seconds / bench.NEW_TOKENS for seconds in decoded.values()], 1)
    of_token, of_pass = np.polyfit(list(trained), list(trained.values()), 1)
    costs = {"step": step, "step, a sequence": of_sequence, "pass": of_pass, "pass, a token": of_token}
    costs |= {"32 calls, one process": decoded[256], "a half step, one process": trained[64 * bench.LENGTH]}
    return {name: float(value) for name, value in costs.items()}


def measure_several() -> dict[str, float]:
    """With 2 ranks and 2 replicas: of the driver, and of all processes."""
    backend = BackendConfig(engine="torch", trainer_processes=2, sampler_replicas=2)
    with tempfile.TemporaryDirectory() as folder, ServiceClient(backend, folder) as service:
        client = service.create_training_client("tiny")
        small, large = (least_cpu(partial(bench.train, client, n)) for n in (16, 64))
        sampler = client.save_weights_and_get_sampling_client(follow=True)
        short, long = (least_cpu(partial(bench.sample, sampler, 32, new_tokens=n)) for n in (4, 32))
    return {
        "driver s a trained token": (large[0] - small[0]) / (48 * bench.LENGTH),
        "driver s a sampled token": max(0.0, long[0] - short[0]) / (32 * 8 * 28),
        "driver s a call": short[0] / 32,
        "32 calls, 2 replicas": long[1],
        "a half step, 2 ranks": large[1],
    }


def least_cpu(run: Callable[[], object], rounds: int = 3) -> tuple[float, float]:
    """Of this process, and of it and all below it; after a first run."""
    run()
    own, family = [], []
    for _ in range(rounds):
        before, spent = time.process_time(), bench.cpu_seconds()
        run()
        own.append(time.process_time() - before)
        family.append(bench.cpu_seconds() - spent)
    return min(own), min(family)


def predicted(costs: dict[str, float]) -> dict[str, float]:
    """Of benchmarks/cluster.py on two cores: the longest process, or all processes over the cores."""
    sequences = bench.PROMPTS * bench.SAMPLES

    def decode(sequences: int) -> float:
        rounds = math.ceil(sequences / SEQUENCES)
        return bench.NEW_TOKENS * (rounds * costs["step"] + sequences * costs["step, a sequence"])

    def train(tokens: int) -> float:
        return costs["pass"] + costs["pass, a token"] * tokens

    # two replicas make twice the steps of one process, of half the sequences each
    border = costs["32 calls, 2 replicas"] - costs["32 calls, one process"] - bench.NEW_TOKENS * costs["step"]
    border *= bench.PROMPTS / 32
    ranks = costs["a half step, 2 ranks"] - costs["a half step, one process"]
    tokens = bench.SEQUENCES * bench.LENGTH
    return {
        "1 process: training step, s": train(tokens),
        "1 replica: sampling, s": max(decode(sequences), (decode(sequences) + border) / 2),
        "2 ranks, shard: training step, s": train(tokens // 2) + (ranks - costs["pass"]) / 2,
        "2 replicas: sampling, s": max(decode(sequences // 2), (2 * decode(sequences // 2) + border) / 2),
        "1 process: sampling, s": decode(sequences),
    }


def record(folder: Path) -> None:
    """The trace of a run's transcripts: groups of rollouts of turns, tokens gained and sampled."""
    tokenizer = load_tokenizer("tiny")
    of_group: dict[tuple[str, int], list[list[list[int]]]] = {}
    for file in sorted((folder / "transcripts").glob("0*.jsonl")):
        for line in file.read_text().splitlines():
            member = json.loads(line)
            turns = [[len(tokenizer.encode(turn["prompt_text"])), len(turn["tokens"])] for turn in member["turns"]]
            of_group.setdefault((file.name, member["group"]), []).append(turns)
    groups = [rollouts for rollouts in of_group.values() if all(rollouts)]
    TRACE.write_text(json.dumps(groups[-MOST_GROUPS:], separators=(",", ":")) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--report", type=Path, default=RESULTS / "cluster_simulation.json", help="file of the figures")
    parser.add_argument("--record", type=Path, help="a run folder, whose transcripts become the trace")
    given = parser.parse_args()
    if given.record:
        record(given.record)
    if given.measure:
        COSTS.write_text(json.dumps(measure_one() | measure_several(), indent=2) + "\n")
    trace, costs = json.loads(TRACE.read_text()), json.loads(COSTS.read_text())
    figures: dict[str, float] = {}
    layouts_of: dict[str, str] = {}
    measured = json.loads((RESULTS / "cluster-cpu.json").read_text())["figures"]
    found = predicted(costs)
    for name, value, seen in [(n, v, measured[n]) for n, v in found.items()] + [
        (f"{several} against {one}, efficiency", found[one] / found[several] / 2, measured[one] / measured[several] / 2)
        for one, several in zip(list(found)[:2], list(found)[2:4], strict=True)
    ]:
        print(f"{name:90} predicted {value:6.3f}   measured {seen:6.3f}   {100 * (value / seen - 1):+.0f}%")
        figures |= {f"{name}, predicted": value, f"{name}, relative error": value / seen - 1}
    print("\nefficiency and bottleneck (sAmpling, sTragglers, tRaining, sYnc, Driver); - does not fit")
    print(f"{'GPUs':26}" + "".join(f"{gpus:>10}" for gpus in SIZES))
    for model, asynchronous, how in itertools.product(MODELS, (False, True), ("files", "nccl")):
        kind = f"{model.name} {'asynchronous' if asynchronous else 'synchronous'}, `{how}`"
        of_size = {gpus: step(model, gpus, asynchronous, how, trace, costs) for gpus in SIZES}
        print(
            f"{kind:26}"
            + "".join(f"{f['efficiency']:8.2f} {LETTER[f['by']]}" if f else f"{'-':>10}" for f in of_size.values()),
            flush=True,
        )
        for gpus, figure in of_size.items():
            if figure:
                figures[cell := f"{kind} | {gpus} GPUs"] = figure["efficiency"]
                layout = f"{figure['ranks']} ranks, {figure['replicas']} replicas"
                layouts_of[cell] = f"{layout}; limited by {figure['by']}"
    print(f"\n7B, 8 replicas, {BUSY} rollouts of each at once: cached share of prompts, a group's seconds, all seconds")
    for name, sampled in routings(trace).items():
        print(f"{name:24}{sampled.cache_hits:8.3f}{sampled.group_seconds:8.1f}{sampled.seconds:8.1f}")
        figures[f"{name} | cached share of the prompts"] = sampled.cache_hits
        figures |= {f"{name} | seconds of a group": sampled.group_seconds, f"{name} | of all": sampled.seconds}
    report = rounded({"benchmark": "cluster_simulation", **machine(), "layouts": layouts_of, "figures": figures})
    given.report.write_text(json.dumps(report, indent=2) + "\n")


def routings(trace: Any) -> dict[str, Sampled]:
    """The same rollouts by other policies, and by the router with another SLACK."""
    count, results = 8, {}
    routers = {f"SLACK {slack:g}": slack for slack in (1.0, 1.25, 1.5, 2.0, 4.0, float("inf"))}
    for name in [*routers, "plain hashing", "round robin"]:
        groups, usual = rollouts_of(trace, count * BUSY // GROUP), routing.SLACK
        router = RoundRobin(count, False) if name == "round robin" else routing.Router(count, name == "plain hashing")
        routing.SLACK = routers.get(name, usual)
        try:
            results[name] = sample(MODELS[0], count, groups, router)
        finally:
            routing.SLACK = usual
    return results


if __name__ == "__main__":
    main()
