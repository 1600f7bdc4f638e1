"""The settings of a B-STaR run (train.py)."""

from decimal import Decimal
from pathlib import Path

import chz

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.learning_rate import LRSchedule
from posttrain.backend.ranges import COUNT, LEARNING_RATE, NON_NEGATIVE, POSITIVE, SEED, TEMPERATURE, WHOLE
from posttrain.tracking.run_config import log_path_field
from recipes.bstar.balance import canonical
from recipes.bstar.budget import Plan, SweepCost, plan
from recipes.bstar.methods import METHODS
from recipes.bstar.rewards import PrmRewardBuilder, RewardBuilder
from recipes.bstar.sums import SumsBuilder
from recipes.bstar.tasks import Task, TaskBuilder


def decimals(name: str, values: list[str]) -> list[str]:
    """The distinct values as canonical decimals, in increasing order."""
    if not values:
        raise ConfigError(f"{name} is empty: give at least one number")
    return sorted({canonical(value) for value in values}, key=Decimal)


@chz.chz
class Config:
    """B-STaR and its relatives, at the same number of samples and steps."""

    methods: list[str] = chz.field(
        default_factory=lambda: [
            *("bstar", "temperature_only", "threshold_only"),
            *("online_rft_t05", "online_rft_t07", "online_rft_t10", "online_rft"),
        ],
        doc="methods of methods.py, run in this order",
    )
    task: TaskBuilder = chz.field(default_factory=SumsBuilder, doc="the questions")
    reward: RewardBuilder = chz.field(default_factory=PrmRewardBuilder, doc="the reward that selection uses")
    model_name: str = chz.field(default="micro", doc="a preset, a local folder, or a Hugging Face hub name")
    load_checkpoint_path: str | None = chz.field(
        default=None, doc="initial weights of the warm start; None = those of model_name"
    )
    renderer_name: str | None = chz.field(
        default=None, doc="chat_template, plain or role_colon; None = plain for presets, else by the tokenizer"
    )
    lora_rank: int = chz.field(default=0, validator=WHOLE, doc="rank of a LoRA adapter; 0 trains all weights")
    seed: int = chz.field(
        default=0, validator=SEED, doc="seed of everything but the choice of questions (task.split_seed)"
    )

    warm_start_steps: int = chz.field(
        default=1000,
        validator=WHOLE,
        doc="maximum steps on human solutions; 0 = begin with the model as it is, as for a task without any",
    )
    warm_start_nll: float | None = chz.field(
        default=0.315,
        validator=NON_NEGATIVE,
        doc="stop when a batch's loss is below this, so that the policy still errs; None = after all steps",
    )
    completer_steps: int = chz.field(
        default=400,
        validator=WHOLE,
        doc="maximum further steps of the model that completes prefixes; 0 = the policy completes them",
    )
    completer_nll: float | None = chz.field(
        default=None, validator=NON_NEGATIVE, doc="stop when a batch's loss is below this; None = after all steps"
    )
    warm_start_batch_size: int = chz.field(default=64, validator=COUNT, doc="human solutions in a step")
    warm_start_learning_rate: float = chz.field(
        default=3e-3, validator=LEARNING_RATE, doc="constant; falls linearly to 0 if the nll limit is None"
    )
    prm_solutions: int = chz.field(default=3, validator=COUNT, doc="answers sampled for each PRM question")
    prm_completions: int = chz.field(default=2, validator=COUNT, doc="completions sampled from the end of each step")
    prm_batch_size: int = chz.field(default=32, validator=COUNT, doc="labelled solutions in a step")
    prm_epochs: int = chz.field(default=8, validator=COUNT, doc="passes over the labelled solutions")
    prm_learning_rate: float = chz.field(default=2e-3, validator=LEARNING_RATE, doc="falls linearly to 0")

    rounds: int = chz.field(default=6, validator=COUNT, doc="rounds T")
    samples: int = chz.field(
        default=16, validator=COUNT, doc="samples K of each question in the sweep; the minimum in training"
    )
    temperatures: list[str] = chz.field(
        default_factory=lambda: ["0.5", "0.7", "0.9", "1.1"],
        munger=lambda _, values: decimals("temperatures", values),
        doc="grid of temperatures",
    )
    thresholds: list[str] = chz.field(
        default_factory=lambda: [canonical(n / 10) for n in range(-10, 11)],
        munger=lambda _, values: decimals("thresholds", values),
        doc="grid of reward thresholds",
    )
    per_query: float | None = chz.field(
        default=None,
        validator=POSITIVE,
        doc="target number of selected solutions per question; None = as many as a round trains on",
    )
    quota: int | None = chz.field(
        default=None,
        validator=COUNT,
        doc="maximum solutions per question; None = the smallest that reaches the target size",
    )
    n_star: float | None = chz.field(
        default=None, validator=POSITIVE, doc="n* of the balance score; None = per_query, rounded up"
    )
    human_solutions: bool = chz.field(default=False, doc="human solutions are candidates too, with reward 1")
    sweep_cost: SweepCost = chz.field(
        default="given", doc="charged: the sweep's samples count; given: methods without a sweep sample as many more"
    )
    max_sampled_tokens: int = chz.field(
        default=200_000_000, validator=COUNT, doc="error at the start if the rounds could sample more"
    )

    steps: int = chz.field(default=20, validator=COUNT, doc="optimizer steps of a round")
    batch_size: int = chz.field(default=64, validator=COUNT, doc="solutions in a step")
    learning_rate: float = chz.field(default=1e-3, validator=LEARNING_RATE, doc="of the rounds, at the first step")
    lr_schedule: LRSchedule = chz.field(
        default="linear", doc="over all rounds, or over each round if its optimizer is fresh"
    )
    grad_clip_norm: float = chz.field(default=1.0, validator=NON_NEGATIVE, doc="0 = no clipping")
    save_every: int = chz.field(
        default=100, validator=WHOLE, doc="checkpoint after every this many steps, and at the end of a round"
    )

    eval_every: int = chz.field(
        default=2, validator=COUNT, doc="the test set is sampled after every this many rounds, and after the last"
    )
    eval_samples: int = chz.field(default=16, validator=COUNT, doc="samples of each test question")
    eval_temperature: str = chz.field(
        default="1", munger=lambda _, value: canonical(value), doc="temperature of those samples"
    )
    chunk_sequences: int = chz.field(default=1024, validator=COUNT, doc="sequences sampled between writes to disk")
    log_path: str = log_path_field("runs/bstar")
    backend: BackendConfig = chz.field(
        default_factory=lambda: BackendConfig(engine="torch", max_num_seqs=512), doc="how this machine runs models"
    )

    @chz.validate
    def _check(self) -> None:
        if not self.methods:
            raise ConfigError(f"methods is empty: choose from {', '.join(METHODS)}")
        for name in ("temperatures", "eval_temperature"):
            values = getattr(self, name)
            for value in values if isinstance(values, list) else [values]:
                if needs := TEMPERATURE.needs(float(value)):
                    raise ConfigError(f"{name}={value} must be {needs}")

    @property
    def folder(self) -> Path:
        return Path(self.log_path)

    def wanted(self, task: Task) -> float:
        """Target number of solutions per question: the paper's N / M."""
        return self.per_query or self.steps * self.batch_size / len(task.train)

    def plans(self, task: Task) -> dict[str, Plan]:
        sizes = {"queries": len(task.train), "dev": len(task.dev), "test": len(task.test), "samples": self.samples}
        grid = {
            "temperatures": len(self.temperatures),
            "eval_samples": self.eval_samples,
            "sweep_cost": self.sweep_cost,
        }
        return {name: plan(METHODS[name], **sizes, **grid) for name in self.methods}
