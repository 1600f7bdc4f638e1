"""What the recipes of this folder share: a teacher made from nothing, and held-out accuracy.

The teacher is `tiny` (Qwen 3's architecture) after imitating two-digit sums; it gets nearly all right.
"""

from pathlib import Path

import chz

from envs.arithmetic import ArithmeticBuilder, ArithmeticExamplesBuilder
from posttrain.backend.config import BackendConfig
from posttrain.backend.ranges import COUNT, SEED
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.renderers import get_renderer
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.stages import Stage
from recipes.warm_start import torch_backend, warm_start
from rl.evaluators import RLTestSetEvaluator
from rl.types import RLDatasetBuilder


@chz.chz
class Config:
    """What all distillation recipes have."""

    model_name: str = chz.field(default="llama-tiny", doc="the student: another architecture with the same vocabulary")
    renderer_name: str = chz.field(default="plain", doc="how questions are written")
    teacher_steps: int = chz.field(default=600, validator=COUNT, doc="supervised steps of the teacher, 128 sums each")
    seed: int = chz.field(default=0, validator=SEED, doc="seed of the student's weights, the data and the sampling")
    log_path: str = log_path_field("runs/distillation", "folder of the stages; the recipes share the teacher")
    backend: BackendConfig = torch_backend()


def teacher_stage(config: Config) -> Stage:
    """Independent of the student's seed."""
    sums = ArithmeticExamplesBuilder(num_digits=2, n_batches=config.teacher_steps, batch_size=128)
    settings = {"model_name": "tiny", "renderer_name": "plain", "seed": 0, "lr_schedule": "linear", "eval_every": 200}
    return warm_start(config, sums, Path(config.log_path) / "teacher", "teacher", **settings)


async def accuracy(config: Config, checkpoint: Path, env: RLDatasetBuilder | None = None) -> float:
    """The share of held-out problems that a saved model answers right, greedily."""
    env = env or ArithmeticBuilder(num_digits=2)
    renderer = get_renderer(config.renderer_name, load_tokenizer(str(checkpoint)))
    _, test = await env(renderer)
    assert test is not None
    with ServiceClient(config.backend) as service:
        evaluator = RLTestSetEvaluator(test, env.recommended_max_tokens())
        return (await evaluator(service.create_sampling_client(str(checkpoint))))["test/env/all/correct"]
