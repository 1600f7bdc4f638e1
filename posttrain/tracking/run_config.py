"""The options of all training runs, declared once. A run's configuration inherits them and may
change defaults.
"""

from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import chz

from posttrain.backend.choices import check_choices, option_type
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.extras import need
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
        default=20,
        validator=WHOLE,
        doc="steps between evaluations on held-out data; also at the start and the end; 0 = never",
    )
    save_every: int = chz.field(
        default=100, validator=WHOLE, doc="steps between checkpoints; also one at the end; 0 = only at the end"
    )
    save_minutes: float | None = chz.field(
        default=None,
        validator=POSITIVE,
        doc="also save when this many minutes have passed since the last checkpoint; None = do not",
    )
    save_tokens: int | None = chz.field(
        default=None,
        validator=COUNT,
        doc="also save after this many tokens of prompts and answers since the last checkpoint; None = do not",
    )
    keep_checkpoints: int | None = chz.field(
        default=3, validator=COUNT, doc="how many of the last checkpoints to keep, besides `final`; None = all"
    )
    profile_steps: int = chz.field(
        default=0,
        validator=WHOLE,
        doc="steps to run under torch's profiler, from the second on; 0 = none. Written to profile/ in the run folder",
    )
    log_path: str = log_path_field("runs/run")
    behavior_if_log_dir_exists: BehaviorIfExists = chz.field(
        default="ask",
        doc="if the run folder exists: resume continues the run with the same settings, resume_changed with others, delete "
        "starts again, raise is an error, ask asks in a terminal",
    )
    wandb_project: str | None = chz.field(default=None, doc="also log to this project of Weights & Biases")
    wandb_name: str | None = chz.field(default=None, doc="name of the wandb run; None = chosen by wandb")
    tensorboard: bool = chz.field(default=False, doc="also write TensorBoard's event files into the run folder")
    trackio_project: str | None = chz.field(default=None, doc="also log to this Trackio project")

    @chz.validate
    def _check_objects(self) -> None:
        """A class in place of an object, or a name that only the command line reads, would fail far from here."""
        for name, field in chz.chz_fields(self).items():
            value, kind = getattr(self, name), option_type(field)
            kinds = [*get_args(kind)] if get_origin(kind) in (Union, UnionType) else [kind]
            classes = [kind for kind in kinds if isinstance(kind, type)]
            wanted = [kind for kind in classes if chz.is_chz(kind)]
            if wanted and classes == kinds and not isinstance(value, tuple(classes)):
                example = (value if isinstance(value, type) else wanted[0]).__name__
                raise ConfigError(
                    f"{name}={value!r:.80} is no object of {wanted[0].__name__}: from Python write {example}(...)"
                )
        check_choices(self)

    @chz.validate
    def _check_loggers(self) -> None:
        """They are opened when the model is there."""
        for name, package in {
            "wandb_project": "wandb",
            "tensorboard": "tensorboard",
            "trackio_project": "trackio",
        }.items():
            if value := getattr(self, name):
                need(package, f"{name}={value}")


@chz.chz
class TrainingConfig(RunConfig):
    """A run, and its optimizer: AdamW."""

    learning_rate: float = chz.field(default=1e-4, validator=LEARNING_RATE, doc="the peak rate, after the warm-up")
    lr_schedule: LRSchedule = chz.field(
        default="linear", doc="how the learning rate falls from its peak to the last step"
    )
    warmup_steps: int = chz.field(
        default=0, validator=WHOLE, doc="steps over which the learning rate rises linearly to its peak; 0 = none"
    )
    min_learning_rate: float = chz.field(
        default=0.0, validator=LEARNING_RATE, doc="the rate at which linear and cosine schedules end"
    )
    weight_decay: float = chz.field(default=0.0, validator=NON_NEGATIVE, doc="AdamW's decoupled weight decay; 0 = none")
    beta1: float = chz.field(default=0.9, validator=DECAY, doc="AdamW's decay rate of the mean gradient")
    beta2: float = chz.field(default=0.95, validator=DECAY, doc="AdamW's decay rate of the mean squared gradient")
    grad_clip_norm: float = chz.field(
        default=0.0, validator=NON_NEGATIVE, doc="clip the norm of the whole gradient to this; 0 = no clipping"
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

    model_name: str = chz.field(
        default="tiny", doc="a preset (tiny, small, ...), a local folder, or a Hugging Face hub name"
    )
    load_checkpoint_path: str | None = chz.field(
        default=None, doc="start from the weights of this checkpoint, with a new optimizer"
    )
    renderer_name: str | None = chz.field(
        default=None,
        doc="how messages become tokens: chat_template, role_colon or plain; None = the model's own. Template options "
        "follow a colon: chat_template:enable_thinking=false, for which disable_thinking is short",
    )
    lora_rank: int = chz.field(default=0, validator=WHOLE, doc="rank of a LoRA adapter; 0 trains all weights")
    lora_alpha: float | None = chz.field(
        default=None, validator=POSITIVE, doc="the adapter's output is multiplied by lora_alpha / lora_rank; None = 32"
    )
    seed: int = chz.field(
        default=0,
        validator=SEED,
        doc="seed of a preset's weights, of a new adapter and of sampling; the data have a seed of their own",
    )
    num_epochs: int = chz.field(default=1, validator=COUNT, doc="passes over the dataset")
    max_steps: int | None = chz.field(
        default=None, validator=COUNT, doc="end after this many steps, even within an epoch; None = after num_epochs"
    )
    backend: BackendConfig = chz.field(default_factory=BackendConfig, doc="how this machine trains and samples")

    def renderer(self) -> Renderer:
        """The renderer of the model's tokenizer; does not read the model's weights."""
        return get_renderer(self.renderer_name, load_tokenizer(self.model_name, self.backend.max_length))

    def lora(self) -> LoraConfig | None:
        return LoraConfig(self.lora_rank, self.seed, self.lora_alpha) if self.lora_rank else None

    def num_steps(self, batches_per_epoch: int) -> int:
        """Prints a line where the data end before `max_steps`."""
        available = batches_per_epoch * self.num_epochs
        if self.max_steps and self.max_steps > available > 0:
            epochs = -(-self.max_steps // batches_per_epoch)
            print(
                f"max_steps={self.max_steps}: the data have {available:,} batches in num_epochs={self.num_epochs}, and "
                f"the run ends there; num_epochs={epochs} has enough",
                flush=True,
            )
        return min(available, self.max_steps or available)
