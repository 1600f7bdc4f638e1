"""Peak memory of one training pass at a vocabulary of 151,936: our chunked logprobs against the
plain Hugging Face loss.

    python benchmarks/memory_vs_hf_loss.py

The same model and tokens, every position trained on, forward and backward, each side in a process
of its own: Trainer.run(data, "cross_entropy") against model(input_ids=...,
labels=...).loss.backward(). On a CPU the peak is that of the resident memory above what the process
held before the pass; on a GPU it is torch's own count, weights and gradients included. CPU: 2
layers, 128 wide, 4 x 1024 tokens. GPU: Qwen2.5-0.5B's shape, 16 x 1024, bf16 autocast. Left out:
the optimizer's step, the same for both.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

if not __package__:  # run as a file: the packages are one folder up
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks.report import alternate, in_subprocess, over, wait_until_quiet, write_report
from posttrain.backend.config import BackendConfig
from posttrain.backend.trainer import Trainer
from posttrain.backend.types import Datum, ModelInput

VOCABULARY = 151_936
GPU_MODEL, GPU_SEQUENCES, CPU_SEQUENCES, LENGTH = "qwen2.5-0.5b-shape", 16, 4, 1024


def save_small_model(folder: str) -> None:
    config = Qwen3Config(
        vocab_size=VOCABULARY, num_hidden_layers=2, hidden_size=128, intermediate_size=384, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def our_pass(trainer: Trainer, tokens_BT: np.ndarray) -> None:
    weights = np.ones(LENGTH, dtype=np.float32) / tokens_BT[:, 1:].size
    data = [
        Datum(ModelInput.from_ints(t[:-1].tolist()), {"target_tokens": t[1:], "weights": weights}) for t in tokens_BT
    ]
    trainer.run(data, "cross_entropy")


def plain_pass(trainer: Trainer, tokens_BT: np.ndarray) -> None:
    tokens = torch.from_numpy(tokens_BT).to(trainer.device)
    with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.device.type == "cuda"):
        loss = trainer.base(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()


def measure(side: str, model: str, sequences: int) -> dict[str, float]:
    """Peak GiB, seconds, and the norm of the gradient: that of both sides must be the same."""
    trainer = Trainer(model, BackendConfig(max_length=LENGTH, micro_batch_tokens=sequences * LENGTH))
    tokens_BT = np.random.default_rng(0).integers(0, VOCABULARY, (sequences, LENGTH + 1))
    run = {"ours": our_pass, "plain": plain_pass}[side]
    run(trainer, tokens_BT[:1])  # warm-up, on a quarter of the tokens or less
    trainer.zero_grad()
    before = _reset_peak(trainer.device)
    start = time.perf_counter()
    run(trainer, tokens_BT)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    grads = [p.grad for p in trainer.named_trainable.values() if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm(grads).item()
    return {"peak_gib": (_peak(trainer.device) - before) / 2**30, "seconds": seconds, "grad_norm": grad_norm}


def _reset_peak(device: torch.device) -> int:
    """Bytes to subtract: what is resident now on a CPU, nothing on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return 0
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return _peak(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def compare(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cuda = torch.cuda.is_available()
        model, sequences = (GPU_MODEL, GPU_SEQUENCES) if cuda else (folder, CPU_SEQUENCES)
        if not cuda:
            save_small_model(folder)
        sides = {
            side: partial(in_subprocess, __file__, "--side", side, "--model", model, "--sequences", str(sequences))
            for side in ("ours", "plain")
        }
        load = wait_until_quiet()
        results = alternate(sides, rounds)
    best = {
        side: {key: min(outcome[key] for outcome in outcomes) for key in outcomes[0]}
        for side, outcomes in results.items()
    }
    write_report(
        "memory_vs_hf_loss",
        {f"{side}: {key}": value for side, measured in best.items() for key, value in measured.items()},
        {
            "model": GPU_MODEL if cuda else "2 layers, 128 wide",
            "vocabulary": VOCABULARY,
            "tokens": sequences * LENGTH,
            "rounds": rounds,
        },
        load,
        {
            f"plain / ours: {key}": over(*([outcome[key] for outcome in results[side]] for side in ("plain", "ours")))
            for key in best["ours"]
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=2, help="of each side the smallest figure counts, of the ratios the median"
    )
    parser.add_argument(
        "--side", choices=("ours", "plain"), help="used by the script itself: run one side, print what it took"
    )
    parser.add_argument("--model")
    parser.add_argument("--sequences", type=int, default=CPU_SEQUENCES)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments.model, arguments.sequences)))
    else:
        compare(arguments.rounds)


if __name__ == "__main__":
    main()
