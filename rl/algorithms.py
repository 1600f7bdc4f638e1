"""Named algorithms: values for the options of rl.train.Config. An option given by the user wins.
`differs` lists other differences from the paper.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Algorithm:
    """`settings` are command-line options, option -> value. `source` is the paper."""

    settings: dict[str, str]
    source: str
    differs: str = ""


def clipped(loss_fn: str = "ppo", low: str = "0.8", high: str = "1.2") -> dict[str, str]:
    """A loss that clips the ratio of probabilities, or the weight, at `low` and `high`."""
    return {
        "loss_fn": loss_fn,
        "loss_fn_config.clip_low_threshold": low,
        "loss_fn_config.clip_high_threshold": high,
    }


ALGORITHMS: dict[str, Algorithm] = {
    "importance_sampling": Algorithm(
        {"advantage": "group_mean", "loss_fn": "importance_sampling"},
        "the default of the Tinker cookbook's synchronous loop: centred rewards, no division by their deviation, one step per "
        "batch",
    ),
    "reinforce": Algorithm(
        {"advantage": "batch_mean", "loss_fn": "reinforce"},
        "Williams 1992, with the mean reward of the batch as baseline",
    ),
    "rloo": Algorithm(
        {"advantage": "rloo", "loss_fn": "reinforce", "kl.where": "reward"},
        "Ahmadian et al. 2024: leave-one-out baseline; give kl.coef for their penalty, which goes into the reward",
    ),
    "grpo": Algorithm(
        {"advantage": "group_mean_std", **clipped(), "loss_reduction": "sequence_mean"},
        "Shao et al. 2024: rewards divided by the group's deviation, clipped ratio, mean over each answer's tokens",
        "its KL (k3, in the loss) is off; kl.coef adds a KL to the advantages",
    ),
    "dr_grpo": Algorithm(
        {"advantage": "group_mean", **clipped(), "loss_reduction": "sum"},
        "Liu et al. 2025: GRPO without the divisions by deviation and length, which favour easy problems and long "
        "wrong answers",
        "the loss is a sum; loss_reduction=max_tokens divides by their constant, which Adam does not feel",
    ),
    "reinforce_pp": Algorithm(
        {
            "advantage": "none",
            "normalize_advantages": "True",
            "kl.discount": "1",
            **clipped(),
            "loss_reduction": "token_mean",
        },
        "REINFORCE++, Hu 2025: no baseline but the batch's mean and deviation, over tokens; give kl.coef for its "
        "penalty, where each token pays for the later ones",
    ),
    "reinforce_pp_baseline": Algorithm(
        {"advantage": "group_mean", "normalize_advantages": "True", **clipped(), "loss_reduction": "token_mean"},
        "REINFORCE++-baseline, Hu 2025: the group's mean as baseline, the deviation of the batch's tokens",
        "its KL (k2, in the loss) is off",
    ),
    "dapo": Algorithm(
        {
            "advantage": "group_mean_std",
            **clipped(high="1.28"),
            "loss_reduction": "token_mean",
            "remove_constant_reward_groups": "True",
            "train_on_truncated": "False",
        },
        "Yu et al. 2025: clip higher, mean over all tokens, no constant groups, no truncated answers",
        "groups that are left out are sampled anew only with max_refills; length.kind=overlong is the soft penalty",
    ),
    "gspo": Algorithm(
        {"advantage": "group_mean_std", **clipped("gspo", "0.9997", "1.0004"), "loss_reduction": "sequence_mean"},
        "Zheng et al. 2025: one ratio for all tokens of an answer, the geometric mean of theirs, clipped as a whole",
        "a conversation that is cut into several sequences has a ratio for each",
    ),
    "ppo": Algorithm(
        {"advantage": "group_mean", **clipped(), "num_substeps": "4"},
        "Schulman et al. 2017: clipped ratio, several optimizer steps per batch",
        "the group's mean stands for the critic",
    ),
    "ppo_critic": Algorithm(
        {
            "advantage": "no_reward",
            "critic.model": "policy",
            "normalize_advantages": "True",
            **clipped(),
            "num_substeps": "4",
        },
        "Schulman et al. 2017: PPO in full, with a critic, GAE, a clipped value loss and normalised advantages",
        "each rollout is seen once a step, in one of four parts; several passes are not offered",
    ),
    "distill": Algorithm(
        {"advantage": "no_reward", "loss_fn": "importance_sampling"},
        "Agarwal et al. 2023, Gu et al. 2023: the reverse KL to distill.teacher is all that is learnt from; the reward "
        "is a metric",
    ),
    "cispo": Algorithm(
        {"advantage": "group_mean_std", **clipped("cispo", "0.0", "4.0"), "loss_reduction": "token_mean"},
        "MiniMax-M1 2025: clips the weight of a token's gradient, so that no token's gradient is lost",
    ),
}
