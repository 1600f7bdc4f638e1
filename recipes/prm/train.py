"""A process reward model from nothing but a verifier of answers: which step of a chain of sums is the first wrong one?

    python recipes/prm/train.py                          # all stages; runs/prm
    python recipes/prm/train.py stages=rl                # RL with the PRM as a reward beside the verifier, and without it

Stages, each of which leaves its result in the run folder and is passed over when it is there: `warm_start` (a policy that is right about
half the time), `solutions` (its answers to training chains), `labels` (their steps labelled by rollouts: preference/prm_labels.py), `prm`
(preference/train_prm.py, from the policy's weights) and `evaluate` (held-out chains: first wrong steps, best of 8). `rl` must be asked for.
Killed anywhere, the same command goes on. README.md has the figures.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import chz

from envs.arithmetic_chain import ANSWER, Chain, ChainBuilder, ChainExamplesBuilder, ChainTask
from envs.problem_env import ProblemEnv
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, LEARNING_RATE, NON_NEGATIVE, SEED
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.types import SamplingParams
from posttrain.renderers import get_renderer
from posttrain.tracking.command_line import run_command
from posttrain.tracking.jsonl import as_dataclass, read_jsonl, write_atomically
from posttrain.tracking.metrics_log import print_metrics_table
from posttrain.tracking.plots import compare_runs
from posttrain.tracking.seeds import PRM_CHAINS
from posttrain.tracking.settings import claim_folder
from preference import train_prm
from preference.prm import PrmReward, SavedPrm
from preference.prm_labels import LabelConfig, label_solutions
from preference.solutions import Solution, sample_solutions
from preference.step_data import StepExamplesBuilder
from preference.steps import StepFormat
from recipes.prm.evaluation import evaluate, label_noise
from recipes.prm.picture import draw
from rl import train as rl_train
from supervised import train as supervised_train

STAGES = ("warm_start", "completer", "solutions", "labels", "prm", "evaluate", "rl")
FORM = StepFormat(separator="\n", answer_marker=ANSWER)


@chz.chz
class Config:
    """A process reward model for chains of sums."""

    stages: list[str] = chz.field(
        default_factory=lambda: list(STAGES[:-1]), doc="which stages to run, of those in the file's header"
    )
    task: ChainTask = chz.field(
        default_factory=lambda: ChainTask(num_steps=5, max_total=9, max_term=2, num_test=300),
        doc="the chains, and what is held out",
    )
    model_name: str = chz.field(default="tiny", doc="the policy, and the trunk of its process reward model")
    seed: int = chz.field(default=0, validator=SEED, doc="of everything but the choice of held-out chains")
    warm_start_nll: float = chz.field(
        default=0.05, validator=NON_NEGATIVE, doc="imitate until a batch's loss is below this: a policy that errs"
    )
    completer_nll: float = chz.field(
        default=0.004, validator=NON_NEGATIVE, doc="the completer goes on imitating until this: it errs seldom"
    )
    num_problems: int = chz.field(default=1800, validator=COUNT, doc="training chains that are solved and labelled")
    solutions_per_problem: int = chz.field(default=3, validator=COUNT, doc="solutions of each")
    num_completions: int = chz.field(default=3, validator=COUNT, doc="completions from the end of each step")
    prm_epochs: int = chz.field(default=8, validator=COUNT, doc="passes over the labelled solutions")
    prm_learning_rate: float = chz.field(default=2e-3, validator=LEARNING_RATE, doc="falls linearly to 0")
    rl_steps: int = chz.field(default=30, validator=COUNT, doc="steps of each run of the stage rl")
    best_of: int = chz.field(default=8, validator=COUNT, doc="solutions of each held-out chain to choose from")
    log_path: str = chz.field(default="runs/prm", munger=lambda _, path: str(Path(path).expanduser()), doc="the run folder")
    backend: BackendConfig = chz.field(default_factory=lambda: BackendConfig(engine="torch"), doc="how this machine runs models")

    @property
    def folder(self) -> Path:
        return Path(self.log_path)

    @property
    def policy(self) -> Path:
        return self.folder / "warm_start" / "checkpoints" / "final"

    @property
    def completer(self) -> Path:
        return self.folder / "completer" / "checkpoints" / "final"

    @property
    def prm(self) -> Path:
        return self.folder / "prm" / "checkpoints" / "final"

    @property
    def max_tokens(self) -> int:
        return ChainBuilder(num_steps=self.task.num_steps).recommended_max_tokens()

    def chains(self) -> list[Chain]:
        return self.task.chains(self.num_problems, [self.seed, PRM_CHAINS])


def warm_start(config: Config) -> None:
    _imitate(config, "warm_start", config.warm_start_nll, None)


def completer(config: Config) -> None:
    _imitate(config, "completer", config.completer_nll, str(config.policy))


def _imitate(config: Config, name: str, stop_at_nll: float, start: str | None) -> None:
    task = {name: getattr(config.task, name) for name in chz.chz_fields(ChainTask)}
    dataset = ChainExamplesBuilder(**task, batch_size=64, n_batches=400, seed=config.seed + bool(start))
    run = supervised_train.Config(
        dataset=dataset,
        model_name=config.model_name,
        renderer_name="plain",
        seed=config.seed,
        learning_rate=2e-3,
        lr_schedule="constant",
        stop_at_nll=stop_at_nll,
        load_checkpoint_path=start,
        eval_every=0,
        save_every=100,
        log_path=str(config.folder / name),
        behavior_if_log_dir_exists="resume",
        backend=config.backend,
    )
    asyncio.run(supervised_train.main(run))


def solutions(config: Config) -> None:
    _sample(config, config.chains(), config.solutions_per_problem, config.folder / "solutions.jsonl", 1)


def labels(config: Config) -> None:
    solved_P_G = _read(config.folder / "solutions.jsonl")
    label_config = LabelConfig(max_tokens=config.max_tokens, form=FORM, num_completions=config.num_completions, seed=config.seed)
    unfinished = config.folder / "labels.unfinished.jsonl"
    with ServiceClient(config.backend) as service:
        client = service.create_sampling_client(str(config.completer))
        envs_P = _envs(config, config.chains())
        pairs = [(env, solution) for env, group in zip(envs_P, solved_P_G, strict=True) for solution in group]
        _, counts = asyncio.run(label_solutions(client, pairs, label_config, unfinished))
    unfinished.rename(config.folder / "labels.jsonl")
    print("labels:", ", ".join(f"{count} {name}" for name, count in counts.items()))


def prm(config: Config) -> None:
    dataset = StepExamplesBuilder(
        path=str(config.folder / "labels.jsonl"),
        test_size=config.num_problems // 10,
        form=FORM,
        batch_size=32,
        seed=config.seed,
        labels="soft",
        last_tokens=1,
        until_first_error=True,
    )
    run = train_prm.Config(
        dataset=dataset,
        model_name=config.model_name,
        load_checkpoint_path=str(config.completer),  # its trunk can do the sums
        renderer_name="plain",
        seed=config.seed,
        learning_rate=config.prm_learning_rate,
        num_epochs=config.prm_epochs,
        eval_every=40,
        log_path=str(config.folder / "prm"),
        behavior_if_log_dir_exists="resume",
        backend=config.backend,
    )
    asyncio.run(train_prm.main(run))


def evaluate_stage(config: Config) -> None:
    chains, file = config.task.test_chains(), config.folder / "test_solutions.jsonl"
    if not file.exists():
        _sample(config, chains, config.best_of, file, 2)
    solutions_P_G = _read(file)
    tokenizer = load_tokenizer(config.model_name)
    with ServiceClient(config.backend) as service:
        model = SavedPrm(path=str(config.prm), form=FORM).load(tokenizer, service)
        flat = [(solution.prompt, solution.tokens) for group in solutions_P_G for solution in group]
        scores = iter(asyncio.run(model.score(flat)))
    scores_P_G = [[next(scores) for _ in group] for group in solutions_P_G]
    results, aligned = evaluate(chains, solutions_P_G, scores_P_G, model.renderer, FORM)
    results |= label_noise({chain.question: chain for chain in config.chains()}, config.folder / "labels.jsonl")
    print_metrics_table(results, f"{config.folder}: held-out chains")
    print(f"picture: {draw(config.folder / 'prm', results, aligned, config.folder / 'prm.png')}")
    write_atomically(config.folder / "results.json", json.dumps(results, indent=2) + "\n")


def rl(config: Config) -> None:
    """From the same policy with the verifier's reward alone, with the PRM's added to it, and with the PRM's per-step advantages."""
    prm_reward = PrmReward(path=str(config.prm), form=FORM, scale="probability", coef=0.5)
    rewards = {"verifier": None, "verifier_and_prm": prm_reward, "verifier_and_steps": chz.replace(prm_reward, per_step=True)}
    task = {name: getattr(config.task, name) for name in chz.chz_fields(ChainTask)}
    folders = [config.folder / name for name in rewards]
    for folder, reward in zip(folders, rewards.values(), strict=True):
        run = rl_train.Config(
            env=ChainBuilder(**task, batch_size=32, group_size=8, n_batches=config.rl_steps, seed=config.seed),
            batch_reward=reward,
            model_name=config.model_name,
            load_checkpoint_path=str(config.policy),
            renderer_name="plain",
            seed=config.seed,
            learning_rate=3e-4,
            lr_schedule="linear",
            eval_every=5,
            log_path=str(folder),
            behavior_if_log_dir_exists="resume",
            backend=config.backend,
        )
        asyncio.run(rl_train.main(run))
    compare_runs(folders, config.folder / "rl.png", ["env/all/correct", "test/env/all/correct"])


