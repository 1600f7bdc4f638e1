"""posttrain-eval: its numbers against their definitions, resuming, several models side by side, and
its evaluators inside training runs.
"""

import asyncio
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import chz
import numpy as np
import pytest

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import CheckpointError, ConfigError
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import ModelInput
from posttrain.renderers.types import Renderer
from posttrain.tracking.datasets import ListDataset
from posttrain.tracking.model_source import find_model
from rl import evaluate
from rl.evaluation_page import notices, tables
from rl.evaluation_results import Estimate, differences, estimates, interval_text, problem_values
from rl.rollouts import RolloutLimits
from rl.sample_metrics import mean_and_stderr, paired_difference, ratio_values
from rl.types import (
    Env,
    EnvGroupBuilder,
    Observation,
    RLDataset,
    RLDatasetBuilder,
    RolloutError,
    StepResult,
    StopCondition,
    TokensWithLogprobs,
    Trajectory,
    TrajectoryGroup,
    Transition,
)
from tests import commands
from tests.jsonl_files import write
from tests.test_benchmarks import IFEVAL

TORCH = BackendConfig(engine="torch")


def episode(reward: float, **metrics: float) -> Trajectory:
    action = TokensWithLogprobs([6, 7], [-1.0, -1.0])
    turn = Transition(ModelInput.from_ints([5]), action, reward, True, {**metrics}, {"question": "?"})
    return Trajectory([turn])


def group(*episodes: Trajectory, lost: int = 0) -> TrajectoryGroup:
    errors = [RolloutError("lost")] * lost
    return TrajectoryGroup([*episodes], [0.0] * len(episodes), [{} for _ in episodes], [], errors)


# Trap: a standard error over samples, as if those of one problem were independent.
def test_standard_errors_are_clustered_by_problem() -> None:
    right, wrong = episode(1.0, correct=1.0), episode(0.0, correct=0.0)
    groups = [group(right, right), group(right, wrong), group(wrong, wrong, lost=2), group(lost=2)]
    values = problem_values(groups, [1, 2])
    assert values["correct"] == [1.0, 0.5, 0.0, None] and values["pass@2"] == [1.0, 1.0, 0.0, None]
    found = estimates(values, {})
    # of the problems' means 1, 1/2, 0: standard deviation 1/2, over the root of 3
    assert found["correct"] == Estimate(0.5, 0.5 / 3**0.5, 3)
    assert list(found)[:3] == ["correct", "pass@1", "pass@2"]
    # the cluster-robust variance of the mean of all samples, sum over clusters of (sum of residuals)^2 / n^2,
    # with the factor P / (P - 1), written out for equal clusters
    residuals_P = [2 * (1 - 0.5), 0.0, 2 * (0 - 0.5)]
    assert found["correct"].stderr == pytest.approx((3 / 2 * sum(r**2 for r in residuals_P) / 6**2) ** 0.5)
    assert estimates(values, {}, [0])["correct"].to_json() == {"mean": 1.0, "stderr": None, "problems": 1}


def test_a_tag_whose_problems_have_no_right_answers_is_shown_by_its_reward() -> None:
    found = {"mean": 0.5, "stderr": 0.1, "problems": 4}
    tags = {"sums": {"correct": found, "reward": found}, "essays": {"reward": found}}
    model = {"label": "policy", "problems": 8, "samples_lost": 0, "metrics": {}, "tags": tags}
    _, (title, _, rows) = tables({"models": [model], "paired": [], "settings": {"env": {"class": "envs:Mixed"}}})
    assert title == "correct, by tag" and [name for name, _ in rows] == ["sums", "essays (reward)"]


# Trap: 0 right of 200, of a model that nobody told in which form to answer.
def test_a_model_that_never_answers_in_the_graded_form_is_named() -> None:
    means = {"none": 0.0, "some": 0.01, "all": 1.0}
    models = [
        {"label": label, "transcripts": f"{label}.html", "metrics": {"format": {"mean": mean}}}
        for label, mean in means.items()
    ]
    (notice,) = notices({"models": [*models, {"label": "no_format", "metrics": {}}]})
    assert notice.startswith("none: no answer has the form that is graded. Read none.html")


