"""RLHF in three stages (Ouyang et al. 2022), on a toy whose true reward is known:
envs/kind_words.py.

    sft            imitates human-like notes
    comparisons    the SFT policy writes two notes per name; the rule, in place of a human, picks the better one
    reward_model   a scalar Bradley-Terry model of the comparisons: the proxy reward
    rl             maximises the proxy, with a KL penalty to the SFT policy
    rl_no_penalty  the same without the penalty
    curve          true and proxy reward against the KL (Gao et al. 2022): over-optimisation

A finished stage is kept, an interrupted one resumes, and changed settings are an error
(posttrain/tracking/stages.py). The RL stages never use the rule; they log it as env/all/gold.

    python recipes/rlhf/train.py                               # all stages; runs/rlhf
    rm -r runs/rlhf/rl && python recipes/rlhf/train.py kl_coef=0.1
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from functools import partial
from pathlib import Path
from typing import Any

import chz
import numpy as np

from envs.kind_words import KindWordsExamplesBuilder, KindWordsPrompts, labeled_by_gold, names, prompt
from envs.reward_model_env import RewardModelEnvBuilder
from posttrain.backend.config import BackendConfig
from posttrain.backend.ranges import COUNT, LEARNING_RATE, NON_NEGATIVE, SEED
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.types import SamplingParams
from posttrain.renderers import get_renderer
from posttrain.tracking.command_line import run_command
from posttrain.tracking.jsonl import write_jsonl
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.stages import Stage, chosen, run_stages, training_stage
from preference import train_reward_model
from preference.bradley_terry import PreferencePairsBuilder, ScalarModelBuilder
from preference.comparisons import LabeledBuilder
from preference.types import Comparison
from recipes.rlhf.curve import plot_curve
from recipes.warm_start import shared_settings, torch_backend, warm_start
from rl import train as rl_train
from rl.kl import KLPenalty

WATCH_ONLY = 1e-9  # negligible, but above 0, so that the KL is logged


@chz.chz
class Config:
    """The whole pipeline."""

    stages: str = chz.field(default="sft,comparisons,reward_model,rl,rl_no_penalty,curve", doc="stages to run")
    model_name: str = chz.field(default="tiny", doc="a preset, a local folder, or a Hugging Face hub name")
    renderer_name: str = chz.field(default="plain", doc="role_colon, chat_template or plain")
    seed: int = chz.field(default=0, validator=SEED, doc="seed of weights, data and sampling")
    sft_steps: int = chz.field(default=200, validator=COUNT, doc="steps of imitation")
    num_comparisons: int = chz.field(default=3000, validator=COUNT, doc="pairs of notes to compare")
    reward_model_epochs: int = chz.field(default=3, validator=COUNT, doc="passes over the comparisons")
    rl_steps: int = chz.field(default=80, validator=COUNT, doc="steps of each of the two RL stages")
    rl_learning_rate: float = chz.field(default=3e-4, validator=LEARNING_RATE, doc="at the first step; falls linearly")
    kl_coef: float = chz.field(
        default=0.5, validator=NON_NEGATIVE, doc="weight of the KL penalty per token in the stage rl"
    )
    max_tokens: int = chz.field(
        default=64, validator=COUNT, doc="maximum tokens of a note; the SFT policy writes up to 40"
    )
    log_path: str = log_path_field("runs/rlhf", "folder of the stages")
    backend: BackendConfig = torch_backend()

    @property
    def folder(self) -> Path:
        return Path(self.log_path)


def comparisons(config: Config, policy: Path, file: Path) -> None:
    """Writes pairs of notes sampled from the SFT policy, labelled by the rule, as JSONL."""
    rng = np.random.default_rng(config.seed)
    prompts = [prompt(str(name)) for name in rng.choice(names(False), size=config.num_comparisons)]
    renderer = get_renderer(config.renderer_name, load_tokenizer(config.model_name))
    with ServiceClient(config.backend) as service:
        client = service.create_sampling_client(str(policy))
        stop = renderer.get_stop_sequences()
        futures = [
            client.sample(renderer.build_generation_prompt(messages), 2, SamplingParams(config.max_tokens, 2 * i, stop))
            for i, messages in enumerate(prompts)
        ]
        pairs = [[[renderer.parse_response(s.tokens)[0]] for s in future.result().sequences] for future in futures]
    labeled_D = [labeled_by_gold(Comparison(messages, *pair)) for messages, pair in zip(prompts, pairs, strict=True)]
    rows = [
        {"prompt": labeled.comparison.prompt_conversation, "completion_A": labeled.comparison.completion_A}
        | {"completion_B": labeled.comparison.completion_B, "label": labeled.label}
        for labeled in labeled_D
    ]
    write_jsonl(file, rows)


def curve(runs: dict[str, Path], file: Path) -> None:
    print(f"over-optimisation curve: {plot_curve(runs, file)}")


def stages_of(config: Config) -> list[Stage]:
    saving: dict[str, Any] = {"save_every": 50, "keep_checkpoints": 1}
    common = shared_settings(config) | saving
    folder, notes = config.folder, KindWordsExamplesBuilder(n_batches=config.sft_steps, batch_size=64, seed=config.seed)
    sft = warm_start(config, notes, folder / "sft", "sft", lr_schedule="linear", eval_every=50, **saving)
    file, settings = folder / "comparisons.jsonl", {"number": config.num_comparisons, "max_tokens": config.max_tokens}
    pairs = Stage("comparisons", file, settings, partial(comparisons, config, sft.result, file), [sft])
    labeled = LabeledBuilder(path=str(file), test_size=config.num_comparisons // 10, empty="drop")
    proxy_run = train_reward_model.Config(
        dataset=PreferencePairsBuilder(comparisons=labeled, batch_size=64, seed=config.seed),
        learning_rate=1e-3,
        num_epochs=config.reward_model_epochs,
        load_checkpoint_path=str(sft.result),  # the SFT policy's trunk, as in the paper
        log_path=str(folder / "reward_model"),
        **common,
    )
    proxy = training_stage("reward_model", train_reward_model.main, proxy_run, [sft, pairs])
    policies = []
    for name, kl_coef in (("rl", config.kl_coef), ("rl_no_penalty", WATCH_ONLY)):
        run = rl_train.Config(
            env=RewardModelEnvBuilder(
                prompts=KindWordsPrompts(),
                reward_model=ScalarModelBuilder(path=str(proxy.result), backend=config.backend),
                batch_size=16,
                group_size=8,
                seed=config.seed,
            ),
            load_checkpoint_path=str(sft.result),
            max_tokens=config.max_tokens,
            learning_rate=config.rl_learning_rate,
            lr_schedule="linear",
            num_epochs=config.rl_steps,
            max_steps=config.rl_steps,
            eval_temperature=1.0,
            kl=KLPenalty(coef=kl_coef),
            log_path=str(folder / name),
            **common,
        )
        policies.append(training_stage(name, rl_train.main, run, [sft, proxy]))
    runs = {f"KL penalty {config.kl_coef:g}": policies[0].path, "no penalty": policies[1].path}
    picture = folder / "curve.png"
    drawn = Stage("curve", picture, {}, partial(curve, runs, picture), policies, always=True)
    return [sft, pairs, proxy, *policies, drawn]


async def main(config: Config) -> None:
    await run_stages(chosen(stages_of(config), config.stages.split(",")))


if __name__ == "__main__":
    run_command(main, Config)
