"""TRL's side of the races: GRPOTrainer and SFTTrainer on the data, sizes and settings of benchmarks/clocked.py.

Run by rl_step_vs_trl.py and sft_step_vs_trl.py in a process of its own; TRL is no dependency of the project. Reporting,
checkpoints, progress bars, gradient checkpointing and shuffling are off, and the precision is fp32, as ours is. Time runs from
the end of one step to the end of the next.
"""

import json
import os
import sys
import tempfile
import time
from typing import Any

if not __package__:  # run as a file: the packages are one folder up
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer  # type: ignore[import-not-found]

from benchmarks.clocked import GROUP_SIZE, GROUPS, LEARNING_RATE, MAX_TOKENS, SFT_BATCH, step_times
from envs.arithmetic import ArithmeticTask


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))


def quiet(folder: str, steps: int) -> dict[str, Any]:
    """What both trainers are given."""
    return {
        "output_dir": folder,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }


def reward(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    return [float(text.strip() == gold) for text, gold in zip(completions, answer, strict=True)]


def race_grpo(model_path: str, steps: int, warmup: int) -> dict[str, Any]:
    """The same problems in the same order: 64 of each step's batch, 8 samples each, one optimizer step on all of them."""
    space = ArithmeticTask().space()
    numbers = [number for i in range(steps + warmup) for number in space.draw_train(GROUPS, [0, 1, i])]
    rows = [dict(zip(("prompt", "answer"), space.problem(number), strict=True)) for number in numbers]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            **quiet(folder, steps + warmup),
            per_device_train_batch_size=GROUPS * GROUP_SIZE,
            num_generations=GROUP_SIZE,
            max_completion_length=MAX_TOKENS,
            temperature=1.0,
            scale_rewards="none",
            loss_type="dr_grpo",
            shuffle_dataset=False,
        )
        model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path), AutoTokenizer.from_pretrained(model_path)
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
        metrics = trainer.state.log_history[-1]  # means over all steps, logged when training ends
    return {
        **step_times(clock.marks, warmup - 1),
        "reward": metrics["reward"],
        "answer_tokens": metrics["completions/mean_length"],
    }


def race_sft(model_path: str, steps: int, warmup: int) -> dict[str, Any]:
    """The same examples, tokenized beforehand, loss on the answers."""
    space, tokenizer = ArithmeticTask().space(), AutoTokenizer.from_pretrained(model_path)
    rows = []
    for i in range(steps + warmup):
        for number in space.draw_train(SFT_BATCH, [0, 2, 0, i]):
            question, answer = (tokenizer.encode(text) for text in space.problem(number))
            answer = [*answer, tokenizer.eos_token_id]
            rows.append({"input_ids": question + answer, "completion_mask": [0] * len(question) + [1] * len(answer)})
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            **quiet(folder, steps + warmup),
            per_device_train_batch_size=SFT_BATCH,
            completion_only_loss=True,
            shuffle_dataset=False,
        )
        model = AutoModelForCausalLM.from_pretrained(model_path)
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[clock]
        )
        outcome = trainer.train()
    return {**step_times(clock.marks, warmup - 1), "nll": outcome.training_loss}


if __name__ == "__main__":
    which, path, steps, warmup = sys.argv[1:]
    print(json.dumps({"grpo": race_grpo, "sft": race_sft}[which](path, int(steps), int(warmup))))
