"""LaTRO (Chen et al. 2024, arXiv 2411.04282): latent reasoning rewarded by the policy's own
likelihood of the gold answer.

    J = E_x E_{z ~ pi(.|x)} [ log pi(y | x, z) ] - kl_coef KL( pi(.|x) || pi_0(.|x) )

K rationales z are sampled per question x; z's reward is log pi(y | x, z) minus the KL term, with a
leave-one-out baseline. Neither a reward model nor a grader is needed. README.md lists the
differences from the original.

    python recipes/latro/train.py                                                     # minutes on 2 cores; runs/latro
    python recipes/latro/train.py method=sft behavior_if_log_dir_exists=resume        # baseline, same warm start
    python recipes/latro/train.py method=verifier behavior_if_log_dir_exists=resume   # RL: 1 for the right answer
    python recipes/latro/train.py method=diagnose behavior_if_log_dir_exists=resume   # log p(y|x), log p(y|x, gold z)
    python recipes/latro/train.py dataset=gsm8k model_name=Qwen/Qwen2.5-0.5B-Instruct rloo_k=16 \\
        train_batch_size=384 learning_rate=5e-7
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import chz
import numpy as np

from posttrain.backend.config import BackendConfig
from posttrain.backend.models import PRESETS
from posttrain.backend.ranges import COUNT, LARGEST, LEARNING_RATE, NON_NEGATIVE, POSITIVE, SEED, WHOLE, Range
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.renderers import get_renderer
from posttrain.tracking.command_line import run_command
from posttrain.tracking.jsonl import write_atomically
from posttrain.tracking.metrics_log import print_metrics_table
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.run_folder import BehaviorIfExists, RunFolder
from posttrain.tracking.settings import read_settings
from posttrain.tracking.stages import Stage, run_stages
from recipes.latro.env import LatentRationales, VerifiedResponses
from recipes.latro.evaluation import Best, Evaluation, best_so_far
from recipes.latro.examples import TaskExamples
from recipes.latro.sizes import Sizes, derive_sizes, estimated_minutes
from recipes.latro.tasks import Task, TaskBuilder
from recipes.latro.toy import ToyBuilder
from recipes.warm_start import warm_start
from rl import train as rl_train
from rl.advantages import LeaveOneOut, NoBaseline
from rl.kl import KLPenalty
from rl.likelihood_reward import LikelihoodRewardBuilder
from supervised import train as supervised_train

DATASETS = {
    "toy": "recipes.latro.toy:ToyBuilder",
    "gsm8k": "recipes.latro.tasks:Gsm8kBuilder",
    "arc_challenge": "recipes.latro.tasks:ArcChallengeBuilder",
    "math": "recipes.latro.tasks:MathBuilder",
    "*.jsonl": "recipes.latro.tasks:JsonlBuilder train_path={}",
}
# Printed at the end.
HEADLINES = ("likelihood/answer_logprob", "env/all/useful", "env/all/finished", "test/env/all/correct")


@chz.chz
class Config:
    """Latent reasoning optimisation on a data set of questions and answers."""

    method: Literal["latro", "sft", "verifier", "diagnose"] = chz.field(
        default="latro",
        doc="LaTRO; for comparison SFT, or RL on whole responses with reward 1 for the right answer; or how much gold "
        "rationales help",
    )
    dataset: TaskBuilder = chz.field(default_factory=ToyBuilder, doc="questions, answers and their verifier")
    model_name: str = chz.field(default="tiny", doc="a preset, a local folder, or a Hugging Face hub name")
    load_checkpoint_path: str | None = chz.field(default=None, doc="initial weights; None = those of model_name")
    renderer_name: str | None = chz.field(
        default=None, doc="chat_template, plain or role_colon; None = plain for presets"
    )
    lora_rank: int = chz.field(default=0, validator=WHOLE, doc="rank of a LoRA adapter; 0 trains all weights")
    seed: int = chz.field(
        default=0, validator=SEED, doc="seed of weights, order and sampling; that of the split is dataset.split_seed"
    )
    warm_start_updates: int | None = chz.field(
        default=None,
        validator=WHOLE,
        doc="for a preset: supervised updates on demonstrations first; None = the data set's default, 0 = none",
    )
    warm_start_seed: int | None = chz.field(default=None, validator=SEED, doc="seed of the warm start; None = seed")

    rloo_k: int = chz.field(default=8, validator=COUNT, doc="rationales per question; the original takes 16")
    train_batch_size: int = chz.field(
        default=128,
        validator=COUNT,
        doc="rationales per update: per_device_train_batch_size * gradient_accumulation_steps * devices of the original",
    )
    rollout_batch_size: int | None = chz.field(
        default=None, validator=COUNT, doc="sequences decoded at once; None = backend.max_num_seqs"
    )
    response_length: int | None = chz.field(
        default=None, validator=COUNT, doc="maximum tokens of a rationale; None = the data set's default"
    )
    stop_token: Literal["eos", "both"] = chz.field(
        default="both", doc="special tokens that end a rationale: EOS, or EOS and padding"
    )
    stop_seqs: tuple[str, ...] | None = chz.field(
        default=None, doc="texts that end a rationale; None = how the data set's answers begin"
    )
    non_stop_penalty: bool = chz.field(
        default=True, doc="truncated rationales get penalty_reward_value * the mean reward"
    )
    penalty_reward_value: float = chz.field(
        default=2.0, validator=Range(1, LARGEST), doc="multiplies the mean reward, which is negative"
    )
    kl_coef: float = chz.field(
        default=0.05, validator=NON_NEGATIVE, doc="weight of the KL to the initial policy, in the reward"
    )
    likelihood_coef: float = chz.field(
        default=1.0, validator=NON_NEGATIVE, doc="weight of the likelihood term; the original has 0 (sft_penalty)"
    )
    baseline: Literal["leave_one_out", "none"] = chz.field(default="leave_one_out", doc="none is for comparison")
    sft_target: Literal["answer", "rationale"] = chz.field(
        default="answer", doc="method=sft: also train on the gold rationale"
    )

    num_train_epochs: float | None = chz.field(
        default=None, validator=POSITIVE, doc="passes over the questions; None = the data set's default"
    )
    max_updates: int | None = chz.field(
        default=None, validator=COUNT, doc="instead of num_train_epochs (total_episodes of the original, in updates)"
    )
    learning_rate: float = chz.field(
        default=3e-4, validator=LEARNING_RATE, doc="at the first update, falling to 0; a hub model wants 5e-7 to 1e-5"
    )
    max_grad_norm: float = chz.field(
        default=1.0,
        validator=NON_NEGATIVE,
        doc="clips the gradient of the mean over rationales, with method=sft of the sum over examples; 0 = no clipping",
    )
    num_evaluations: int = chz.field(
        default=10, validator=COUNT, doc="greedy evaluations on the validation split, with a checkpoint each"
    )
    sanity_check: bool = chz.field(default=False, doc="two updates on a few questions, as a test")
    log_path: str = log_path_field("runs/latro", "folder of the runs, one for each method")
    behavior_if_log_dir_exists: BehaviorIfExists = chz.field(
        default="ask", doc="what to do with existing run folders; resume also reuses a finished warm start"
    )
    backend: BackendConfig = chz.field(default_factory=BackendConfig, doc="how this machine trains and samples")

    def folder(self, stage: str) -> Path:
        return Path(self.log_path) / stage

    @property
    def is_preset(self) -> bool:
        return self.model_name in PRESETS

    @property
    def renderer(self) -> str | None:
        return self.renderer_name or ("plain" if self.is_preset else None)


async def main(config: Config) -> None:
    config = prepared(config)
    if config.method == "diagnose":
        needs = beginning(config)
        await run_stages(needs)
        results = await evaluation(config).diagnose(begin_path(config, needs), config.dataset.split()[1])
        print_metrics_table(results, "log p(answer), nats, validation split")
        return
    await run_stages([method_stage(config, beginning(config))])
    print_summary(config)


def method_stage(config: Config, needs: Sequence[Stage] = ()) -> Stage:
    """A method with its evaluation on the test set, in LOG_PATH/METHOD. Sizes that do not work together, and
    unusable data, are errors here, before a warm start."""
    train, validation = config.dataset.split()
    held_out = config.dataset.test_tasks() or validation
    make = partial(run_method, config, announced_sizes(config, train), held_out, begin_path(config, needs))
    always = config.behavior_if_log_dir_exists != "resume"
    return Stage(config.method, config.folder(config.method), config, make, needs, "summary.json", always)


async def run_method(config: Config, sizes: Sizes, held_out: list[Task], begin: str | None) -> None:
    train, evaluate = sft if config.method == "sft" else reinforced, evaluation(config)
    best = await train(config, sizes, begin)
    after = str(best.path) if best.path else begin
    print(f"best on the validation split: {best.value:.3f} after update {best.step}: {after}")
    last = config.folder(config.method) / "checkpoints" / "final"
    weights = {"before": begin, "after": after, "last": last}
    summary = {name: await evaluate(path, held_out) for name, path in weights.items()}
    write_atomically(config.folder(config.method) / "summary.json", json.dumps(summary, indent=2) + "\n")


def prepared(config: Config) -> Config:
    """The config with the defaults that depend on other options filled in."""
    backend = config.backend
    if config.rollout_batch_size:
        backend = chz.replace(backend, max_num_seqs=config.rollout_batch_size)
    if config.is_preset and backend.engine == "auto":
        # faster for models of this size
        backend = chz.replace(backend, engine="torch")
    config = chz.replace(
        config,
        backend=backend,
        response_length=config.response_length or config.dataset.response_length,
        num_train_epochs=config.num_train_epochs or config.dataset.num_train_epochs,
        stop_seqs=config.stop_seqs or config.dataset.stop_seqs,
        warm_start_updates=config.dataset.warm_start_updates
        if config.warm_start_updates is None
        else config.warm_start_updates,
        warm_start_seed=config.seed if config.warm_start_seed is None else config.warm_start_seed,
    )
    if not config.sanity_check:
        return config
    few = chz.replace(config.dataset, num_train=64, num_validation=8)
    return chz.replace(config, dataset=few, max_updates=2, num_evaluations=1, train_batch_size=2 * config.rloo_k)


def announced_sizes(config: Config, tasks: list[Task]) -> Sizes:
    """The run's sizes, printed. ConfigError for sizes that do not work together."""
    renderer = get_renderer(config.renderer, load_tokenizer(config.model_name, config.backend.max_length))
    groups = environment(config).groups(tasks, renderer)
    sizes = sizes_of(config, len(groups))
    print(sizes.lines())
    tokens = sizes.response_length + float(np.mean([len(group.prompt) + len(group.answer_tokens) for group in groups]))
    print(f"about {estimated_minutes(sizes, config.model_name, tokens):.1g} minutes, a rough estimate")
    return sizes


