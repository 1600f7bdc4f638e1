"""Block `small_engines`: vLLM's two model runners (`tiny` has the newer one on a GPU, `gpt2-tiny`
the older), eager.

If this block fails, every figure of later blocks is of a broken sampler.
"""

import random
import time

import chz
import numpy as np
import torch

from benchmarks.gpu.checks import Record
from benchmarks.gpu.data import prompt_of, trainer_logprobs
from posttrain.backend.config import BackendConfig, compute_dtype, training_device
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, Datum, ModelInput, SamplingParams

CONFIG = BackendConfig(engine="vllm", max_num_seqs=64, enforce_eager=True, reproducible=False, sampler_memory_gb=0.25)
STEPS = 20


def gap_bound() -> float:
    """Of the mean |dlogp|: rounding of fp32, or of bf16 logits."""
    return 1e-4 if compute_dtype(training_device()) == torch.float32 else 0.05


def mean_gap(
    client: TrainingClient,
    sampler: SamplingClient,
    temperature: float = 1.0,
    prompts: int = 4,
    samples: int = 2,
    max_tokens: int = 16,
) -> float:
    gaps = []
    for seed in range(prompts):
        prompt = prompt_of(40 + 40 * seed, seed)
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, stop=[])
        for sequence in sampler.sample(prompt, samples, params).result().sequences:
            gaps.append(
                np.abs(trainer_logprobs(client, prompt, sequence.tokens, temperature) - sequence.logprobs).mean()
            )
    return float(np.mean(gaps))


def check_noise(record: Record, name: str, sampler: SamplingClient) -> None:
    """Of a random model, whose distribution is nearly flat: new noise at every token, in every row,
    in every call.
    """
    params = SamplingParams(max_tokens=64, stop=[])
    calls = [sampler.sample(prompt_of(10), 16, params).result().sequences for _ in range(2)]
    first_G_T, second_G_T = (np.array([sequence.tokens for sequence in sequences]) for sequences in calls)
    record.at_most(f"{name}: neighbouring tokens equal", float((first_G_T[:, 1:] == first_G_T[:, :-1]).mean()), 0.1)
    record.at_most(f"{name}: rows equal", float((first_G_T[1:] == first_G_T[:-1]).mean()), 0.1)
    record.at_most(f"{name}: calls equal", float((first_G_T == second_G_T).mean()), 0.2)


def draws() -> list[float]:
    cuda = float(torch.rand((), device="cuda")) if torch.cuda.is_available() else 0.0
    return [random.random(), float(np.random.rand()), float(torch.rand(())), cuda]


def seed_all() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


def check_sampling(record: Record, name: str, client: TrainingClient, sampler: SamplingClient) -> None:
    check_stop_string(record, name, sampler, prompt_of(15))
    nucleus = sampler.sample(prompt_of(15), 64, SamplingParams(max_tokens=1, top_p=0.5, stop=[])).result().sequences
    probability = {sequence.tokens[0]: float(np.exp(sequence.logprobs[0])) for sequence in nucleus}
    record.at_most(f"{name}: probability of the nucleus", sum(probability.values()), 1.02)
    check_prompt_logprobs(record, name, client, sampler)


def check_stop_string(record: Record, name: str, sampler: SamplingClient, prompt: ModelInput) -> None:
    """Of a model that samples ids of its tokenizer after `prompt`."""
    tokenizer = sampler.get_tokenizer()
    free = sampler.sample(prompt, 1, SamplingParams(max_tokens=24, temperature=0.0, stop=[])).result().sequences[0]
    texts = [str(tokenizer.decode(free.tokens[start : start + 2])) for start in range(3, 20)]
    # a token is a byte, and half a character is no text
    text = next((text for text in texts if text and "\ufffd" not in text), None)
    if text is None:
        record.holds(f"{name}: a sampled text to stop at", False)
        return
    stopped = (
        sampler.sample(prompt, 1, SamplingParams(max_tokens=24, temperature=0.0, stop=[text])).result().sequences[0]
    )
    ends_there = stopped.stop_reason == "stop" and stopped.tokens == free.tokens[: len(stopped.tokens)]
    record.holds(f"{name}: stop string", ends_there and text in str(tokenizer.decode(stopped.tokens)))


