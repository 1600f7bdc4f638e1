"""An agent learns which of its tools to use. The agent is shop.py, a program of the `openai` package;
its model is `tiny`, from random weights.

    python recipes/agent/train.py                       # runs/agent, three seeds
    python recipes/agent/train.py seeds=0 num_steps=10 log_path=runs/again

The warm start imitates calls of the right form, RIGHT_CALLS of them to the tool that was asked for.
In RL the agent's answer is compared with the right one. README.md has the results.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import chz
import numpy as np

from envs.agent import AgentBuilder
from envs.single_turn import QuestionFile
from posttrain.backend.config import BackendConfig
from posttrain.backend.ranges import COUNT, LEARNING_RATE
from posttrain.tracking.command_line import run_command
from posttrain.tracking.figures import Panel, Records, curves_by_label, draw_panels, read_curve, save_figure
from posttrain.tracking.jsonl import write_jsonl
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.run_folder import BehaviorIfExists
from posttrain.tracking.stages import Stage, run_stages, training_stage
from recipes.agent.shop import ITEMS, SHOP
from recipes.warm_start import seeds_of, shared_settings, torch_backend, warm_start
from rl import train
from supervised.data import ConversationFileBuilder

TRAINED_ON, HELD_OUT = ITEMS[:8], ITEMS[8:]  # RL never asks for the latter
REWARD = "env/all/reward/total"
RIGHT_CALLS = 0.65  # share of the demonstrations that call the right tool


@chz.chz
class Config:
    """An agent of the openai package learns which tool to use."""

    seeds: str = chz.field(default="0,1,2", doc="seeds of weights, data and sampling, by comma")
    model_name: str = chz.field(default="tiny", doc="a preset, a local folder, or a Hugging Face hub name")
    renderer_name: str | None = chz.field(default="chat_template", doc="a renderer that writes tool calls")
    warm_start_steps: int = chz.field(default=240, validator=COUNT, doc="supervised steps of 16 demonstrations")
    num_steps: int = chz.field(default=40, validator=COUNT, doc="steps of RL, each 8 questions with 8 attempts")
    learning_rate: float = chz.field(default=3e-4, validator=LEARNING_RATE, doc="of RL")
    log_path: str = log_path_field("runs/agent", "folder of the runs and the picture")
    behavior_if_log_dir_exists: BehaviorIfExists = chz.field(default="ask", doc="what to do with existing run folders")
    backend: BackendConfig = torch_backend()


def demonstration(rng: np.random.Generator) -> list[dict[str, Any]]:
    """A call with the right item, perhaps to the wrong tool, and an answer that repeats what it said."""
    asked, other = rng.permutation(list(SHOP))
    called = asked if rng.random() < RIGHT_CALLS else other
    item, value = rng.choice(ITEMS), str(rng.integers(10, 100))
    function = {"name": str(called), "arguments": json.dumps({"item": str(item)})}
    return [
        {"role": "user", "content": f"{asked} of {item}?"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c", "content": value},
        {"role": "assistant", "content": value},
    ]


def write_data(config: Config, folder: Path, seed: int) -> None:
    """The demonstrations, and the questions to train and to evaluate on."""
    rng = np.random.default_rng(seed)
    shown = [{"messages": demonstration(rng)} for _ in range(16 * config.warm_start_steps)]
    folder.mkdir(parents=True, exist_ok=True)
    files = {"demonstrations": shown, "train": questions_about(TRAINED_ON), "test": questions_about(HELD_OUT)}
    for name, rows in files.items():
        write_jsonl(folder / f"{name}.jsonl", rows)


def questions_about(items: Sequence[str]) -> list[dict[str, str]]:
    return [{"question": f"{kind} of {item}?", "answer": SHOP[kind][item]} for item in items for kind in SHOP]


def stages_of(config: Config, seed: int) -> list[Stage]:
    folder = Path(config.log_path) / f"seed_{seed}"
    write_data(config, folder, seed)
    shown = ConversationFileBuilder(path=str(folder / "demonstrations.jsonl"), batch_size=16, seed=seed)
    settings: dict[str, Any] = shared_settings(config) | {"seed": seed}
    start = warm_start(config, shown, folder / "warm_start", f"seed_{seed}/warm_start", lr_schedule="linear", seed=seed)
    questions = QuestionFile(
        train_path=str(folder / "train.jsonl"), test_path=str(folder / "test.jsonl"), answer_field="answer"
    )
    run = train.Config(
        env=AgentBuilder(
            problems=questions, agent="recipes.agent.shop:assistant", batch_size=8, group_size=8, seed=seed
        ),
        load_checkpoint_path=str(start.result),
        learning_rate=config.learning_rate,
        lr_schedule="linear",
        num_epochs=config.num_steps,
        max_steps=config.num_steps,
        max_tokens=96,
        eval_every=10,
        save_every=0,
        log_path=str(folder / "rl"),
        **settings,
    )
    return [start, training_stage(f"seed_{seed}/rl", train.main, run, [start], config.behavior_if_log_dir_exists)]


def report(config: Config) -> Path:
    """Prints the figures of each seed and draws the curves."""
    seeds = seeds_of(config.seeds)
    runs = [read_metrics(Path(config.log_path, f"seed_{seed}", "rl")) for seed in seeds]
    print("seed   right, first and last 5 steps   held out, before and after")
    for seed, records in zip(seeds, runs, strict=True):
        rewards, tests = (read_curve(records, key).values_K for key in (REWARD, f"test/{REWARD}"))
        first, last = np.mean(rewards[:5]), np.mean(rewards[-5:])
        print(f"{seed:4}   {first:.3f}  {last:.3f}                   {tests[0]:.3f}  {tests[-1]:.3f}")
    return draw({"rl": runs}, Path(config.log_path) / "agent.png")


def draw(runs: Mapping[str, Sequence[Records]], out: Path) -> Path:
    titles = {"answers right, at temperature 1": REWARD, "held-out items, greedy": f"test/{REWARD}"}
    panels = [Panel(title, curves_by_label(runs, key), limits=(0, 1.02)) for title, key in titles.items()]
    return save_figure(draw_panels(panels), out)


async def main(config: Config) -> None:
    await run_stages([stage for seed in seeds_of(config.seeds) for stage in stages_of(config, seed)])
    print(f"picture: {report(config)}")


if __name__ == "__main__":
    run_command(main, Config)
