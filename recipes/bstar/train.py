"""B-STaR (Zeng et al. 2024): self-training whose temperature and reward threshold are chosen each round, against its relatives.

    python recipes/bstar/train.py                                 # four methods, one seed; runs/bstar
    python recipes/bstar/train.py methods=star,iterative_rft      # two more, into the same folder
    python recipes/bstar/train.py seed=1 log_path=runs/bstar_1
    python recipes/bstar/train.py task=gsm8k task.data_dir=DIR model_name=Qwen/Qwen2.5-0.5B renderer_name=role_colon

Stages, each with its result in the run folder: warm_start, completer, prm_data, prm, and for each method the rounds of rounds.py. What is
there is not made again; the same command, killed anywhere, goes on. methods.py has the methods, README.md the figures.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import asyncio

from posttrain.backend.errors import ConfigError
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.types import LoraConfig
from posttrain.renderers import get_renderer
from posttrain.tracking.command_line import run_command
from posttrain.tracking.settings import claim_folder
from recipes.bstar.budget import check_budget, print_plan, projected_tokens
from recipes.bstar.config import Config
from recipes.bstar.methods import METHODS
from recipes.bstar.report import write_questions, write_report
from recipes.bstar.rounds import Lab, run_method
from recipes.bstar.stages import completer, prm, prm_data, prm_path, warm_start

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


def check_settings(config: Config) -> None:
    """Refuses a folder that was filled with other settings; methods may be added to it."""
    if unknown := [name for name in config.methods if name not in METHODS]:
        raise ConfigError(f"methods={','.join(unknown)}: choose from {', '.join(METHODS)}")
    claim_folder(config.folder, config, free=("methods", "max_sampled_tokens"))


async def run(config: Config) -> None:
    renderer = get_renderer(config.renderer_name, load_tokenizer(config.model_name, config.backend.max_length))
    task = config.task(renderer)
    plans = config.plans(task)
    print_plan(plans, config.rounds, config.steps, config.batch_size, task.max_tokens)
    check_budget(projected_tokens(list(plans.values()), config.rounds, task.max_tokens), config.max_sampled_tokens)
    check_settings(config)
    write_questions(config.folder, task)
    with ServiceClient(config.backend, config.folder / "checkpoints") as service:
        lora = LoraConfig(rank=config.lora_rank, seed=config.seed) if config.lora_rank else None
        client = service.create_training_client(config.model_name, lora, config.seed)
        await warm_start(config, task, renderer, client)
        if config.reward.needs_prm:
            await completer(config, task, renderer, client)
            await prm_data(config, task)
            await prm(config, task)
        reward = config.reward(service, renderer, str(prm_path(config)), task.form)
        lab = Lab(config, task, renderer, client, reward)
        for name, one in plans.items():
            await run_method(lab, name, METHODS[name], one)
    print(f"report: {write_report(config.folder)}")


def main(config: Config) -> None:
    asyncio.run(run(config))


if __name__ == "__main__":
    run_command(main, Config, {"task": TASKS, "reward": REWARDS})