def check_prompt_logprobs(record: Record, name: str, client: TrainingClient, sampler: SamplingClient) -> None:
    scored = sampler.compute_logprobs(prompt_of(200)).result()[1:]
    trained = trainer_logprobs(client, ModelInput.from_ints(prompt_of(200).to_ints()[:1]), prompt_of(200).to_ints()[1:])
    gap = np.abs(np.array(scored, dtype=np.float64) - trained).mean()
    record.at_most(f"{name}: prompt logprobs", float(gap), gap_bound())


def repeated(seed: int, times: int) -> ModelInput:
    return ModelInput.from_ints(prompt_of(5, seed).to_ints() * times)


def train_step(client: TrainingClient, seed: int, learning_rate: float = 1e-3) -> None:
    tokens = np.array(repeated(seed, 12).to_ints())
    inputs = {"target_tokens": tokens[1:], "weights": np.ones(len(tokens) - 1, dtype=np.float32)}
    client.forward_backward([Datum(ModelInput.from_ints(tokens[:-1].tolist()), inputs)], "cross_entropy")
    client.optim_step(AdamParams(learning_rate)).result()


def check_training(record: Record, name: str, client: TrainingClient) -> None:
    gaps, syncs = [], []
    for step in range(STEPS):
        train_step(client, step)
        start = time.perf_counter()
        sampler = client.save_weights_and_get_sampling_client()
        syncs.append(time.perf_counter() - start)
        gaps.append(mean_gap(client, sampler, 1.0 if step % 2 else 0.7))
    record.at_most(f"{name}: |dlogp| after each of {STEPS} steps, largest mean", max(gaps), gap_bound())
    record.figure(f"{name}: sync, ms", 1e3 * float(np.median(syncs)))


def check_model(record: Record, service: ServiceClient, model: str) -> None:
    client = service.create_training_client(model)
    seed_all()
    expected = draws()
    seed_all()
    start = time.perf_counter()
    sampler = client.save_weights_and_get_sampling_client()
    record.figure(f"{model}: start, s", time.perf_counter() - start)
    record.at_most(f"{model}: |dlogp|", mean_gap(client, sampler), gap_bound())
    record.holds(f"{model}: the program's generators are untouched", draws() == expected)
    with record.going_on(f"{model}: noise"):
        check_noise(record, model, sampler)
    with record.going_on(f"{model}: sampling"):
        check_sampling(record, model, client, sampler)
    with record.going_on(f"{model}: training"):
        check_training(record, model, client)
    with record.going_on(f"{model}: LoRA"):
        check_training(record, f"{model} lora", service.create_lora_training_client(model, rank=8))


def check_unmerged(record: Record) -> None:
    """The adapter beside the base's weights: a sync moves it alone. On a GPU passes may read these, too."""
    for lora in ("unmerged", "shared") if torch.cuda.is_available() else ("unmerged",):
        with record.going_on(f"{lora} LoRA"), ServiceClient(chz.replace(CONFIG, lora=lora)) as service:
            check_training(record, f"tiny {lora} lora", service.create_lora_training_client("tiny", rank=8))


def main() -> None:
    record = Record()
    for attempt in ("first", "again"):
        with ServiceClient(CONFIG) as service:
            if attempt == "first":
                for model in ("tiny", "gpt2-tiny"):
                    with record.going_on(model):
                        check_model(record, service, model)
            else:
                client = service.create_training_client("tiny", seed=1)
                record.at_most(
                    "opened again: |dlogp|",
                    mean_gap(client, client.save_weights_and_get_sampling_client()),
                    gap_bound(),
                )
    check_unmerged(record)
    if torch.cuda.is_available():
        record.figure("GiB in use after closing", torch.cuda.memory_allocated() / 2**30)
    record.print()


if __name__ == "__main__":
    main()
