"""The 0.5B shape (24 layers, 896 wide, vocabulary 151,936) with random weights on GSM8K, on this
machine: three supervised steps, then three of RL from their checkpoint, by the command lines.

    python -m benchmarks.half_b_gsm8k data_dir=gsm8k                 # train.jsonl, test.jsonl
    python -m benchmarks.half_b_gsm8k data_dir=gsm8k lora_rank=16 engine=vllm

Prints for both the peak of the resident set beside the planned one, seconds, losses, norms of the
gradient, and the largest gap between sampler and trainer logprobs.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import chz
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.report import ROOT, write_report
from posttrain.backend.config import BackendConfig
from posttrain.backend.memory import GIB
from posttrain.backend.memory_plan import planned
from posttrain.backend.models import model_config
from posttrain.backend.ranges import WHOLE
from posttrain.backend.tokenizers import CHAT_TEMPLATE, SPECIAL_TOKENS
from posttrain.backend.types import LoraConfig
from posttrain.tracking.command_line import run_command
from posttrain.tracking.metrics_log import read_metrics

LENGTH, SEQUENCES = 256, 8
SFT = "dataset=gsm8k dataset.batch_size=2 learning_rate=1e-5"
# All answers are wrong: with a baseline there would be nothing to train on.
RL = "env=gsm8k groups_per_batch=1 env.group_size=2 max_tokens=16 advantage=none learning_rate=1e-6"
BOTH = "max_steps=3 eval_every=0 wandb_project=None"


@chz.chz
class Config:
    """Supervised training and RL of a 0.5B shape on GSM8K."""

    data_dir: str = chz.field(doc="a folder with GSM8K's train.jsonl and test.jsonl")
    lora_rank: int = chz.field(default=0, validator=WHOLE, doc="rank of an adapter; 0 = all weights are trained")
    engine: Literal["torch", "vllm"] = chz.field(default="torch", doc="the sampler")
    model_name: str = chz.field(default="qwen2.5-0.5b-shape", doc="the preset whose shape is taken")

    @property
    def backend(self) -> BackendConfig:
        return BackendConfig(
            engine=self.engine,
            max_length=LENGTH,
            micro_batch_tokens=LENGTH,
            max_num_seqs=SEQUENCES,
            sampler_memory_gb=0.25,
        )


def save_model(folder: Path, preset: str, data_dir: Path) -> None:
    """Random weights, and byte-level BPE of the training questions, filled up to the vocabulary."""
    config = model_config(preset)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    rows = [json.loads(line) for line in (data_dir / "train.jsonl").read_text().splitlines()]
    tokenizer.train_from_iterator((row["question"] + "\n" + row["answer"] for row in rows), trainer)
    print(f"{tokenizer.get_vocab_size():,} tokens learnt from {len(rows):,} questions", flush=True)
    learnt = json.loads(tokenizer.to_str())
    vocabulary = learnt["model"]["vocab"]
    vocabulary |= {f"unused{i}": i for i in range(len(vocabulary), config.vocab_size)}
    pad, end, *_ = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(learnt)),
        pad_token=pad,
        eos_token=end,
        chat_template=CHAT_TEMPLATE,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    fast.save_pretrained(folder)


def run(command: str, *options: str) -> dict[str, Any]:
    """Seconds and peak of the resident set, in GiB, of a command line."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command.split(), *options], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} ended with {os.waitstatus_to_exitcode(status)}")
    return {"seconds": time.perf_counter() - start, "peak, GiB": usage.ru_maxrss / 2**20}


def main(config: Config) -> None:
    data, load = Path(config.data_dir).resolve(), os.getloadavg()[0]
    lora = LoraConfig(config.lora_rank) if config.lora_rank else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", config.model_name, data)
        shared = [f"model_name={folder / 'model'}", f"lora_rank={config.lora_rank}", *BOTH.split()]
        shared += [f"backend.{option}={value}" for option, value in changed(config.backend).items()]
        logs = {"sft": folder / "sft", "rl": folder / "rl"}
        runs = {
            "sft": run(
                f"supervised/train_cli.py {SFT}",
                *shared,
                f"dataset.path={data / 'train.jsonl'}",
                f"log_path={logs['sft']}",
            ),
            "rl": run(
                f"rl/train_cli.py {RL}",
                *shared,
                f"env.data_dir={data}",
                f"load_checkpoint_path={logs['sft'] / 'checkpoints/final'}",
                f"log_path={logs['rl']}",
            ),
        }
        for kind, figures in runs.items():
            plan = planned(str(folder / "model"), config.backend, lora, samples=kind == "rl").plan
            figures["planned, GiB"] = plan.peak / GIB
            print(plan.table())
        sft, rl = (read_metrics(log) for log in logs.values())
    runs["sft"]["nll, nats per token"] = values(sft, "train_mean_nll")
    runs["rl"]["norms of the gradient"] = values(rl, "optim/grad_norm")
    runs["rl"]["largest |dlogp|"] = max(values(rl, "optim/logprob_gap_max"))
    kind = f"lora{config.lora_rank}" if lora else "full"
    settings = {"model": config.model_name, "lora_rank": config.lora_rank, "sft": SFT, "rl": RL, "both": BOTH}
    ratios = {f"{run}: measured over planned": f["peak, GiB"] / f["planned, GiB"] for run, f in runs.items()}
    for name, figures in runs.items():
        for what in ("peak, GiB", "planned, GiB"):
            print(f"{name}: {what} {figures[what]:.2f}")
    print(f"rl: largest |dlogp| {runs['rl']['largest |dlogp|']:.1e}")
    write_report(f"half_b_gsm8k-{kind}-{config.engine}", runs, settings | changed(config.backend), load, ratios)


def changed(backend: BackendConfig) -> dict[str, Any]:
    defaults = chz.asdict(BackendConfig())
    return {name: value for name, value in chz.asdict(backend).items() if value != defaults[name]}


def values(steps: list[dict[str, Any]], metric: str) -> list[float]:
    return [step[metric] for step in steps if metric in step]


if __name__ == "__main__":
    run_command(main, Config)
