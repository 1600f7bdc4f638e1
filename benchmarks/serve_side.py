"""The SDK's side of benchmarks/serve.py, which starts it in the SDK's own Python. Prints a JSON
object on its last line.
"""

import json
import os
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np


def cpu_seconds(server: int | None = None) -> float:
    """CPU time so far of this process, and of the process `server`."""
    own = time.process_time()
    if server is None:
        return own
    with open(f"/proc/{server}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return own + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rl_steps(settings: dict[str, Any], of: Any, api: Any, sdk: bool) -> list[tuple[float, float]]:
    """Seconds and CPU-seconds of each step: sync, sample, forward_backward with importance_sampling,
    optim_step. `of` is the training client, `api` has the types; the same calls on both sides."""
    rng, seconds = np.random.default_rng(0), []
    size, length = settings["group_size"], settings["prompt_tokens"]
    server = settings.get("server")
    for step in range(settings["steps"]):
        started = time.perf_counter(), cpu_seconds(server)
        sampler = of.save_weights_and_get_sampling_client()
        prompts = [rng.integers(4, 260, length).tolist() for _ in range(settings["groups"])]
        params = [
            api.SamplingParams(max_tokens=settings["max_tokens"], seed=1000 * step + i, stop=[])
            for i in range(len(prompts))
        ]
        futures = [
            sampler.sample(api.ModelInput.from_ints(prompt), size, p) for prompt, p in zip(prompts, params, strict=True)
        ]
        data = []
        for prompt, future in zip(prompts, futures, strict=True):
            for i, sequence in enumerate(future.result().sequences):
                tokens, answer = [*prompt, *sequence.tokens], len(sequence.tokens)
                zeros = np.zeros(length - 1, np.float32)
                advantages = np.full(answer, (-1.0) ** i, np.float32)
                arrays = {
                    "target_tokens": np.array(tokens[1:], np.int64),
                    "logprobs": np.concatenate([zeros, np.array(sequence.logprobs, np.float32)]),
                    "advantages": np.concatenate([zeros, advantages]),
                }
                if sdk:
                    arrays = {name: api.TensorData.from_numpy(array) for name, array in arrays.items()}
                data.append(api.Datum(model_input=api.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=arrays))
        done = of.forward_backward(data, "importance_sampling")
        of.optim_step(api.AdamParams(learning_rate=1e-5)).result()
        done.result()
        seconds.append((time.perf_counter() - started[0], cpu_seconds(server) - started[1]))
    return seconds


def one_token_samples(sampler: Any, api: Any, count: int) -> float:
    """Samples of one token a second, all outstanding at once."""
    prompt, started = api.ModelInput.from_ints([10, 20, 30, 40]), time.perf_counter()
    futures = [sampler.sample(prompt, 1, api.SamplingParams(max_tokens=1, seed=i, stop=[])) for i in range(count)]
    lengths = [len(future.result().sequences[0].tokens) for future in futures]
    assert lengths == [1] * count
    return count / (time.perf_counter() - started)


def main(settings: dict[str, Any]) -> None:
    warnings.simplefilter("ignore")
    import tinker  # pyright: ignore[reportMissingImports]
    from tinker import types  # pyright: ignore[reportMissingImports]

    def client(number: int = 0) -> Any:
        service = tinker.ServiceClient()
        return service.create_lora_training_client(base_model=settings["model"], rank=settings["rank"], seed=number)

    def samples_and_a_step(number: int) -> int:
        one = client(number)
        one_token_samples(one.save_weights_and_get_sampling_client(), types, settings["samples"])
        return len(rl_steps(settings, one, types, sdk=True))

    if settings["side"] == "step":
        answer: dict[str, Any] = {"seconds": rl_steps(settings, client(), types, sdk=True)}
    elif settings["side"] == "samples":
        sampler = tinker.ServiceClient().create_sampling_client(base_model=settings["model"])
        one_token_samples(sampler, types, 20)
        count, server = settings["samples"], settings["server"]
        both_before, own_before = cpu_seconds(server), cpu_seconds()
        answer = {"per_second": one_token_samples(sampler, types, count)}
        own = cpu_seconds() - own_before
        answer["client_ms"] = 1000 * own / count
        answer["server_ms"] = 1000 * (cpu_seconds(server) - both_before - own) / count
    else:
        with ThreadPoolExecutor(settings["clients"]) as pool:
            answer = {"finished": sum(pool.map(samples_and_a_step, range(settings["clients"])))}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