def sizes_of(config: Config, num_prompts: int) -> Sizes:
    assert config.response_length and config.num_train_epochs
    has_baseline = config.baseline == "leave_one_out" and config.method in ("latro", "verifier")
    return derive_sizes(
        num_prompts,
        config.rloo_k,
        2 if has_baseline else 1,
        config.train_batch_size,
        config.num_train_epochs,
        config.max_updates,
        config.num_evaluations,
        config.response_length,
    )


def beginning(config: Config) -> list[Stage]:
    """A preset's warm start; [] if a checkpoint is given or the model needs none."""
    if config.load_checkpoint_path or not (config.is_preset and config.warm_start_updates):
        return []
    stage = warm_start(
        config,
        TaskExamples(tasks=config.dataset, target="demonstrations", batch_size=128, seed=config.warm_start_seed or 0),
        seed=config.warm_start_seed or 0,
        lr_schedule="linear",
        num_epochs=config.warm_start_updates,
        max_steps=config.warm_start_updates,
        eval_every=50,
        **common(config, "warm_start"),
    )
    return [stage]


def begin_path(config: Config, needs: Sequence[Stage]) -> str | None:
    """The initial checkpoint of a method; None = the model without one."""
    return str(needs[0].result) if needs else config.load_checkpoint_path


def common(config: Config, stage: str) -> dict:
    return {
        "model_name": config.model_name,
        "renderer_name": config.renderer,
        "lora_rank": config.lora_rank,
        "keep_checkpoints": None,  # all, to choose the best
        "log_path": str(config.folder(stage)),
        "behavior_if_log_dir_exists": config.behavior_if_log_dir_exists,
        "backend": config.backend,
    }


