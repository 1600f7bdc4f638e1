"""The options of all training runs, declared once. A run's configuration inherits them and may
change defaults.
"""

from pathlib import Path
from typing import Any

import chz

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.learning_rate import LRSchedule, learning_rate_at
from posttrain.backend.ranges import COUNT, DECAY, LEARNING_RATE, NON_NEGATIVE, POSITIVE, SEED, WHOLE
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.types import AdamParams, LoraConfig
from posttrain.renderers import get_renderer
from posttrain.renderers.types import Renderer
from posttrain.tracking.run_folder import BehaviorIfExists


def log_path_field(default: str, doc: str = "the run folder") -> Any:
    return chz.field(default=default, munger=lambda _, path: str(Path(path).expanduser()), doc=doc)


@chz.chz
class RunConfig:
    """A run's folder, and its evaluation and checkpoint intervals."""

    eval_every: int = chz.field(
        default=20, validator=WHOLE, doc="held-out metrics before every this many steps, and at the end; 0 = never"
    )
    save_every: int = chz.field(
        default=100, validator=WHOLE, doc="checkpoint after every this many steps, and at the end; 0 = only at the end"
    )
    save_minutes: float | None = chz.field(
        default=None, validator=POSITIVE, doc="also a checkpoint once this long has passed since the last; None = no"
    )
    save_tokens: int | None = chz.field(
        default=None,
        validator=COUNT,
        doc="also a checkpoint after the step in which this many tokens have been trained on since the last; None = no",
    )
    keep_checkpoints: int | None = chz.field(
        default=3, validator=COUNT, doc="delete older checkpoints than the last this many and `final`; None = keep all"
    )
    profile_steps: int = chz.field(
        default=0, validator=WHOLE, doc="torch's profiler over this many steps, from the second on, into the run folder"
    )
    log_path: str = log_path_field("runs/run")
    behavior_if_log_dir_exists: BehaviorIfExists = chz.field(
        default="ask", doc="what to do with an existing run folder"
    )
    wandb_project: str | None = chz.field(default=None, doc="also log to this wandb project")
    wandb_name: str | None = chz.field(default=None, doc="name of the wandb run")
    tensorboard: bool = chz.field(default=False, doc="also write TensorBoard's event files into the run folder")
    trackio_project: str | None = chz.field(default=None, doc="also log to this Trackio project")


@chz.chz
class TrainingConfig(RunConfig):
    """A run, and its optimizer: AdamW."""

    learning_rate: float = chz.field(default=1e-4, validator=LEARNING_RATE, doc="the highest, after the warm-up")
    lr_schedule: LRSchedule = chz.field(default="linear", doc="how the learning rate falls to the last step")
    warmup_steps: int = chz.field(default=0, validator=WHOLE, doc="over which the learning rate rises linearly")
    min_learning_rate: float = chz.field(
        default=0.0, validator=LEARNING_RATE, doc="where linear and cosine schedules end"
    )
    weight_decay: float = chz.field(default=0.0, validator=NON_NEGATIVE, doc="AdamW's, decoupled")
    beta1: float = chz.field(default=0.9, validator=DECAY, doc="AdamW's decay of the gradient's mean")
    beta2: float = chz.field(default=0.95, validator=DECAY, doc="AdamW's decay of the gradient's square")
    grad_clip_norm: float = chz.field(
        default=0.0, validator=NON_NEGATIVE, doc="largest norm of all gradients together; 0 = any"
    )

    @chz.validate
    def _check_learning_rates(self) -> None:
        if self.min_learning_rate > self.learning_rate:
            raise ConfigError(f"min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}")

    def adam(self, step: int, num_steps: int) -> AdamParams:
        """The optimizer's settings at `step` of `num_steps`."""
        rate = learning_rate_at(
            step, self.learning_rate, self.lr_schedule, num_steps, self.warmup_steps, self.min_learning_rate
        )
        return AdamParams(rate, self.beta1, self.beta2, 1e-8, self.weight_decay, self.grad_clip_norm)


@chz.chz
class LanguageModelRunConfig(TrainingConfig):
    """A run that trains a language model, or a scalar model on a language model's trunk."""

    model_name: str = chz.field(default="tiny", doc="a preset, a local folder, or a Hugging Face hub name")
    load_checkpoint_path: str | None = chz.field(
        default=None, doc="start from the weights of this checkpoint (fresh optimizer)"
    )
    renderer_name: str | None = chz.field(
        default=None,
        doc="role_colon, chat_template or plain; None = the model's own. chat_template:enable_thinking=false gives the "
        "template an option; disable_thinking is a name for this one",
    )
    lora_rank: int = chz.field(default=0, validator=WHOLE, doc="rank of a LoRA adapter; 0 trains all weights")
    lora_alpha: float | None = chz.field(
        default=None, validator=POSITIVE, doc="the adapter is scaled by lora_alpha / lora_rank; None = 32"
    )
    seed: int = chz.field(
        default=0,
        validator=SEED,
        doc="seed of a preset's weights, of the adapter and of sampling (the data have their own)",
    )
    num_epochs: int = chz.field(default=1, validator=COUNT, doc="passes over the dataset")
    max_steps: int | None = chz.field(
        default=None, validator=COUNT, doc="total number of steps, if less than the epochs give"
    )
    backend: BackendConfig = chz.field(default_factory=BackendConfig, doc="how this machine trains and samples")

    def renderer(self) -> Renderer:
        """The renderer of the model's tokenizer; does not read the model's weights."""
        return get_renderer(self.renderer_name, load_tokenizer(self.model_name, self.backend.max_length))

    def lora(self) -> LoraConfig | None:
        return LoraConfig(self.lora_rank, self.seed, self.lora_alpha) if self.lora_rank else None

    def num_steps(self, batches_per_epoch: int) -> int:
        return min(batches_per_epoch * self.num_epochs, self.max_steps or 2**62)