def test_a_ratio_of_sums_and_its_standard_error_agree_with_the_bootstrap() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 4, 200)
    kept = rng.binomial(sizes, 0.6)
    mean, stderr = mean_and_stderr(ratio_values(kept.tolist(), sizes.tolist()))
    assert mean == pytest.approx(kept.sum() / sizes.sum())
    drawn = rng.integers(0, 200, (4000, 200))
    assert stderr == pytest.approx((kept[drawn].sum(1) / sizes[drawn].sum(1)).std(), rel=0.05)
    groups = [group(episode(0, followed=float(k), asked=float(n))) for k, n in zip(kept, sizes, strict=True)]
    ratios = {"share": ("followed", "asked")}
    values = problem_values(groups, [1])
    assert estimates(values, ratios)["share"].mean == pytest.approx(mean)
    # Trap: of some problems, such as those of a tag, the mean of values that are linear around the ratio of all
    few = np.flatnonzero(sizes == 3).tolist()[:40] + np.flatnonzero(sizes == 1).tolist()[:5]
    of_few = estimates(values, ratios, few)["share"]
    assert of_few.mean == pytest.approx(kept[few].sum() / sizes[few].sum()) and of_few.problems == 45
    lost = problem_values([TrajectoryGroup([], [], []), *groups[1:]], [1])
    found = differences(lost, values, ratios)["share"]
    assert found.mean == pytest.approx(0.0) and found.problems == 199


def test_paired_differences_by_hand() -> None:
    mean, stderr, problems = paired_difference([1.0, 1.0, 0.0, None], [0.0, 1.0, 0.0, 1.0])
    assert (mean, problems) == (pytest.approx(1 / 3), 3) and stderr == pytest.approx(1 / 3)
    assert paired_difference([None], [1.0])[2] == 0
    found = differences({"correct": [1.0, 1.0, 0.0]}, {"correct": [0.0, 1.0, 0.0], "other": [1.0, 1.0, 1.0]}, {})
    assert list(found) == ["correct"]
    assert interval_text(found["correct"]) == "+0.333 [-1.1, +1.77]"  # 4.303 standard errors: of 3 problems
    assert interval_text(Estimate(0.0, 1.0, 31)) == "+0 [-2.04, +2.04]"
    assert interval_text(Estimate(0.0, 1.0, 32)) == "+0 [-1.96, +1.96]"
    # the same difference unpaired has a larger error: 0.47 against 0.33
    unpaired = sum(mean_and_stderr(values)[1] ** 2 for values in ([1.0, 1.0, 0.0], [0.0, 1.0, 0.0])) ** 0.5
    assert stderr < unpaired


# Trap: one lost problem, taken for another problem.
def test_a_lost_problem_is_left_out_of_the_paired_differences(capsys: pytest.CaptureFixture[str]) -> None:
    def evaluated(label: str, *groups: TrajectoryGroup) -> evaluate.Evaluated:
        values = problem_values(groups, [1])
        return evaluate.Evaluated(find_model("micro"), label, groups, values, {}, f"{label}.html")

    def asking(question: str) -> TrajectoryGroup:
        asked = episode(1.0)
        asked.transitions[0].logs["question"] = question
        return group(asked)

    whole = evaluated("whole", group(episode(0.0)), group(episode(1.0)), group(episode(1.0)))
    others = [
        evaluated("lost", group(lost=1), group(episode(0.0)), group(episode(1.0))),
        evaluated("other", asking("else"), group(episode(1.0)), group(episode(1.0))),
        evaluated("fewer", group(episode(1.0)), group(episode(1.0))),
    ]
    paired = evaluate.to_json(config(Path("unused")), [whole, *others])["paired"]
    assert [pair["model"] for pair in paired] == ["lost"]
    assert paired[0]["metrics"]["reward"] == {"mean": -0.5, "stderr": pytest.approx(0.5), "problems": 2}
    assert "fewer and whole were not given the same problems" in capsys.readouterr().out


class BoundlessEnv(Env):
    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        return ModelInput.from_ints([5]), []

    async def step(self, action: list[int]) -> StepResult:
        metrics = {"ratio": float("nan"), "bound": float("-inf"), "fine": 1.0}
        return StepResult(1.0, True, ModelInput.empty(), metrics=metrics)


