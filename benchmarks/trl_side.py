"""TRL's side of the races: GRPOTrainer, SFTTrainer and DPOTrainer on the data, sizes and settings
of benchmarks/clocked.py.

Run by the scripts *_step_vs_trl.py in a process of its own; TRL is no dependency of the project.
Reporting, checkpoints, progress bars, gradient checkpointing and shuffling are off, and the
precision is fp32, as ours is. Time runs from the end of one step to the end of the next.
"""

import json
import os
import sys
import tempfile
import time
from functools import partial
from typing import Any

if not __package__:  # run as a file: the packages are one folder up
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import (  # type: ignore[import-not-found]
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    SFTConfig,
    SFTTrainer,
)

from benchmarks.clocked import (
    DPO_BATCH,
    GROUP_SIZE,
    GROUPS,
    LEARNING_RATE,
    MAX_TOKENS,
    SFT_BATCH,
    PeakMemory,
    RandomPairsBuilder,
    step_times,
)
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
    """The same problems in the same order: 64 of each step's batch, 8 samples each, one optimizer
    step on all of them.
    """
    space = ArithmeticTask().space()
    numbers = [number for i in range(steps + warmup) for number in space.draw_train(GROUPS, [0, 1, i])]
    rows = [{"prompt": problem.question, "answer": problem.gold} for problem in map(space.problem, numbers)]
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
            problem = space.problem(number)
            question, answer = tokenizer.encode(problem.question), tokenizer.encode(problem.gold)
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
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        outcome = trainer.train()
    return {**step_times(clock.marks, warmup - 1), "nll": outcome.training_loss}


def race_dpo(model_path: str, steps: int, warmup: int, precompute: bool = False) -> dict[str, Any]:
    """The same pairs. By default the reference is a second model, asked at every step; with
    `precompute`, once before the first.
    """
    memory = PeakMemory()
    comparisons, _ = RandomPairsBuilder(num_pairs=DPO_BATCH * (steps + warmup))()
    rows = []
    for one in comparisons:
        messages = (one.comparison.prompt_conversation, one.comparison.completion_A, one.comparison.completion_B)
        texts = (side[0]["content"] for side in messages)
        rows.append(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            **quiet(folder, steps + warmup), per_device_train_batch_size=DPO_BATCH, precompute_ref_log_probs=precompute
        )
        model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path), AutoTokenizer.from_pretrained(model_path)
        trainer = DPOTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        outcome = trainer.train()
    return {**step_times(clock.marks, warmup - 1), "dpo_loss": outcome.training_loss, "peak_mib": memory.mib()}


RACES = {"grpo": race_grpo, "sft": race_sft, "dpo": race_dpo, "dpo_precomputed": partial(race_dpo, precompute=True)}

if __name__ == "__main__":
    which, path, steps, warmup = sys.argv[1:]
    print(json.dumps(RACES[which](path, int(steps), int(warmup))))
