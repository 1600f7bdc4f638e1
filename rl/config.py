"""The options of an RL run (train.py), and the combinations that are refused."""

from collections.abc import Callable
from typing import Any

import chz

from posttrain.backend.errors import ConfigError
from posttrain.backend.learning_rate import LRSchedule
from posttrain.backend.ranges import COUNT, LEARNING_RATE, NON_NEGATIVE, SAMPLING_TEMPERATURE, TEMPERATURE, WHOLE
from posttrain.tracking.run_config import log_path_field
from rl.advantages import AdvantageEstimator, GroupMean, GroupMeanStd, NoReward, SeatMean
from rl.critic import CriticConfig
from rl.data_processing import Reduction
from rl.distill import Distillation
from rl.kl import KLPenalty
from rl.length import LengthPenalty
from rl.mismatch import MismatchCorrection
from rl.rollouts import RolloutLimits
from rl.types import BatchRewardBuilder, RLDatasetBuilder
from supervised.evaluators import EvaluatedRunConfig


@chz.chz
class Config(EvaluatedRunConfig):
    """Reinforcement learning of a language model on an environment."""

    env: RLDatasetBuilder = chz.field(doc="the task: training and held-out environments")
    max_tokens: int | None = chz.field(
        default=None, validator=COUNT, doc="most tokens that a turn may have; None = what the environment recommends"
    )
    temperature: float = chz.field(
        default=1.0,
        validator=SAMPLING_TEMPERATURE,
        doc="sampling temperature of rollouts; the trainer applies the same",
    )
    limits: RolloutLimits = chz.field(
        default_factory=RolloutLimits, doc="limits of a rollout: turns, tokens, time, failures"
    )
    max_steps_off_policy: int = chz.field(
        default=0,
        validator=WHOLE,
        doc="asynchronous training: batches are sampled up to this many steps ahead; 0 = synchronous",
    )
    num_minibatches: int = chz.field(
        default=1,
        validator=COUNT,
        doc="streaming: parts of a batch; a part is trained on as soon as its groups are finished; 1 = the whole batch",
    )
    concurrent_rollouts: int | None = chz.field(
        default=None, validator=COUNT, doc="most rollouts in flight; None = no limit"
    )

    batch_reward: BatchRewardBuilder | None = chz.field(
        default=None, doc="rewards that a model computes for a whole batch at once"
    )
    advantage: AdvantageEstimator = chz.field(
        default_factory=GroupMean, doc="how the rewards of a group become advantages"
    )
    kl: KLPenalty = chz.field(default_factory=KLPenalty, doc="penalty against a frozen reference policy")
    length: LengthPenalty = chz.field(default_factory=LengthPenalty, doc="penalty on long answers, in the reward")
    entropy_coef: float = chz.field(
        default=0.0,
        validator=NON_NEGATIVE,
        doc="entropy bonus: adds entropy_coef * (mean logprob - logprob) to each token's advantage; 0 = none",
    )
    distill: Distillation = chz.field(
        default_factory=Distillation,
        doc="on-policy distillation: the reverse KL to a teacher is added to the advantages",
    )
    critic: CriticConfig = chz.field(
        default_factory=CriticConfig, doc="a value model whose advantages replace those of the group"
    )
    normalize_advantages: bool = chz.field(
        default=False, doc="shift and scale the token advantages of a batch to mean 0 and standard deviation 1"
    )
    remove_constant_reward_groups: bool = chz.field(
        default=False, doc="leave out groups whose members all got the same reward"
    )
    max_refills: int = chz.field(
        default=0,
        validator=WHOLE,
        doc="dynamic sampling: how often a group whose members all got the same reward may be replaced by a group of "
        "another problem; 0 = never",
    )
    train_on_truncated: bool = chz.field(default=True, doc="also train on rollouts that were cut off at max_tokens")
    loss_fn: str | Callable[..., Any] = chz.field(
        default="importance_sampling",
        doc="importance_sampling, reinforce, ppo, gspo, cispo, dro, or module:function of your own",
    )
    loss_fn_config: dict[str, Any] | None = chz.field(
        default=None, doc="options of the loss, e.g. loss_fn_config.beta=0.1"
    )
    loss_reduction: Reduction = chz.field(
        default="sum",
        doc="what a token's loss is divided by: sum = nothing; sequence_mean = the tokens of its rollout; token_mean = "
        "the tokens of the batch; max_tokens = max_tokens times the rollouts of the batch",
    )
    mismatch: MismatchCorrection = chz.field(
        default_factory=MismatchCorrection,
        doc="token weights that correct for a sampler that differs from the trained policy",
    )
    num_substeps: int = chz.field(
        default=1,
        validator=COUNT,
        doc="optimizer steps per batch, each on a part of it; more than 1 makes the later ones slightly off-policy",
    )
    learning_rate: float = chz.field(
        default=1e-4,
        validator=LEARNING_RATE,
        doc="the peak rate, after the warm-up. Usual: 1e-6 to 1e-5 for all weights of a hub model, ten times that for "
        "LoRA; posttrain-advise suggests one",
    )
    lr_schedule: LRSchedule = chz.field(
        default="constant", doc="how the learning rate falls from its peak to the last step"
    )

    eval_temperature: float = chz.field(
        default=0.0, validator=TEMPERATURE, doc="sampling temperature of evaluations; 0 = greedy"
    )
    eval_samples: int = chz.field(
        default=0,
        validator=WHOLE,
        doc="also draw this many samples of each held-out problem at temperature 1, for pass@k, maj@k and best@k; "
        "0 = none",
    )
    save_every: int = chz.field(
        default=20, validator=WHOLE, doc="steps between checkpoints; also one at the end; 0 = only at the end"
    )
    transcript_every: int = chz.field(
        default=10,
        validator=WHOLE,
        doc="steps between transcripts (rollouts as HTML and JSONL); also one of every evaluation; 0 = only those",
    )
    num_groups_to_log: int = chz.field(default=4, validator=WHOLE, doc="groups shown in a transcript")
    log_path: str = log_path_field("runs/rl")


