"""Block `reproducible`: what backend.reproducible=true gives and costs: whether a sequence has the same
tokens alone and beside others, |dlogp| of sampler and trainer, and tokens/s with and without it.

    python -m benchmarks.gpu.reproducible [true|false]

Each mode runs in a process of its own: vLLM reads it when it is imported.
"""

import json
import subprocess
import sys

from benchmarks.gpu.checks import Record
from benchmarks.gpu.data import prompt_of
from benchmarks.gpu.small_engines import gap_bound, mean_gap
from benchmarks.gpu.timing import seconds
from posttrain.backend.config import BackendConfig, training_device
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import SamplingParams

ON_GPU = training_device().type == "cuda"
MODEL, ROWS, TOKENS = ("qwen2.5-0.5b-shape", 256, 128) if ON_GPU else ("tiny", 16, 16)


def measure(reproducible: bool) -> dict[str, float | bool]:
    config = BackendConfig(
        engine="vllm",
        max_length=512,
        max_num_seqs=ROWS,
        reproducible=reproducible,
        sampler_memory_gb=2 if ON_GPU else 0.25,
    )
    with ServiceClient(config) as service:
        client = service.create_training_client(MODEL)
        sampler = client.save_weights_and_get_sampling_client()

        def tokens(rows: int, max_tokens: int = TOKENS) -> list[list[int]]:
            params = SamplingParams(max_tokens=max_tokens, seed=3, stop=[])
            futures = [sampler.sample(prompt_of(20 + row % 50, row), 1, params) for row in range(rows)]
            return [future.result().sequences[0].tokens for future in futures]

        tokens(ROWS, 8)
        alone, beside = tokens(1), tokens(ROWS)[:1]
        speed = ROWS * TOKENS / seconds(lambda: tokens(ROWS))
        gap = mean_gap(client, sampler)
    return {"same tokens alone and beside others": alone == beside, "tokens/s": speed, "|dlogp|": gap}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1] == "true")), flush=True)
        return
    record = Record()
    for mode in ("true", "false"):
        command = [sys.executable, "-m", "benchmarks.gpu.reproducible", mode]
        lines = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.strip().splitlines()
        found = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
        record.holds(f"{mode}: ran", bool(found))
        for name, value in found.items():
            record.figure(f"reproducible={mode}: {name}", value)
        record.holds(f"{mode}: |dlogp|", found.get("|dlogp|", 0.0) <= gap_bound())
        record.holds(
            "true: the same tokens", mode == "false" or found.get("same tokens alone and beside others", False)
        )
    record.print()


if __name__ == "__main__":
    main()
