"""RLHF in its three stages (Ouyang et al. 2022), on a toy whose true reward is known: envs/kind_words.py.

    sft            imitate notes as people write them
    comparisons    the imitator writes two notes to a name; the rule, in the place of a person, says which is better
    reward_model   a scalar model learns that by Bradley and Terry: the proxy reward
    rl             the proxy is maximised, with a KL penalty that keeps the policy near the imitator
    rl_no_penalty  the same without the penalty
    curve          true and proxy reward against the KL to the imitator (Gao et al. 2022): over-optimisation

Each stage leaves a folder in LOG_PATH, and beside it the settings that made it and what it was made from. A stage that is there is not
run again, one that was interrupted goes on where it was, one that was made with other settings is refused:

    python recipes/rlhf/train.py                               # all stages; runs/rlhf
    rm -r runs/rlhf/rl && python recipes/rlhf/train.py kl_coef=0.1

The RL stages never see the rule. They log its verdict as env/all/gold.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import chz
import numpy as np

from envs.kind_words import KindWordsExamplesBuilder, KindWordsPrompts, labeled_by_gold, names, prompt
from envs.reward_model_env import RewardModelEnvBuilder
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, LEARNING_RATE, NON_NEGATIVE, SEED
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.types import SamplingParams
from posttrain.renderers import get_renderer
from posttrain.tracking.command_line import run_command
from posttrain.tracking.jsonl import write_atomically
from posttrain.tracking.settings import already_made, read_settings
from preference import train_reward_model
from preference.bradley_terry import PreferencePairsBuilder, ScalarModelBuilder
from preference.comparisons import LabeledBuilder
from preference.types import Comparison
from recipes.rlhf.curve import plot_curve
from rl import train as rl_train
from rl.kl import KLPenalty
from supervised import train as supervised_train

WATCH_ONLY = 1e-9  # a KL penalty too small to matter: the KL is measured all the same


@chz.chz
class Config:
    """The whole pipeline."""

    stages: str = chz.field(default="sft,comparisons,reward_model,rl,rl_no_penalty,curve", doc="which to run, in this order")
    model_name: str = chz.field(default="tiny", doc="a preset, a local folder, or a Hugging Face hub name")
    renderer_name: str = chz.field(default="plain", doc="role_colon, chat_template or plain")
    seed: int = chz.field(default=0, validator=SEED, doc="of weights, data and sampling")
    sft_steps: int = chz.field(default=200, validator=COUNT, doc="steps of imitation")
    num_comparisons: int = chz.field(default=3000, validator=COUNT, doc="pairs of notes that are judged")
    reward_model_epochs: int = chz.field(default=3, validator=COUNT, doc="passes over the comparisons")
    rl_steps: int = chz.field(default=80, validator=COUNT, doc="steps of each of the two RL stages")
    rl_learning_rate: float = chz.field(default=3e-4, validator=LEARNING_RATE, doc="at the first step; falls linearly")
    kl_coef: float = chz.field(default=0.5, validator=NON_NEGATIVE, doc="weight of the KL penalty per token in the stage rl")
    max_tokens: int = chz.field(default=64, validator=COUNT, doc="longest note; those who imitate write up to 40")
    log_path: str = chz.field(
        default="runs/rlhf", munger=lambda _, path: str(Path(path).expanduser()), doc="folder of the stages"
    )
    backend: BackendConfig = chz.field(
        default_factory=lambda: BackendConfig(engine="torch"), doc="how this machine trains and samples"
    )

    def folder(self, stage: str) -> Path:
        return Path(self.log_path) / stage

    def final(self, stage: str) -> str:
        return str(self.folder(stage) / "checkpoints" / "final")


def sft(config: Config) -> None:
    examples = KindWordsExamplesBuilder(n_batches=config.sft_steps, batch_size=64, seed=config.seed)
    asyncio.run(
        supervised_train.main(
            supervised_train.Config(
                dataset=examples, learning_rate=2e-3, lr_schedule="linear", eval_every=50, **_common(config, "sft")
            )
        )
    )


def comparisons(config: Config) -> None:
    """Pairs that were sampled from the imitator, with the rule's label, as JSONL."""
    rng = np.random.default_rng(config.seed)
    asked = [prompt(str(name)) for name in rng.choice(names(False), size=config.num_comparisons)]
    renderer = get_renderer(config.renderer_name, load_tokenizer(config.model_name))
    with ServiceClient(config.backend) as service:
        client = service.create_sampling_client(config.final("sft"))
        stop = renderer.get_stop_sequences()
        futures = [
            client.sample(renderer.build_generation_prompt(messages), 2, SamplingParams(config.max_tokens, 2 * i, stop))
            for i, messages in enumerate(asked)
        ]
        pairs = [[[renderer.parse_response(s.tokens)[0]] for s in future.result().sequences] for future in futures]
    labeled_D = [labeled_by_gold(Comparison(messages, *pair)) for messages, pair in zip(asked, pairs, strict=True)]
    rows = [
        {"prompt": one.comparison.prompt_conversation, "completion_A": one.comparison.completion_A}
        | {"completion_B": one.comparison.completion_B, "label": one.label}
        for one in labeled_D
    ]
    write_atomically(config.folder("comparisons.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))


def reward_model(config: Config) -> None:
    pairs = LabeledBuilder(path=str(config.folder("comparisons.jsonl")), test_size=config.num_comparisons // 10, empty="drop")
    asyncio.run(
        train_reward_model.main(
            train_reward_model.Config(
                dataset=PreferencePairsBuilder(comparisons=pairs, batch_size=64, seed=config.seed),
                learning_rate=1e-3,
                num_epochs=config.reward_model_epochs,
                load_checkpoint_path=config.final("sft"),  # the imitator's trunk, as in the paper
                **_common(config, "reward_model"),
            )
        )
    )


def rl(config: Config, stage: str = "rl", kl_coef: float | None = None) -> None:
    env = RewardModelEnvBuilder(
        prompts=KindWordsPrompts(),
        reward_model=ScalarModelBuilder(path=config.final("reward_model"), backend=config.backend),
        batch_size=16,
        group_size=8,
        seed=config.seed,
    )
    asyncio.run(
        rl_train.main(
            rl_train.Config(
                env=env,
                load_checkpoint_path=config.final("sft"),
                max_tokens=config.max_tokens,
                learning_rate=config.rl_learning_rate,
                lr_schedule="linear",
                num_epochs=config.rl_steps,
                max_steps=config.rl_steps,
                eval_temperature=1.0,
                kl=KLPenalty(coef=config.kl_coef if kl_coef is None else kl_coef),
                **_common(config, stage),
            )
        )
    )


def rl_no_penalty(config: Config) -> None:
    rl(config, "rl_no_penalty", WATCH_ONLY)


def curve(config: Config) -> None:
    penalty = read_settings(config.folder("rl") / "config.json")["kl"]["coef"]  # what that run was made with
    runs = {f"KL penalty {penalty:g}": config.folder("rl"), "no penalty": config.folder("rl_no_penalty")}
    print(f"over-optimisation curve: {plot_curve(runs, config.folder('curve.png'))}")


def _common(config: Config, stage: str) -> dict:
    """What the training stages have in common. An interrupted stage is resumed."""
    return {
        "model_name": config.model_name,
        "renderer_name": config.renderer_name,
        "seed": config.seed,
        "save_every": 50,
        "keep_checkpoints": 1,
        "log_path": str(config.folder(stage)),
        "behavior_if_log_dir_exists": "resume",
        "backend": config.backend,
    }


STAGES: dict[str, Callable[[Config], None]] = {
    stage.__name__: stage for stage in (sft, comparisons, reward_model, rl, rl_no_penalty, curve)
}


# The settings that each stage depends on, those of the stages before it included.
_SFT = ("model_name", "renderer_name", "seed", "sft_steps", "backend")
_COMPARISONS = (*_SFT, "num_comparisons", "max_tokens")
_REWARD_MODEL = (*_COMPARISONS, "reward_model_epochs")
_RL = (*_REWARD_MODEL, "rl_steps", "rl_learning_rate")
DEPENDS_ON = {
    "sft": _SFT,
    "comparisons": _COMPARISONS,
    "reward_model": _REWARD_MODEL,
    "rl": (*_RL, "kl_coef"),
    "rl_no_penalty": _RL,
}


def is_done(config: Config, stage: str) -> bool:
    """ConfigError where it was done with other settings."""
    if stage == "curve":
        return False
    result = config.folder("comparisons.jsonl") if stage == "comparisons" else Path(config.final(stage))
    settings = {name: getattr(config, name) for name in DEPENDS_ON[stage]}
    return already_made(result, settings, config.folder(f"{stage}.made_with.json"))


def main(config: Config) -> None:
    stages = config.stages.split(",")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise ConfigError(f"stages={','.join(unknown)}: the stages are {', '.join(STAGES)}")
    for stage in stages:
        if is_done(config, stage):
            print(f"--- {stage}: is there; delete it in {config.log_path} to run it again")
        else:
            print(f"--- {stage}", flush=True)
            STAGES[stage](config)


if __name__ == "__main__":
    run_command(main, Config)
