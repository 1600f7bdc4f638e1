"""Tokens per second of vLLM with a LoRA adapter of `small`, by backend.lora: added to the base's weights, or
computed beside them.

    python benchmarks/unmerged_adapters.py [--rounds 3]

The same prompts and seeds on both sides, each in a process of its own. Left out: several adapters at once, GPUs.
"""

import argparse
import json
import os
import statistics
import sys
import time

if not __package__:  # run as a file: the packages are one folder up
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np

from benchmarks.report import alternate, in_subprocess, over, wait_until_quiet, write_report
from posttrain.backend.config import BackendConfig
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import LoraConfig, ModelInput, SamplingParams

SIZE = {"model": "small", "rank": 16, "prompts": 64, "prompt_tokens": 32, "max_tokens": 32}
CALLS = 4  # the first is left out


def tokens_per_second(lora: str) -> float:
    """The median of the calls."""
    config = BackendConfig(engine="vllm", lora=lora, max_num_seqs=SIZE["prompts"])  # type: ignore[arg-type]
    rng, rates = np.random.default_rng(0), []
    with ServiceClient(config) as service:
        client = service.create_training_client(SIZE["model"], LoraConfig(SIZE["rank"]))
        sampler = client.save_weights_and_get_sampling_client()
        for call in range(CALLS):
            prompts = rng.integers(4, 260, (SIZE["prompts"], SIZE["prompt_tokens"])).tolist()
            start = time.perf_counter()
            params = SamplingParams(max_tokens=SIZE["max_tokens"], seed=call, stop=[])
            futures = [sampler.sample(ModelInput.from_ints(prompt), 1, params) for prompt in prompts]
            tokens = sum(len(future.result().sequences[0].tokens) for future in futures)
            rates.append(tokens / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", help="used by the script itself: one process")
    options = parser.parse_args()
    if options.side:
        print(json.dumps({"rate": tokens_per_second(options.side)}))
        return
    load = wait_until_quiet()
    sides = {lora: lambda lora=lora: in_subprocess(__file__, "--side", lora)["rate"] for lora in ("merged", "unmerged")}
    rates = alternate(sides, options.rounds)
    ratios = {
        **{f"{lora}: tokens per second": values for lora, values in rates.items()},
        "unmerged / merged": over(rates["unmerged"], rates["merged"]),
    }
    write_report("unmerged_adapters", {}, SIZE | {"rounds": options.rounds}, load, ratios)


if __name__ == "__main__":
    main()
