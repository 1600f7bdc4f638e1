"""A critic with GAE (Schulman et al. 2015, eq. 16) and PPO's clipped value loss, on the sampled
tokens of a trajectory. Left out: bootstrapping where a limit ends an episode; it ends with value 0.

  delta_t = r_t + gamma V_{t+1} - V_t    A_t = delta_t + gamma lambda A_{t+1}    return_t = A_t + V_t
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chz
import numpy as np

from posttrain.backend.checkpoint_files import SCALAR_HEAD_FILE, read_state
from posttrain.backend.errors import CheckpointError
from posttrain.backend.ranges import LEARNING_RATE, NON_NEGATIVE, SHARE
from posttrain.backend.tokenizers import check_vocabulary
from posttrain.backend.types import AdamParams, Datum, ForwardBackwardOutput, LoraConfig, ModelInput, OptimStepResponse
from posttrain.renderers.types import Tokenizer
from posttrain.tracking.metrics_log import Metrics
from rl.data_processing import Row, sampled_in_time, split_by_row
from rl.kl import discounted
from rl.metrics import TokenMean
from rl.types import Trajectory, TrajectoryGroup

if TYPE_CHECKING:  # commands answer before torch is imported
    import torch

    from posttrain.backend.futures import APIFuture
    from posttrain.backend.losses import Tensors
    from posttrain.backend.service_client import ServiceClient
    from posttrain.backend.training_client import TrainingClient

POLICY = "policy"


@chz.chz
class CriticConfig:
    model: str | None = chz.field(
        default=None,
        doc=f"the critic: {POLICY} (a copy of the policy's initial trunk), a scalar model's checkpoint, or a model; "
        "None = no critic",
    )
    learning_rate: float = chz.field(
        default=1e-3,
        validator=LEARNING_RATE,
        doc="peak rate of the critic's own optimizer; it follows the policy's schedule",
    )
    discount: float = chz.field(
        default=1.0, validator=SHARE, doc="gamma: discount of the reward per sampled token; 1 = none"
    )
    gae_lambda: float = chz.field(
        default=0.95,
        validator=SHARE,
        doc="lambda of GAE: 1 = return minus value (less bias), 0 = one-step differences (less variance)",
    )
    clip: float = chz.field(
        default=0.2,
        validator=NON_NEGATIVE,
        doc="PPO's value clipping: the loss ignores a move of a value beyond this in one step; 0 = no clipping",
    )

    def check(self, tokenizer: Tokenizer) -> None:
        """ConfigError for a critic with another vocabulary, before any model is loaded."""
        if self.model not in (None, POLICY):
            check_vocabulary(f"critic.model={self.model}", str(self.model), tokenizer)

    def open(self, service: "ServiceClient", policy_name: str, lora: LoraConfig | None, seed: int) -> "TrainingClient":
        path = Path(str(self.model)).expanduser()
        if (path / SCALAR_HEAD_FILE).exists():
            return service.create_scalar_client_from_state(str(path))
        return service.create_scalar_client(policy_name if self.model == POLICY else str(self.model), lora, seed)


def gae(rewards_N: np.ndarray, values_N: np.ndarray, discount: float, gae_lambda: float) -> np.ndarray:
    """(N,) advantages of a trajectory's sampled tokens; the value after the last is 0."""
    delta_N = rewards_N + discount * np.append(values_N[1:], 0.0) - values_N
    return discounted(delta_N, discount * gae_lambda)


def token_rewards(trajectory: Trajectory, final: float) -> np.ndarray:
    """(N,) rewards of the sampled tokens: a turn's at its last token, `final` at the very last."""
    counts = np.array([len(turn.ac.tokens) for turn in trajectory.transitions])
    rewards_N = np.zeros(int(counts.sum()))
    for turn, end in zip(trajectory.transitions, counts.cumsum(), strict=True):
        rewards_N[max(int(end) - 1, 0)] += turn.reward
    rewards_N[-1] += final
    return rewards_N


def value_loss(values_N: "torch.Tensor", inputs: "Tensors", clip: float) -> "tuple[torch.Tensor, Tensors]":
    """w max((V - return)^2, (V_old + clip(V - V_old, -clip, clip) - return)^2) / 2."""
    returns_N, old_N = inputs["returns"], inputs["values"]
    loss_N = (values_N - returns_N).square()
    if clip:
        clipped_N = old_N + (values_N - old_N).clamp(-clip, clip)
        loss_N = loss_N.maximum((clipped_N - returns_N).square())
    return 0.5 * inputs["weights"] * loss_N, {"value_loss": 0.5 * loss_N}


def _scalars(values_N: "torch.Tensor", inputs: "Tensors") -> "tuple[torch.Tensor, Tensors]":
    return 0.0 * values_N, {}


