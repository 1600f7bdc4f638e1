"""Star graphs (Bachmann and Nagarajan 2024): all methods on the same graphs; a table and a figure.

    python recipes/star_graph/train.py  # G(2,3) over 12 nodes, one seed; runs/star_graph
    python recipes/star_graph/train.py seeds='[0,1,2]'
    python recipes/star_graph/train.py methods=gpt,bst task.path_length=4

Each method runs in its own process with the run folder <log_path>/seed_<s>/<method>. A finished
method is not run again, an interrupted method resumes.
"""

import os

if not __package__:  # run as a file: put the project on the path
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import chz
import numpy as np

from envs.star_graph_data import StarGraphBuilder, StarGraphExamplesBuilder, StarGraphTask, Targets
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, LEARNING_RATE, SEED
from posttrain.tracking.command_line import run_command
from posttrain.tracking.figures import SHARE, Panel, Records, curves_by_label, draw_panels, save_figure
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.stages import Stage, run_stages, training_stage
from preference.losses import DPO, RPO, PreferenceLoss
from recipes.belief_state import star_graph as bst_star_graph
from recipes.belief_state import train as bst_train
from recipes.star_graph import guided, preferences, pretrain, reinforce
from recipes.star_graph.model import model_stage
from recipes.star_graph.side_by_side import run_side_by_side
from recipes.warm_start import check_seeds
from rl import train as rl_train

FROM_SCRATCH = ("gpt", "reversed", "teacherless", "bst")
FROM_GPT = ("reinforce", "rl", "dpo", "rpo", "guided")
# names of an evaluator, and of rl/
FIRST_HOP = ("test/first_hop", "test/env/all/first_hop")
EXACT = ("test/exact", "test/env/all/correct")
Runs = Mapping[str, Sequence[Records]]  # method -> the metrics of each seed


@chz.chz
class Config:
    """All methods on star graphs, in parallel."""

    methods: str = chz.field(
        default=",".join(FROM_SCRATCH + FROM_GPT),
        doc="comma-separated; gpt and bst are added if another method needs them",
    )
    seeds: list[int] = chz.field(
        default_factory=lambda: [0],
        validator=SEED,
        doc="seeds of weights, data and sampling; every method runs once per seed",
    )
    task: StarGraphTask = chz.field(
        default_factory=StarGraphTask, doc="the graphs, and which are held out; the same for all seeds"
    )
    pretrain_steps: int = chz.field(
        default=800, validator=COUNT, doc="steps of gpt, reversed and teacherless, of 128 graphs"
    )
    bst_steps: int = chz.field(default=600, validator=COUNT, doc="steps of bst, of 64 graphs")
    policy_steps: int = chz.field(default=200, validator=COUNT, doc="steps of reinforce, rl, dpo and rpo")
    classifier_steps: int = chz.field(default=500, validator=COUNT, doc="steps of the classifier of Q# and CD")
    classifier_trunk: Literal["bst", "scratch", "policy"] = chz.field(
        default="bst", doc="trunk of the classifier: bst's frozen forward encoder, random weights, or gpt"
    )
    policy_learning_rate: float = chz.field(default=3e-4, validator=LEARNING_RATE, doc="of reinforce, rl, dpo and rpo")
    processes: int = chz.field(default=2, validator=COUNT, doc="methods that run in parallel, one thread each")
    log_path: str = log_path_field("runs/star_graph", "folder of the runs")


# --- methods ------------------------------------------------------------------------------------


def seed_folder(config: Config, seed: int) -> Path:
    return Path(config.log_path) / f"seed_{seed}"


def folder_of(config: Config, method: str, seed: int) -> Path:
    return seed_folder(config, seed) / method


def supervised(config: Config, method: str, seed: int) -> pretrain.Config:
    targets: Targets = "forward" if method == "gpt" else "reversed" if method == "reversed" else "teacherless"
    return pretrain.Config(
        dataset=StarGraphExamplesBuilder(
            **of_task(config), targets=targets, n_batches=config.pretrain_steps, batch_size=128, seed=seed
        ),
        model_name=str(seed_folder(config, seed) / "model"),
        seed=seed,
        keep_checkpoints=1,
        log_path=str(folder_of(config, method, seed)),
    )