class BoundlessGroup(EnvGroupBuilder):
    async def make_envs(self) -> Sequence[Env]:
        return [BoundlessEnv()]


@chz.chz
class BoundlessBuilder(RLDatasetBuilder):
    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        groups = ListDataset([BoundlessGroup() for _ in range(2)], 2, shuffle=False)
        return groups, groups


# Trap: a metric that training logs and an evaluation dies of, after its sampling.
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_metric_that_is_not_finite_is_null_in_the_results(tmp_path: Path) -> None:
    settings = config(tmp_path, env=BoundlessBuilder(), num_samples=1)
    for _ in range(2):  # sampled, then read
        (one,) = asyncio.run(evaluate.main(settings))
        assert one.groups_P[0].trajectories_G[0].transitions[0].metrics["bound"] == float("-inf")
        (model,) = json.loads((tmp_path / "results.json").read_text())["models"]
        assert [model["metrics"][name]["mean"] for name in ("ratio", "bound", "fine")] == [None, None, 1.0]


def config(path: Path, *models: str, **options: Any) -> evaluate.Config:
    from envs.arithmetic import ArithmeticBuilder

    env = ArithmeticBuilder(num_digits=1, num_test=6)
    options = {"env": env, "num_samples": 4, "backend": TORCH, "log_path": str(path)} | options
    return evaluate.Config(models=[*(models or ("micro",))], **options)


def records(path: Path) -> list[dict[str, Any]]:
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda r: (r["problem"], r["sample"]))


def actions(samples: Iterable[dict[str, Any]]) -> list[list[int]]:
    return [t["ac"]["tokens"] for r in samples for e in r["group"]["trajectories"] for t in e["turns"]]


def test_a_killed_evaluation_goes_on_and_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    options = ["models=micro", "env.num_digits=1", "env.num_test=6", "num_samples=4", "backend.engine=torch"]
    command = ["-m", "rl.evaluate", *options]
    killed = commands.Command(*command, f"log_path={tmp_path / 'killed'}", killed_at=("samples.jsonl", 9)).completed()
    assert killed.returncode == -9
    file = tmp_path / "killed/micro/samples.jsonl"
    assert 0 < len(records(file)) < 24
    file.write_text(file.read_text() + '{"problem": 1, "sam')  # torn by the kill
    result = commands.run(*command, f"log_path={tmp_path / 'killed'}")
    assert result.returncode == 0, result.stderr
    assert "samples exist" in result.stdout and "pass@4" in result.stdout
    asyncio.run(evaluate.main(config(tmp_path / "whole")))
    whole = records(tmp_path / "whole/micro/samples.jsonl")
    assert actions(records(file)) == actions(whole) and len(whole) == 24
    both = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("killed", "whole")]
    assert both[0]["models"][0]["metrics"] == both[1]["models"][0]["metrics"]
    # more samples of more problems keep those that are there
    asyncio.run(evaluate.main(config(tmp_path / "whole", num_samples=5, temperature=1.0)))
    assert actions(r for r in records(tmp_path / "whole/micro/samples.jsonl") if r["sample"] < 4) == actions(whole)


