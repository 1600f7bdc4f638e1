"""B-STaR (Zeng et al. 2024): self-training that chooses temperature and reward threshold each
round, compared with STaR, ReST-EM and rejection fine-tuning (methods.py).

    python recipes/bstar/train.py                                 # seven methods, one seed; runs/bstar
    python recipes/bstar/train.py methods=star,iterative_rft      # two more, in the same folder
    python recipes/bstar/train.py seed=1 log_path=runs/bstar_1
    python recipes/bstar/train.py task=gsm8k task.data_dir=DIR model_name=Qwen/Qwen2.5-0.5B renderer_name=role_colon

Stages: warm_start, completer, solutions, labels, prm, round_00, and one per method. Finished stages
are kept; the same command resumes a killed one. README.md has the results.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial

import chz

from posttrain.backend.errors import ConfigError
from posttrain.backend.models import PRESETS
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.types import LoraConfig
from posttrain.renderers import get_renderer
from posttrain.tracking.command_line import run_command
from posttrain.tracking.stages import Stage, run_stages
from recipes.bstar.budget import Plan, check_budget, print_plan, projected_tokens
from recipes.bstar.compare import compare
from recipes.bstar.config import Config
from recipes.bstar.methods import METHODS, RewardName
from recipes.bstar.report import write_questions, write_report
from recipes.bstar.results import final_numbers
from recipes.bstar.rewards import Reward, outcome
from recipes.bstar.rounds import Lab, Round, run_method
from recipes.bstar.stages import beginning, prm_path
from recipes.bstar.sums import OracleRewardBuilder
from recipes.bstar.tasks import Task
from recipes.results import write_results

TASKS = {
    "sums": "recipes.bstar.sums:SumsBuilder",
    "gsm8k": "recipes.bstar.tasks:Gsm8kBuilder",
    "math": "recipes.bstar.tasks:MathTextBuilder",
    "code": "recipes.bstar.tasks:CodeTaskBuilder",
    "arc": "recipes.bstar.tasks:ArcBuilder",
}
REWARDS = {
    "prm": "recipes.bstar.rewards:PrmRewardBuilder",
    "outcome": "recipes.bstar.rewards:RewardBuilder",
    "model": "recipes.bstar.rewards:ModelRewardBuilder",
    "oracle": "recipes.bstar.sums:OracleRewardBuilder",
}


# Options that are not settings of a method: of earlier stages, or without effect on its results.
NOT_OF_METHOD = ("warm_start_", "completer_", "prm_", "methods", "max_sampled_tokens", "log_path", "backend")


def stages_of(config: Config, task: Task, open_lab: Callable[[], Lab]) -> list[Stage]:
    """A stage per method. All need round 0, the evaluation of the warm start."""
    settings = {name: getattr(config, name) for name in chz.chz_fields(config) if not name.startswith(NOT_OF_METHOD)}
    plans = config.plans(task)
    names = ("task", "reward", "seed", "eval_samples", "eval_temperature", "chunk_sequences")
    first_settings = {name: settings[name] for name in names}
    make = partial(first_round, open_lab, *next(iter(plans.items())))
    first = Stage("round_00", config.folder / "round_00", first_settings, make, beginning(config, task), "summary.json")
    last = f"round_{config.rounds:02d}/summary.json"
    return [
        Stage(
            name,
            config.folder / name,
            settings | {"method": METHODS[name]},
            partial(run_method, open_lab, name, p),
            [first],
            last,
        )
        for name, p in plans.items()
    ]


async def first_round(open_lab: Callable[[], Lab], name: str, plan: Plan) -> None:
    lab = open_lab()
    write_questions(lab.config.folder, lab.task)
    await Round(lab, ".", METHODS[name], plan, 0).run()


async def main(config: Config) -> None:
    if unknown := [name for name in config.methods if name not in METHODS]:
        raise ConfigError(f"methods={','.join(unknown)}: choose from {', '.join(METHODS)}")
    if config.renderer_name is None and config.model_name in PRESETS:
        config = chz.replace(config, renderer_name="plain")
    renderer = get_renderer(config.renderer_name, load_tokenizer(config.model_name, config.backend.max_length))
    task = config.task(renderer)
    plans = config.plans(task)
    steps = {name: config.steps * METHODS[name].step_factor for name in plans}
    print_plan(plans, config.rounds, steps, config.batch_size, task.max_tokens)
    check_budget(projected_tokens(list(plans.values()), config.rounds, task.max_tokens), config.max_sampled_tokens)
    with ExitStack() as stack:

        @cache
        def open_lab() -> Lab:
            service = stack.enter_context(ServiceClient(config.backend, config.folder / "checkpoints"))
            lora = LoraConfig(rank=config.lora_rank, seed=config.seed) if config.lora_rank else None
            client = service.create_training_client(config.model_name, lora, config.seed)
            reward = config.reward(service, renderer, str(prm_path(config)), task.form)
            rewards: dict[RewardName, Reward] = {
                "configured": reward,
                "outcome": outcome,
                "oracle": OracleRewardBuilder().score,
            }
            return Lab(config, task, renderer, client, rewards)

        await run_stages(stages_of(config, task, open_lab))
    write_results(config.folder, final_numbers(config.folder, task))
    compare([config.folder], config.folder / "methods")  # methods.png and .html
    print(f"report: {write_report(config.folder)}")


if __name__ == "__main__":
    run_command(main, Config, {"task": TASKS, "reward": REWARDS})