def check_config(config: Config) -> None:
    """Raises ConfigError for options that do not go together."""
    config.advantage.check_group_size(config.env.group_size)
    seats = config.env.seats()
    if isinstance(config.advantage, SeatMean) and seats not in (None, config.advantage.num_seats):
        raise ConfigError(
            f"advantage.num_seats={config.advantage.num_seats}: the policy plays {seats} of a game's seats with these "
            f"settings; set advantage.num_seats={seats}"
        )
    from posttrain.backend.data_checks import resolve_loss  # torch: not to be waited for by --help

    loss = resolve_loss(config.loss_fn, config.loss_fn_config)
    if isinstance(config.loss_fn, str) and "advantages" not in loss.required:
        raise ConfigError(
            f"loss_fn={config.loss_fn} does not use advantages: it is not a loss for reinforcement learning"
        )
    other = config.distill.paths() or config.batch_reward or config.critic.model
    if isinstance(config.advantage, NoReward) and not other:
        raise ConfigError(
            "advantage=no_reward leaves nothing to learn from: give distill.teacher, critic.model, or a batch_reward"
        )
    if isinstance(config.advantage, NoReward) and not config.critic.model:
        in_reward = {"kl.where=reward": config.kl.coef and config.kl.where == "reward"}
        in_reward[f"length.kind={config.length.kind}"] = config.length.kind != "none"
        if lost := next((name for name, given in in_reward.items() if given), None):
            raise ConfigError(f"{lost} changes the reward, which advantage=no_reward does not learn from")
    if config.kl.coef and config.kl.discount and config.kl.where == "reward":
        raise ConfigError(f"kl.discount={config.kl.discount} needs kl.where=advantage: set that, or kl.discount=0")
    if config.critic.model and not config.learning_rate:
        raise ConfigError(
            "learning_rate=0 with a critic, whose rate is a multiple of it: to train the critic alone set a tiny one, such "
            "as 1e-12"
        )
    if config.critic.model and not isinstance(config.advantage, NoReward):
        raise ConfigError(
            f"critic.model={config.critic.model}: its advantages take the place of advantage="
            f"{type(config.advantage).__name__}: set advantage=no_reward"
        )
    if config.env.group_size < 2:
        _check_lone_rollouts(config, other)
    if config.max_refills and config.batch_reward is not None:
        raise ConfigError(
            f"max_refills={config.max_refills}: a batch_reward is computed after the sampling that would be repeated; set max_refills=0"
        )
    if config.limits.min_group_size > config.env.group_size:
        raise ConfigError(
            f"limits.min_group_size={config.limits.min_group_size} is more than group_size={config.env.group_size}: no "
            "group would be trained on"
        )
    if not loss.scales_with_advantage and (config.loss_reduction != "sum" or config.mismatch.mode != "none"):
        raise ConfigError(
            f"loss_fn={config.loss_fn} is not proportional to the advantage, so loss_reduction and mismatch do not "
            "apply: leave them out, or take another loss_fn"
        )
    if config.max_tokens:
        config.length.checked(config.max_tokens)
    _check_ratios(config)
    _check_minibatches(config)