def reinforce_config(config: Config, seed: int) -> reinforce.Config:
    return reinforce.Config(
        dataset=StarGraphExamplesBuilder(
            **of_task(config), n_batches=config.policy_steps, batch_size=256, seed=1000 + seed
        ),
        **of_policy(config, "reinforce", seed),
    )


def rl_config(config: Config, seed: int) -> rl_train.Config:
    return rl_train.Config(
        env=StarGraphBuilder(**of_task(config), n_batches=config.policy_steps, batch_size=32, group_size=8, seed=seed),
        **of_policy(config, "rl", seed),
        renderer_name="plain",
        max_tokens=config.task.graph().path_length,
        transcript_every=100,
        backend=BackendConfig(engine="torch"),
    )


def preference_config(config: Config, method: str, seed: int) -> preferences.Config:
    loss: PreferenceLoss = RPO() if method == "rpo" else DPO()
    return preferences.Config(
        task=config.task,
        method=loss,
        **of_policy(config, method, seed),
        num_prompts=4096,
        batch_size=64,
        num_epochs=10_000,
        max_steps=config.policy_steps,
        data_seed=seed,
    )


def of_task(config: Config) -> dict:
    return {name: getattr(config.task, name) for name in chz.chz_fields(StarGraphTask)}


def of_policy(config: Config, method: str, seed: int) -> dict:
    """What the methods that start from gpt have in common."""
    return {
        "model_name": final_checkpoint(config, "gpt", seed),
        "learning_rate": config.policy_learning_rate,
        "seed": seed,
        "eval_every": 20,
        "save_every": 100,
        "keep_checkpoints": 1,
        "log_path": str(folder_of(config, method, seed)),
    }


def final_checkpoint(config: Config, method: str, seed: int) -> str:
    return str(folder_of(config, method, seed) / "checkpoints" / "final")


def guided_config(config: Config, seed: int) -> guided.Config:
    return guided.Config(
        policy_path=final_checkpoint(config, "gpt", seed),
        task=config.task,
        trunk=final_checkpoint(config, "bst", seed) if config.classifier_trunk == "bst" else config.classifier_trunk,
        # a frozen bst: with its weights trained, one seed of three never left the loss ln 2 (trunks.py)
        train_trunk=config.classifier_trunk != "bst",
        num_steps=config.classifier_steps,
        seed=seed,
        log_path=str(seed_folder(config, seed)),
        behavior_if_log_dir_exists="resume",
    )


def bst_config(config: Config, seed: int) -> bst_train.Config:
    return bst_train.Config(
        data=bst_star_graph.StarGraphBuilder(**of_task(config)),
        num_steps=config.bst_steps,
        seed=seed,
        log_path=str(folder_of(config, "bst", seed)),
    )


def stages_of(config: Config, seed: int) -> dict[str, Stage]:
    """Every method by name, with the stages it starts from."""
    folder, path = seed_folder(config, seed), f"seed_{seed}"
    model = model_stage(config.task.graph(), folder / "model", seed, name=f"{path}/model")
    stages = {"model": model}
    for method in FROM_SCRATCH[:3]:
        stages[method] = training_stage(f"{path}/{method}", pretrain.main, supervised(config, method, seed), [model])
    stages["bst"] = training_stage(f"{path}/bst", bst_train.main, bst_config(config, seed))
    gpt = stages["gpt"]
    pairs = preferences.pairs_stage(preference_config(config, "dpo", seed), f"{path}/pairs", [gpt])
    stages["reinforce"] = training_stage(f"{path}/reinforce", reinforce.main, reinforce_config(config, seed), [gpt])
    stages["rl"] = training_stage(f"{path}/rl", rl_train.main, rl_config(config, seed), [gpt])
    for method in ("dpo", "rpo"):
        run = chz.replace(preference_config(config, method, seed), pairs_path=str(pairs.path))
        stages[method] = training_stage(f"{path}/{method}", preferences.main, run, [gpt, pairs])
    needs = [gpt, stages["bst"]] if config.classifier_trunk == "bst" else [gpt]
    settings, classifier = guided_config(config, seed), folder / "classifier"
    make = partial(guided.main, settings)
    stages["guided"] = Stage(f"{path}/guided", classifier, settings, make, needs, last="../guidance.json")
    return stages