def environment(config: Config, kind: type[LatentRationales] = LatentRationales) -> LatentRationales:
    assert config.response_length and config.stop_seqs
    return kind(
        tasks=config.dataset,
        response_length=config.response_length,
        stop_seqs=config.stop_seqs,
        stop_at_pad=config.stop_token == "both",
        batch_size=config.train_batch_size // max(1, config.rloo_k),
        group_size=config.rloo_k,
        seed=config.seed,
    )


def rl_config(config: Config, sizes: Sizes, begin: str | None) -> rl_train.Config:
    """Settings of the RL loop for LaTRO, or for the verifier. Losses are summed over rationales, so
    `max_grad_norm`, which is of their mean, is scaled.
    """
    likelihood = LikelihoodRewardBuilder(
        likelihood_coef=config.likelihood_coef,
        non_stop_penalty=config.non_stop_penalty,
        penalty_reward_value=config.penalty_reward_value,
    )
    verified = config.method == "verifier"
    return rl_train.Config(
        env=environment(config, VerifiedResponses if verified else LatentRationales),
        batch_reward=None if verified else likelihood,
        advantage=LeaveOneOut() if config.baseline == "leave_one_out" else NoBaseline(),
        kl=KLPenalty(coef=config.kl_coef, where="reward"),
        loss_fn="reinforce",
        grad_clip_norm=config.max_grad_norm * sizes.samples_per_update,
        load_checkpoint_path=begin,
        seed=config.seed,
        learning_rate=config.learning_rate,
        lr_schedule="linear",
        num_epochs=sizes.updates,  # an upper bound: max_steps decides
        max_steps=sizes.updates,
        eval_every=sizes.eval_every,
        save_every=sizes.eval_every,
        transcript_every=sizes.eval_every,
        **common(config, config.method),
    )