def _check_lone_rollouts(config: Config, other: object) -> None:
    """Raises ConfigError for groups of one rollout where that teaches nothing. `other`: what else there is to
    learn from."""
    equal = "with group_size=1 all rewards of a group are equal"
    if config.max_refills:
        raise ConfigError(f"max_refills={config.max_refills}: {equal}; set max_refills=0, or group_size=2 or more")
    if config.remove_constant_reward_groups:
        raise ConfigError(f"remove_constant_reward_groups: {equal}, so no group would be trained on")
    if isinstance(config.advantage, GroupMean | GroupMeanStd) and not other:
        raise ConfigError(
            f"advantage={type(config.advantage).__name__}: {equal} and every advantage is 0; set group_size=2 or more, or "
            "advantage=batch_mean"
        )


def _check_ratios(config: Config) -> None:
    """Raises ConfigError for thresholds that cut a ratio of 1, which is that of all tokens on-policy."""
    options = (config.loss_fn_config or {}) if isinstance(config.loss_fn, str) else {}
    mismatch = config.mismatch
    lows = {
        "loss_fn_config.clip_low_threshold": options.get("clip_low_threshold", 1),
        "mismatch.low": mismatch.low if mismatch.mode == "mask" else 1,
    }
    highs = {
        "loss_fn_config.clip_high_threshold": options.get("clip_high_threshold", 1),
        "mismatch.high": mismatch.high if mismatch.mode != "none" else 1,
    }
    wrong = [(name, bound) for name, bound in lows.items() if bound > 1]
    wrong += [(name, bound) for name, bound in highs.items() if bound < 1]
    for name, bound in wrong:
        raise ConfigError(
            f"{name}={bound} clips tokens whose probability has not changed: it bounds the ratio of probabilities, which "
            "starts at 1; for an epsilon of 0.2 give 0.8 or 1.2"
        )


def _check_minibatches(config: Config) -> None:
    minibatches, substeps, groups = config.num_minibatches, config.num_substeps, config.env.batch_size
    if minibatches == 1:
        return
    if groups % minibatches:
        near = min((n for n in range(2, groups + 1) if groups % n == 0), key=lambda n: abs(n - minibatches))
        raise ConfigError(
            f"num_minibatches={minibatches} does not divide the {groups} groups of a batch; num_minibatches={near} does"
        )
    if minibatches % substeps and substeps % minibatches:
        raise ConfigError(
            f"num_minibatches={minibatches} and num_substeps={substeps}: one must be a multiple of the other"
        )
    constant = config.loss_reduction in ("token_mean", "max_tokens")
    parts = {
        f"advantage={type(config.advantage).__name__}": config.advantage.needs_whole_batch,
        f"loss_reduction={config.loss_reduction}": constant,
        "normalize_advantages": config.normalize_advantages,
    }
    if part := next((name for name, needs_batch in parts.items() if needs_batch), None):
        raise ConfigError(
            f"{part} needs the whole batch before the first pass: set num_minibatches=1 instead of {minibatches}"
        )