def _envs(config: Config, chains: Sequence[Chain]) -> list[ProblemEnv]:
    renderer = get_renderer("plain", load_tokenizer(config.model_name))
    return [ProblemEnv(chain.problem, renderer) for chain in chains]


def _sample(config: Config, chains: Sequence[Chain], count: int, file: Path, stream: int) -> None:
    """Writes one line per chain: its solutions."""
    params = SamplingParams(config.max_tokens, seed=1000 * config.seed + stream)
    with ServiceClient(config.backend) as service:
        client = service.create_sampling_client(str(config.policy))
        solutions_P_G = asyncio.run(sample_solutions(client, _envs(config, chains), count, params))
    lines = (json.dumps({"solutions": [asdict(solution) for solution in group]}) + "\n" for group in solutions_P_G)
    write_atomically(file, "".join(lines))


def _read(file: Path) -> list[list[Solution]]:
    groups = read_jsonl(file, {"solutions": list})
    return [[as_dataclass(fields, Solution, str(file)) for fields in group["solutions"]] for group in groups]


def main(config: Config) -> None:
    """Runs the stages that have no result yet. A folder that was filled with other settings is refused."""
    if unknown := set(config.stages) - set(STAGES):
        raise ConfigError(f"stages={sorted(unknown)}: choose from {', '.join(STAGES)}")
    claim_folder(config.folder, config, free=("stages",))
    results = {
        "warm_start": (warm_start, config.policy),
        "completer": (completer, config.completer),
        "solutions": (solutions, config.folder / "solutions.jsonl"),
        "labels": (labels, config.folder / "labels.jsonl"),
        "prm": (prm, config.prm),
        "evaluate": (evaluate_stage, config.folder / "results.json"),
        "rl": (rl, config.folder / "rl.png"),
    }
    for name in (name for name in STAGES if name in config.stages):
        stage, result = results[name]
        if result.exists():
            print(f"{name}: done already ({result})")
        else:
            print(f"--- {name}")
            stage(config)


if __name__ == "__main__":
    run_command(main, Config)