async def reinforced(config: Config, sizes: Sizes, begin: str | None) -> Best:
    """Trains; returns the best checkpoint on the validation split."""
    await rl_train.main(rl_config(config, sizes, begin))
    best = best_so_far(config.folder(config.method))
    assert best is not None
    return best


async def sft(config: Config, sizes: Sizes, begin: str | None) -> Best:
    """The baseline: the same number of updates and of sequences per update, on the answers with or
    without the gold rationale. Returns the best checkpoint on the validation split.
    """
    settings = supervised_train.Config(
        dataset=TaskExamples(
            tasks=config.dataset, target=config.sft_target, batch_size=sizes.samples_per_update, seed=config.seed
        ),
        load_checkpoint_path=begin,
        seed=config.seed,
        learning_rate=config.learning_rate,
        lr_schedule="linear",
        grad_clip_norm=config.max_grad_norm,
        num_epochs=sizes.updates,
        max_steps=sizes.updates,
        eval_every=sizes.eval_every,
        save_every=sizes.eval_every,
        **common(config, "sft"),
    )
    await supervised_train.main(settings)
    checkpoints = {record.step: record.path for record in RunFolder(config.folder("sft")).list_checkpoints()}
    return await evaluation(config).best_of({0: begin, **checkpoints}, config.dataset.split()[1])


def evaluation(config: Config) -> Evaluation:
    return Evaluation(
        config.model_name, config.renderer, environment(config), config.lora_rank, config.seed, config.backend
    )


def print_summary(config: Config) -> None:
    """Prints HEADLINES before and after, on the test set (or else the validation split)."""
    summary = read_settings(config.folder(config.method) / "summary.json")
    before, after = summary["before"], summary["after"]
    if not config.dataset.test_tasks():
        print("without a test set, on the validation split, which chose the checkpoint: `after` is too good")
    names = [*HEADLINES, f"test/env/all/maj@{config.rloo_k}"]
    for name in names:
        if name in before and name in after:
            print(f"{name:28s} {before[name]:8.3f} -> {after[name]:8.3f}")


if __name__ == "__main__":
    run_command(main, Config, {"dataset": DATASETS})