def test_models_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ServiceClient(TORCH, tmp_path / "run/checkpoints") as service:
        service.create_training_client("micro", seed=3).save_state("000010").result()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 0}\n')
    (tmp_path / "run/config.json").write_text('{"renderer_name": "plain"}\n')
    record = {"name": "000010", "step": 10, "path": "checkpoints/000010"}
    (tmp_path / "run/checkpoints.jsonl").write_text(json.dumps(record) + "\n")
    models = ("micro", str(tmp_path / "run"), "llama-tiny")
    evaluated = asyncio.run(evaluate.main(config(tmp_path / "eval", *models)))
    assert [one.label for one in evaluated] == ["micro", "run_000010", "llama-tiny"]
    results = json.loads((tmp_path / "eval/results.json").read_text())
    assert [pair["model"] for pair in results["paired"]] == ["run_000010", "llama-tiny"]
    first, second = (model["metrics"]["tokens"]["mean"] for model in results["models"][:2])
    assert results["paired"][0]["metrics"]["tokens"]["mean"] == pytest.approx(second - first)
    page = (tmp_path / "eval/report.html").read_text()
    assert 'href="run_000010.html"' in page and "paired differences" in page
    assert "group 5" in (tmp_path / "eval/run_000010.html").read_text()
    # the run's renderer: no chat template in its prompts
    prompts = [records(tmp_path / f"eval/{label}/samples.jsonl")[0] for label in ("micro", "run_000010")]
    chat, plain = (r["group"]["trajectories"][0]["turns"][0]["ob"] for r in prompts)
    assert len(plain) < len(chat)
    assert "run_000010 - micro" in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    def refused(error: type[Exception], message: str, **options: Any) -> None:
        models = options.pop("models", ("micro",))
        with pytest.raises(error, match=message):
            asyncio.run(evaluate.main(config(tmp_path / "eval", *models, **options)))

    asyncio.run(evaluate.main(config(tmp_path / "eval")))
    refused(ConfigError, r"were made with temperature=1.0 \(now 0.5\): delete that folder", temperature=0.5)
    refused(ConfigError, "ks=8 is more than num_samples=4", ks=(1, 8))
    refused(ConfigError, "same sample every time", temperature=0.0)
    refused(ConfigError, "two models have the label micro", models=("micro", "micro"))
    refused(ConfigError, "there is no model folder", models=("./nothing",))
    (tmp_path / "empty").mkdir()
    refused(CheckpointError, "not a checkpoint", models=(str(tmp_path / "empty"),))
    (tmp_path / "empty/metrics.jsonl").touch()
    refused(ConfigError, "without a checkpoint", models=(str(tmp_path / "empty"),))
    refused(ConfigError, "holds a training run", log_path=str(tmp_path / "empty"))
    assert find_model("Qwen/Qwen3-0.6B").label == "Qwen--Qwen3-0.6B"
    result = commands.run("-m", "rl.evaluate", "models=micro", "env=gsm9k")
    assert result.returncode == 2 and "did you mean gsm8k?" in result.stderr


def test_options_that_a_newer_version_added_count_as_their_defaults(tmp_path: Path) -> None:
    asyncio.run(evaluate.main(config(tmp_path / "eval")))
    (file,) = (tmp_path / "eval").rglob("made_with.json")
    made_with = json.loads(file.read_text())
    del made_with["env"]["group_size"], made_with["limits"]["max_retries"]
    file.write_text(json.dumps(made_with))
    asyncio.run(evaluate.main(config(tmp_path / "eval")))
    file.write_text(json.dumps(made_with))
    with pytest.raises(ConfigError, match=r"were made with limits.max_retries=\d \(now 9\)"):
        asyncio.run(evaluate.main(config(tmp_path / "eval", limits=RolloutLimits(max_retries=9))))


def test_changed_weights_are_noticed(tmp_path: Path) -> None:
    with ServiceClient(TORCH, tmp_path) as service:
        service.create_training_client("micro", seed=3).save_state("model").result()
        asyncio.run(evaluate.main(config(tmp_path / "eval", str(tmp_path / "model"))))
        service.create_training_client("micro", seed=4).save_state("model").result()
    with pytest.raises(ConfigError, match=r"were made with weights=\w+ \(now \w+\)"):
        asyncio.run(evaluate.main(config(tmp_path / "eval", str(tmp_path / "model"))))


def test_a_benchmark_from_a_file_by_the_command(tmp_path: Path) -> None:
    path = write(
        tmp_path / "ifeval.jsonl", IFEVAL, IFEVAL | {"instruction_id_list": ["startend:quotation"], "kwargs": [{}]}
    )
    options = ["models=micro", f"env={path}", f"log_path={tmp_path / 'eval'}", "max_tokens=30", "backend.engine=torch"]
    result = commands.run("-m", "rl.evaluate", *options)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "eval/results.json").read_text())["models"][0]["metrics"]
    assert {"prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose"} <= metrics.keys()
    assert "maj@1" not in metrics, "programs and texts have no vote"
