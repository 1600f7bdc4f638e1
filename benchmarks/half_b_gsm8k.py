"""The 0.5B shape (24 layers, 896 wide, vocabulary 151,936) with random weights on GSM8K, on this
machine: three supervised steps, then three of RL from their checkpoint, by the command lines.

    python -m benchmarks.half_b_gsm8k data_dir=gsm8k                 # train.jsonl, test.jsonl
    python -m benchmarks.half_b_gsm8k data_dir=gsm8k lora_rank=16 engine=vllm

Prints the peak of the resident set beside the planned one, seconds, losses, and the largest gap
between sampler and trainer logprobs.
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
from posttrain.backend.models import model_config
from posttrain.backend.ranges import WHOLE
from posttrain.tracking.command_line import run_command
from posttrain.tracking.metrics_log import read_metrics

SHAPE, LENGTH = "qwen2.5-0.5b-shape", 512
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@chz.chz
class Config:
    """Supervised training and RL of a 0.5B shape on GSM8K."""

    data_dir: str = chz.field(doc="a folder with GSM8K's train.jsonl and test.jsonl")
    lora_rank: int = chz.field(default=0, validator=WHOLE, doc="rank of an adapter; 0 = all weights are trained")
    engine: Literal["torch", "vllm"] = chz.field(default="torch", doc="the sampler")


def save_model(folder: Path, data_dir: Path) -> None:
    """Random weights, and byte-level BPE of the training questions, filled up to the vocabulary."""
    config = model_config(SHAPE)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=151_000, special_tokens=special, initial_alphabet=alphabet)
    texts = [json.loads(line) for line in (data_dir / "train.jsonl").read_text().splitlines()]
    tokenizer.train_from_iterator((row["question"] + "\n" + row["answer"] for row in texts), trainer)
    print(f"{tokenizer.get_vocab_size():,} tokens learnt from {len(texts):,} questions")
    learnt = json.loads(tokenizer.to_str())
    vocabulary = learnt["model"]["vocab"]
    vocabulary |= {f"unused{i}": i for i in range(len(vocabulary), config.vocab_size)}
    filled = Tokenizer.from_str(json.dumps(learnt))
    fast = PreTrainedTokenizerFast(tokenizer_object=filled, eos_token=special[2], pad_token=special[0])
    fast.chat_template = TEMPLATE
    config.eos_token_id, config.pad_token_id = fast.eos_token_id, fast.pad_token_id
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    fast.save_pretrained(folder)


def run(script: str, *options: str) -> dict[str, Any]:
    """Seconds and peak of the resident set, in GiB, of a command line."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, script, *options], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{script} ended with {os.waitstatus_to_exitcode(status)}")
    return {"seconds": time.perf_counter() - start, "peak, GiB": usage.ru_maxrss / 2**20}


def main(config: Config) -> None:
    data, load = Path(config.data_dir).resolve(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", data)
        shared = [f"model_name={folder / 'model'}", f"lora_rank={config.lora_rank}", f"backend.max_length={LENGTH}"]
        shared += [f"backend.micro_batch_tokens={LENGTH}", "max_steps=3", "eval_every=0", "wandb_project=None"]
        rl = [f"env.data_dir={data}", "groups_per_batch=2", "env.group_size=4", "max_tokens=48", "learning_rate=1e-6"]
        rl += [f"backend.engine={config.engine}", "backend.max_num_seqs=8", "backend.sampler_memory_gb=0.25"]
        # All answers are wrong: with a baseline there would be nothing to train on.
        rl += ["advantage=none", f"load_checkpoint_path={folder / 'sft/checkpoints/final'}"]
        files = [f"dataset.path={data / 'train.jsonl'}", "dataset=gsm8k", "dataset.batch_size=4", "learning_rate=1e-5"]
        runs = {
            "sft": run("supervised/train_cli.py", *shared, *files, f"log_path={folder / 'sft'}"),
            "rl": run("rl/train_cli.py", "env=gsm8k", *shared, *rl, f"log_path={folder / 'rl'}"),
        }
        sft, steps = read_metrics(folder / "sft"), read_metrics(folder / "rl")
        gaps = [step["optim/logprob_gap_max"] for step in steps if "optim/logprob_gap_max" in step]
        losses = [step["train_mean_nll"] for step in sft if "train_mean_nll" in step]
        norms = [step["optim/grad_norm"] for step in steps if "optim/grad_norm" in step]
        figures = {**runs, "sft: nll, nats per token": losses, "rl: norms of the gradient": norms}
        figures |= {"rl: largest |dlogp|": max(gaps)}
        write_report("half_b_gsm8k", figures, chz.asdict(config), load, {})


if __name__ == "__main__":
    run_command(main, Config)