# --- the experiment -----------------------------------------------------------------------------


def chosen_methods(config: Config) -> list[str]:
    """In the order of the table, with gpt and bst if needed."""
    chosen, known = config.methods.split(","), FROM_SCRATCH + FROM_GPT
    if unknown := [name for name in chosen if name not in known]:
        raise ConfigError(f"methods={unknown[0]}: no such method; choose from {', '.join(known)}")
    stages = stages_of(config, 0)
    needed = {name for method in chosen for name in stages[method].made_with()}
    return [name for name in known if stages[name].name in needed]


async def main(config: Config) -> None:
    config.task.check_measured()
    methods = chosen_methods(config)
    check_seeds(config.seeds)
    num_steps = {"bst": config.bst_steps, "guided": config.classifier_steps}
    num_steps |= dict.fromkeys(FROM_SCRATCH[:3], config.pretrain_steps)
    stages_S = [stages_of(config, seed) for seed in config.seeds]
    await run_stages([stages["model"] for stages in stages_S])
    stages = {stages[method]: num_steps.get(method, config.policy_steps) for stages in stages_S for method in methods}
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes started below
    try:
        await run_side_by_side(stages, config.processes)
    finally:  # also if some methods failed
        finished = [method for method in methods if all(stages[method].is_finished() for stages in stages_S)]
        if finished:
            report(config, finished)


def report(config: Config, methods: Sequence[str]) -> None:
    graph, out = config.task.graph(), Path(config.log_path)
    names = [name for method in methods for name in (("cd", "qsharp") if method == "guided" else (method,))]
    runs = {name: [read_metrics(folder_of(config, name, seed)) for seed in config.seeds] for name in names}
    text = f"{graph.name}, N={graph.num_nodes}, {config.task.num_test} held-out graphs, greedy decoding\n{table(runs)}"
    (out / "table.txt").write_text(text + "\n")
    panels = {
        "from scratch": {name: runs[name] for name in names if name in FROM_SCRATCH},
        "from the next-token model": {name: runs[name] for name in names if name not in FROM_SCRATCH},
    }
    title = f"{graph.name} over {graph.num_nodes} nodes"
    print(f"{text}\npicture: {picture(panels, 1 / graph.num_paths, title, out / 'star_graph.png')}")


def table(runs: Runs) -> str:
    """Accuracy at the end of each method's training: the mean over seeds, and each seed."""
    lines = [f"{'method':12s} {'steps':>6s}  {'first hop':>9s}  {'whole path':>10s}   first hop of each seed"]
    hops, paths = curves_by_label(runs, *FIRST_HOP), curves_by_label(runs, *EXACT)
    for name in runs:
        hop_S, path_S = ([curve.values_K[-1] for curve in curves[name]] for curves in (hops, paths))
        each = " ".join(f"{hop:.3f}" for hop in hop_S)
        lines.append(
            f"{name:12s} {hops[name][0].steps_K[-1]:6d}  {np.mean(hop_S):9.3f}  {np.mean(path_S):10.3f}   {each}"
        )
    return "\n".join(lines)


def picture(panels: Mapping[str, Runs], chance: float, title: str, out: Path) -> Path:
    """A figure with a panel for each entry of `panels`."""
    drawn = [
        Panel(f"first-hop accuracy, {name}", curves_by_label(runs, *FIRST_HOP), levels={"chance": chance}, limits=SHARE)
        for name, runs in panels.items()
        if runs
    ]
    return save_figure(draw_panels(drawn, title), out)


if __name__ == "__main__":
    run_command(main, Config)
