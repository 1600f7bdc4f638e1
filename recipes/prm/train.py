"""A process reward model (PRM) from a verifier of answers only, on chains of sums: which step is
the first wrong one? README.md has the results.

    python recipes/prm/train.py                          # the six stages below; runs/prm
    python recipes/prm/train.py stages=controls          # other labels, other first weights
    python recipes/prm/train.py stages=rl                # RL with and without the PRM's reward

    warm_start  a policy that is right about one time in three
    completer   the policy, trained further, so that it errs seldom
    solutions   the policy's answers to training chains
    labels      of their steps, by the completer's rollouts
    prm         trained from the completer's weights
    evaluate    on held-out chains: first wrong steps, best of 8
    controls    the last two with hard labels, and from the policy's weights
    rl          of the policy: the verifier's reward alone, with the PRM's, with its per-step advantages
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import chz

from envs.arithmetic_chain import ANSWER, Chain, ChainBuilder, ChainExamplesBuilder, ChainTask
from envs.problem_env import ProblemEnv
from posttrain.backend.config import BackendConfig
from posttrain.backend.ranges import COUNT, LEARNING_RATE, NON_NEGATIVE, SEED
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.types import SamplingParams
from posttrain.renderers import get_renderer
from posttrain.tracking.command_line import run_command
from posttrain.tracking.jsonl import read_json
from posttrain.tracking.metrics_log import print_metrics_table
from posttrain.tracking.plots import compare_runs
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.seeds import PRM_CHAINS
from posttrain.tracking.stages import Stage, chosen, run_stages, training_stage
from preference import train_prm
from preference.prm import PrmReward, SavedPrm
from preference.prm_labels import LabelConfig
from preference.step_data import StepExamplesBuilder
from preference.steps import StepFormat
from recipes.libraries.labelled_solutions import labels_stage, read_solutions, solutions_stage
from recipes.prm.evaluation import evaluate, label_noise
from recipes.prm.picture import draw
from recipes.results import write_results
from recipes.warm_start import shared_settings, torch_backend, warm_start
from rl import train as rl_train

STAGES = ("warm_start", "completer", "solutions", "labels", "prm", "evaluate")
CONTROLS: list[tuple[Literal["hard", "soft"], str]] = [("soft", "policy"), ("hard", "completer"), ("hard", "policy")]
COMPARED = ("first wrong step found", "right chains left unmarked", "best_of_n")
FORM = StepFormat(separator="\n", answer_marker=ANSWER)


@chz.chz
class Config:
    """A process reward model for chains of sums."""

    stages: list[str] = chz.field(
        default_factory=lambda: list(STAGES), doc="stages to run, with those they need (see the file's header)"
    )
    task: ChainTask = chz.field(
        default_factory=lambda: ChainTask(num_steps=5, max_total=9, max_term=2, num_test=300),
        doc="the chains, and the held-out set",
    )
    model_name: str = chz.field(default="tiny", doc="the policy, and the trunk of its process reward model")
    seed: int = chz.field(default=0, validator=SEED, doc="seed of everything but the choice of held-out chains")
    warm_start_nll: float = chz.field(
        default=0.05,
        validator=NON_NEGATIVE,
        doc="imitate until a batch's loss is below this, so that the policy still errs",
    )
    completer_nll: float = chz.field(
        default=0.004, validator=NON_NEGATIVE, doc="the completer imitates until this loss, so that it errs seldom"
    )
    num_problems: int = chz.field(default=1800, validator=COUNT, doc="training chains that are solved and labelled")
    solutions_per_problem: int = chz.field(default=3, validator=COUNT, doc="solutions of each")
    num_completions: int = chz.field(default=3, validator=COUNT, doc="completions from the end of each step")
    prm_epochs: int = chz.field(default=8, validator=COUNT, doc="passes over the labelled solutions")
    prm_learning_rate: float = chz.field(default=2e-3, validator=LEARNING_RATE, doc="falls linearly to 0")
    rl_steps: int = chz.field(default=30, validator=COUNT, doc="steps of each run of the stage rl")
    best_of: int = chz.field(default=8, validator=COUNT, doc="solutions of each held-out chain to choose from")
    log_path: str = log_path_field("runs/prm")
    backend: BackendConfig = torch_backend("how this machine runs models")

    @property
    def folder(self) -> Path:
        return Path(self.log_path)

    @property
    def max_tokens(self) -> int:
        largest = max(99, self.task.max_total)  # with room, where totals have one digit
        return ChainBuilder(num_steps=self.task.num_steps, max_total=largest).recommended_max_tokens()

    def chains(self) -> list[Chain]:
        return self.task.chains(self.num_problems, [self.seed, PRM_CHAINS])


def stages_of(config: Config) -> list[Stage]:
    folder, task = config.folder, {name: getattr(config.task, name) for name in chz.chz_fields(ChainTask)}
    common: dict[str, Any] = shared_settings(config) | {"renderer_name": "plain"}
    chains = ChainExamplesBuilder(**task, batch_size=64, n_batches=400, seed=config.seed)
    imitation: dict[str, Any] = {"renderer_name": "plain", "eval_every": 0, "save_every": 100}
    policy = warm_start(config, chains, folder / "warm_start", stop_at_nll=config.warm_start_nll, **imitation)
    chains, stop = chz.replace(chains, seed=config.seed + 1), {"stop_at_nll": config.completer_nll}
    completer = warm_start(config, chains, folder / "completer", "completer", [policy], **stop, **imitation)

    problems, test_problems = _envs(config, config.chains()), _envs(config, config.task.test_chains())
    params = SamplingParams(config.max_tokens, seed=1000 * config.seed + 1)
    settings = {"num_problems": config.num_problems}
    file, number = folder / "solutions.jsonl", config.solutions_per_problem
    solutions = solutions_stage(file, policy, problems, number, params, settings, config.backend)
    labelling = LabelConfig(
        max_tokens=config.max_tokens, form=FORM, num_completions=config.num_completions, seed=config.seed
    )
    labels = labels_stage(solutions, completer, problems, labelling, config.backend)
    examples = StepExamplesBuilder(
        path=str(labels.path),
        test_size=config.num_problems // 10,
        form=FORM,
        batch_size=32,
        seed=config.seed,
        labels="soft",
        last_tokens=1,
        until_first_error=True,
    )
    params, file = replace(params, seed=1000 * config.seed + 2), folder / "test_solutions.jsonl"
    test_solutions = solutions_stage(file, policy, test_problems, config.best_of, params, {}, config.backend)

    def trained(place: Path, examples: StepExamplesBuilder, trunk: Stage, suffix: str = "") -> tuple[Stage, Stage]:
        """A process reward model in PLACE/prm, and its evaluation."""
        run = train_prm.Config(
            dataset=examples,
            load_checkpoint_path=str(trunk.result),
            learning_rate=config.prm_learning_rate,
            num_epochs=config.prm_epochs,
            eval_every=40,
            log_path=str(place / "prm"),
            **common,
        )
        prm = training_stage(f"prm{suffix}", train_prm.main, run, [labels])
        make = partial(evaluate_prm, config, prm.result, test_solutions.path, place)
        return prm, Stage(f"evaluate{suffix}", place / "results.json", {}, make, [prm, test_solutions])

    prm, evaluation = trained(folder, examples, completer)  # a trunk that can add
    evaluations = {"soft, completer": evaluation}
    for kind, trunk in CONTROLS:
        name, place = f"{kind}, {trunk}", folder / "controls" / f"{kind}_{trunk}"
        first_weights = {"policy": policy, "completer": completer}[trunk]
        _, evaluations[name] = trained(place, chz.replace(examples, labels=kind), first_weights, f"_{place.name}")
    make = partial(collect, {name: stage.path for name, stage in evaluations.items()}, folder / "controls")
    controls = Stage("controls", folder / "controls" / "results.json", {}, make, list(evaluations.values()))

    reward = PrmReward(path=str(prm.result), form=FORM, scale="probability", coef=0.5)
    rewards = {"verifier": None, "verifier_and_prm": reward, "verifier_and_steps": chz.replace(reward, per_step=True)}
    runs = []
    for name, batch_reward in rewards.items():
        run = rl_train.Config(
            env=ChainBuilder(**task, batch_size=32, group_size=8, n_batches=config.rl_steps, seed=config.seed),
            batch_reward=batch_reward,
            load_checkpoint_path=str(policy.result),
            learning_rate=3e-4,
            lr_schedule="linear",
            eval_every=5,
            log_path=str(folder / name),
            **common,
        )
        runs.append(training_stage(name, rl_train.main, run, [policy, prm] if batch_reward else [policy]))
    keys, picture = ["env/all/correct", "test/env/all/correct"], folder / "rl.png"
    rl = Stage("rl", picture, {}, partial(compare_runs, [run.path for run in runs], picture, keys), runs)
    return [policy, completer, solutions, labels, prm, evaluation, controls, rl]


async def evaluate_prm(config: Config, prm: Path, test_solutions: Path, folder: Path) -> None:
    """Writes results.json and prm.png into `folder`."""
    chains, solutions_P_G = config.task.test_chains(), read_solutions(test_solutions)
    tokenizer = load_tokenizer(config.model_name)
    with ServiceClient(config.backend) as service:
        model = SavedPrm(path=str(prm), form=FORM).load(tokenizer, service)
        flat = [(solution.prompt, solution.tokens) for group in solutions_P_G for solution in group]
        scores = iter(await model.score(flat))
    scores_P_G = [[next(scores) for _ in group] for group in solutions_P_G]
    results, aligned = evaluate(chains, solutions_P_G, scores_P_G, model.renderer, FORM)
    results |= label_noise({chain.question: chain for chain in config.chains()}, config.folder / "labels.jsonl")
    print_metrics_table(results, f"{folder}: held-out chains")
    print(f"picture: {draw(folder / 'prm', results, aligned, folder / 'prm.png')}")
    write_results(folder, results)


def collect(evaluations: Mapping[str, Path], folder: Path) -> None:
    """`evaluations`: results.json by what was trained; writes those that tell them apart into `folder`."""
    found = {name: read_json(path) for name, path in evaluations.items()}
    results = {f"{name} | {key}": results[key] for name, results in found.items() for key in COMPARED}
    print_metrics_table(results, f"{folder}: labels, first weights")
    write_results(folder, results)


def _envs(config: Config, chains: Sequence[Chain]) -> list[ProblemEnv]:
    renderer = get_renderer("plain", load_tokenizer(config.model_name))
    return [ProblemEnv(chain.problem, renderer) for chain in chains]


async def main(config: Config) -> None:
    await run_stages(chosen(stages_of(config), config.stages))


if __name__ == "__main__":
    run_command(main, Config)