@dataclass
class Critic:
    config: CriticConfig
    client: "TrainingClient"
    rate: float
    """Its learning rate, divided by the policy's."""
    _outputs: "list[APIFuture[ForwardBackwardOutput]]" = field(default_factory=list)
    _steps: "list[APIFuture[OptimStepResponse]]" = field(default_factory=list)

    async def with_advantages(
        self, groups_P: Sequence[TrajectoryGroup], rows: Sequence[Row]
    ) -> tuple[list[Row], Metrics]:
        """Rows with GAE added to the advantages of their sampled tokens, and their values and returns."""
        data_D = [Datum(ModelInput.from_ints(row.tokens[:-1]), {"mask": row.mask_T}) for row in rows]
        output = await self.client.forward(data_D, _scalars)
        values_D = [out["scalars"].array for out in output.loss_fn_outputs]
        values = np.concatenate(values_D)
        advantages = np.zeros(len(values))
        for (p, g), place_N in sampled_in_time(rows).items():
            group, values_N = groups_P[p], values[place_N].astype(np.float64)
            rewards_N = token_rewards(group.trajectories_G[g], group.final_rewards_G[g])
            advantages[place_N] = gae(rewards_N, values_N, self.config.discount, self.config.gae_lambda)
        of_rows = zip(rows, split_by_row(rows, advantages), values_D, strict=True)
        valued = [_with_values(row, advantages_T, values_T) for row, advantages_T, values_T in of_rows]
        return valued, _value_metrics(valued)

    def forward_backward(self, rows: Sequence[Row], passes: int = 1) -> None:
        """Submits the value loss, a mean over the sampled tokens of `rows`, as one of so many `passes` of a
        step: its gradient is that of their mean."""
        tokens = sum(float(row.mask_T.sum()) for row in rows) * passes
        data_D = [
            Datum(
                ModelInput.from_ints(row.tokens[:-1]),
                {"weights": row.mask_T / np.float32(tokens), "values": row.values_T, "returns": row.returns_T},  # type: ignore[dict-item]
            )
            for row in rows
        ]
        self._outputs.append(self.client.forward_backward(data_D, value_loss, {"clip": self.config.clip}))

    def optim_step(self, adam: AdamParams) -> None:
        rate = replace(adam, learning_rate=adam.learning_rate * self.rate)
        self._steps.append(self.client.optim_step(rate))

    async def metrics(self) -> Metrics:
        """Waits for the passes since the last call."""
        outputs, steps = [await output for output in self._outputs], [await step for step in self._steps]
        self._outputs, self._steps = [], []
        if not outputs or not steps:
            return {}
        losses = [output.metrics["value_loss:mean"] for output in outputs]
        norms = [step.metrics["grad_norm"] for step in steps]
        return {"critic/value_loss": float(np.mean(losses)), "critic/grad_norm": float(np.mean(norms))}


def _with_values(row: Row, gae_T: np.ndarray, read_T: np.ndarray) -> Row:
    at = row.mask_T > 0
    advantages_T, values_T, returns_T = row.advantages_T.copy(), np.zeros_like(row.mask_T), np.zeros_like(row.mask_T)
    advantages_T[at] += gae_T[at].astype(np.float32)
    values_T[at], returns_T[at] = read_T[at], gae_T[at] + read_T[at]
    return replace(row, advantages_T=advantages_T, values_T=values_T, returns_T=returns_T)


def _value_metrics(rows: Sequence[Row]) -> Metrics:
    """`explained_variance`: 1 - Var(return - value) / Var(return), over sampled tokens."""
    masks = [row.mask_T > 0 for row in rows]
    values, returns = (
        np.concatenate([track[at] for track, at in zip(tracks, masks, strict=True) if track is not None])
        for tracks in ([row.values_T for row in rows], [row.returns_T for row in rows])
    )
    variance = float(returns.var())
    explained = 1 - float((returns - values).var()) / variance if variance else 0.0
    return {"critic/value_mean": TokenMean(values.mean(), len(values)), "critic/explained_variance": explained}


@dataclass
class ActorCritic:
    """The checkpoints of policy and critic as one: the critic's are in `folder`, under the same names, and
    deleted after the policy's."""

    policy: "TrainingClient"
    critic: "TrainingClient"
    folder: Path
    takes_policy: bool
    """Whether the critic starts from the policy's weights."""

    def save_state(self, name: str, *, extra: dict[str, Any]) -> "APIFuture[Any]":
        """The critic first: a policy's checkpoint always has its critic's."""
        checkpoints = Path(name).parent
        for old in self.folder.glob("*"):
            if not (checkpoints / old.name).exists():
                shutil.rmtree(old)
        path = self.folder.resolve() / Path(name).name
        self.critic.save_state(str(path), extra={"next_step": extra.get("next_step")}).result()
        return self.policy.save_state(name, extra=extra)

    def load_state(self, path: str) -> "APIFuture[Any]":
        if self.takes_policy:
            self.critic.load_state(path).result()
        return self.policy.load_state(path)

    def load_state_with_optimizer(self, path: str) -> "APIFuture[Any]":
        saved = self.folder / Path(path).name
        steps = [read_state(folder)["extra"].get("next_step") for folder in (saved, Path(path))]
        if steps[0] != steps[1]:
            raise CheckpointError(
                f"{saved} is the critic before step {steps[0]}, {path} the policy before step {steps[1]}"
            )
        self.critic.load_state_with_optimizer(str(saved)).result()
        return self.policy.load_state_with_optimizer(path)

    def checkpoint_bytes(self) -> int:
        return self.policy.checkpoint_bytes() + self.critic.checkpoint_bytes()
