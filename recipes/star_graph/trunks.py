"""The classifier of Q# and CD on the trained bst's encoder, frozen and trained on, beside an oracle and the
policy alone; the table of GUIDANCE.md.

    python recipes/star_graph/trunks.py            # runs/star_graph_trunks
    python recipes/star_graph/trunks.py seed=1 log_path=runs/again

gpt, the policy, and bst are those of train.py. Finished stages are kept, killed ones resume.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from functools import partial
from pathlib import Path

import chz

from posttrain.backend.ranges import COUNT, SEED
from posttrain.tracking.command_line import run_command
from posttrain.tracking.jsonl import read_json
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.stages import Stage, run_stages
from recipes.results import write_results
from recipes.star_graph import guided, train

TRUNKS = {"frozen": False, "trained on": True}
METHODS = {("q_sharp", 0.1): "Q#, 0.1", ("cd", 0.1): "CD, 0.1", ("cd_code", 0.1): "cd_code"}
METHODS |= {("q_sharp", 1.0): "Q#, 1", ("cd", 1.0): "CD, 1", ("policy", 0.1): "alone"}


@chz.chz
class Config:
    """A frozen and a trained trunk of the classifier that guides a policy on star graphs."""

    seed: int = chz.field(default=0, validator=SEED, doc="of weights, data and sampling")
    pretrain_steps: int = chz.field(default=800, validator=COUNT, doc="steps of gpt, of 128 graphs")
    bst_steps: int = chz.field(default=600, validator=COUNT, doc="steps of bst, of 64 graphs")
    classifier_steps: int = chz.field(default=500, validator=COUNT, doc="steps of each classifier")
    log_path: str = log_path_field("runs/star_graph_trunks", "folder of the runs")


def classifiers(config: Config) -> dict[str, Stage]:
    steps = {name: getattr(config, name) for name in ("pretrain_steps", "bst_steps", "classifier_steps")}
    experiment = train.Config(seeds=[config.seed], log_path=config.log_path, **steps)
    made, settings = train.stages_of(experiment, config.seed), train.guided_config(experiment, config.seed)
    stages = {}
    for name, is_trained in TRUNKS.items():
        folder = Path(config.log_path) / name.replace(" ", "_")
        run = chz.replace(settings, train_trunk=is_trained, log_path=str(folder))
        needs = [made["gpt"], made["bst"]]
        make = partial(guided.main, run)
        stages[name] = Stage(name, folder / "classifier", run, make, needs, last="../guidance.json")
    return stages


async def main(config: Config) -> None:
    """Writes LOG_PATH/results.json: first hops found, greedy and sampled, and the KL of sampling, by classifier
    and method."""
    stages = classifiers(config)
    await run_stages([*stages.values()])
    results: dict[str, float] = {}
    for name, stage in stages.items():
        lines = {"none": "the policy alone", "trained": f"bst's encoder, {name}", "oracle": "oracle"}
        for row in read_json(stage.result):
            cell = f"{lines[row['classifier']]} | {METHODS[row['method'], row['kl_coef']]}"
            results |= {f"{cell}, {how}": row[f"first_hop_{how}"] for how in ("greedy", "sampled")}
            results[f"{cell}, KL"] = row["kl"]
    write_results(config.log_path, results)
    for cell, value in results.items():
        print(f"{cell:50s} {value:.3f}")


if __name__ == "__main__":
    run_command(main, Config)
