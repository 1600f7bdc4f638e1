"""Evaluators of the configuration in supervised, preference and RL runs: when they run, that they
change no step, and what is refused.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import chz
import pytest

from envs.arithmetic import ArithmeticBuilder, ArithmeticExamplesBuilder
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.types import TensorData
from posttrain.renderers.types import Renderer
from posttrain.tracking.command_line import parse
from posttrain.tracking.metrics_log import Metrics, read_metrics
from posttrain.tracking.settings import changes, config_to_json
from preference import train_dpo
from preference.comparisons import ChosenRejectedBuilder
from rl import train as rl
from rl.evaluators import EnvEvaluator
from rl.train_cli import CLIConfig
from supervised import distill
from supervised import train as sft
from supervised.data import datum_from_tokens_weights
from supervised.evaluators import CustomEvaluator, Evaluated, EvaluatorBuilder
from supervised.names import EVALUATOR_OPTIONS
from supervised.nll import DatasetNLL, nll_means, nll_sums
from tests.finished_runs import weights

COMMON: dict[str, Any] = {
    "model_name": "micro",
    "backend": BackendConfig(engine="torch"),
    "eval_every": 2,
    "max_steps": 3,
}
EXAMPLES = ArithmeticExamplesBuilder(num_digits=1, num_test=4, batch_size=4)
ENV = ArithmeticBuilder(num_digits=1, num_test=4, batch_size=2, group_size=2)


@chz.chz
class NormEvaluator(EvaluatorBuilder):
    """A user's own, in a few lines: the trained client's number of weight changes, and a sample."""

    name: str = chz.field(default="mine")

    async def __call__(self, renderer: Renderer) -> CustomEvaluator:
        prompt = renderer.build_generation_prompt([{"role": "user", "content": "1+1="}])

        async def evaluate(model: Evaluated) -> Metrics:
            client = await model.sampling_client()
            logprobs = await client.compute_logprobs(prompt)
            return {f"{self.name}/last_logprob": float(logprobs[-1] or 0.0)}

        return evaluate


def steps_with(path: Path, name: str) -> list[int]:
    return [record["step"] for record in read_metrics(path) if name in record]


EVALUATORS: dict[str, Any] = {
    "evaluators": [NormEvaluator(), DatasetNLL(dataset=EXAMPLES, name="other")],
    "infrequent_evaluators": [EnvEvaluator(env=ENV, num_samples=2, max_tokens=4)],
    "infrequent_eval_every": 3,
}


# Trap: an evaluation that samples moves the seeds or the data of the steps after it.
def test_a_supervised_run_is_the_same_with_evaluators(tmp_path: Path) -> None:
    base = sft.Config(dataset=EXAMPLES, log_path=str(tmp_path / "without"), **COMMON)
    asyncio.run(sft.main(base))
    asyncio.run(sft.main(chz.replace(base, log_path=str(tmp_path / "with"), **EVALUATORS)))
    assert weights(tmp_path / "with") == weights(tmp_path / "without")
    path = tmp_path / "with"
    assert steps_with(path, "mine/last_logprob") == steps_with(path, "test/nll") == [0, 2, 3]
    assert steps_with(path, "eval/env/all/pass@2") == steps_with(path, "eval/env/all/correct") == [0, 3]
    first, *_, last = (record["mine/last_logprob"] for record in read_metrics(path) if "mine/last_logprob" in record)
    assert first != last, "each evaluation sees the present weights"
    nll = [(record["test/nll"], record["other/nll"]) for record in read_metrics(path) if "test/nll" in record]
    assert all(ours == others for ours, others in nll)


# Trap: a run that takes the options and never evaluates.
def test_a_distillation_run_has_evaluators(tmp_path: Path) -> None:
    evaluators: dict[str, Any] = EVALUATORS | {"infrequent_evaluators": [DatasetNLL(dataset=EXAMPLES, name="rarely")]}
    config = distill.Config(dataset=EXAMPLES, teacher="micro", log_path=str(tmp_path), **COMMON, **evaluators)
    asyncio.run(distill.main(config))
    assert steps_with(tmp_path, "mine/last_logprob") == steps_with(tmp_path, "test/teacher_kl") == [0, 2, 3]
    assert steps_with(tmp_path, "rarely/nll") == [0, 3]


@pytest.mark.slow
def test_an_rl_run_is_the_same_with_evaluators(tmp_path: Path) -> None:
    base = rl.Config(env=ENV, log_path=str(tmp_path / "without"), max_tokens=3, **COMMON)
    asyncio.run(rl.main(base))
    asyncio.run(rl.main(chz.replace(base, log_path=str(tmp_path / "with"), **EVALUATORS)))
    assert weights(tmp_path / "with") == weights(tmp_path / "without")
    path = tmp_path / "with"
    assert steps_with(path, "mine/last_logprob") == steps_with(path, "test/env/all/correct") == [0, 2, 3]
    assert steps_with(path, "eval/env/all/pass@2") == [0, 3]


@pytest.mark.slow
def test_a_preference_run_evaluates_too(tmp_path: Path) -> None:
    pairs = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": "x"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    dataset = ChosenRejectedBuilder(path=str(tmp_path / "pairs.jsonl"))
    config = train_dpo.Config(dataset=dataset, batch_size=4, log_path=str(tmp_path / "dpo"), **COMMON, **EVALUATORS)
    asyncio.run(train_dpo.main(config))
    assert steps_with(tmp_path / "dpo", "mine/last_logprob") == [0, 2]
    assert steps_with(tmp_path / "dpo", "eval/env/all/pass@2") == [0, 2]


def test_bad_evaluators_are_refused(tmp_path: Path) -> None:
    def refused(error: type[Exception], message: str, **options: Any) -> None:
        config = sft.Config(dataset=EXAMPLES, log_path=str(tmp_path / message[:5]), **(COMMON | options))
        with pytest.raises(error, match=message):
            asyncio.run(sft.main(config))

    twice = [NormEvaluator(), NormEvaluator()]
    refused(
        ConfigError, r"evaluators.1 returns the metric mine/last_logprob, .*: set evaluators.1.name", evaluators=twice
    )
    missing = EnvEvaluator(env=parse(CLIConfig, ["env=envs.math_benchmarks:Math500", "env.path=/no/where"]).env)
    refused(DataError, "/no/where: no such file", evaluators=[missing])
    empty = EnvEvaluator(env=chz.replace(ENV, num_test=0))
    refused(ConfigError, "num_test=0", infrequent_evaluators=[empty])


def test_evaluators_by_short_names_and_a_resume_may_change_them() -> None:
    argv = ["evaluators.0=env", "evaluators.0.env=gsm8k", "evaluators.0.env.data_dir=d", "evaluators.0.num_samples=4"]
    argv += ["infrequent_evaluators.0=nll", "infrequent_evaluators.0.dataset=some.jsonl"]
    config = parse(CLIConfig, argv, EVALUATOR_OPTIONS)
    evaluator = config.evaluators[0]
    assert isinstance(evaluator, EnvEvaluator) and evaluator.num_samples == 4
    assert type(evaluator.env).__name__ == "Gsm8kBuilder" and evaluator.env.data_dir == "d"  # type: ignore[attr-defined]
    assert config.infrequent_evaluators[0].dataset.path == "some.jsonl"  # type: ignore[attr-defined]
    without = parse(CLIConfig, [], EVALUATOR_OPTIONS)
    assert not changes(config_to_json(config), config_to_json(without))
    with pytest.raises(ConfigError, match="evaluators.0.num_sample.*did you mean evaluators.0.num_samples"):
        parse(CLIConfig, [*argv, "evaluators.0.num_sample=4"], EVALUATOR_OPTIONS)


@pytest.mark.parametrize(
    ("reduction", "weighted"), [("mean", ((1 + 2 + 3) / 3 + 8) / 2), ("sum", (1 + 2 + 3 + 8) / 4)], ids=["mean", "sum"]
)
def test_both_means_of_the_likelihood_by_hand(reduction: str, weighted: float) -> None:
    """An answer of 3 tokens with nll 1, 2, 3, and one of a single token with nll 8. The weighted
    mean is the loss that is trained on.
    """
    data = [
        datum_from_tokens_weights([9, 5, 6, 7, 8], [0, 0, 1, 1, 1], reduction=reduction),
        datum_from_tokens_weights([9, 5, 6], [0, 0, 1], reduction=reduction),
    ]
    logprobs = [TensorData([0.0, -1.0, -2.0, -3.0]), TensorData([0.0, -8.0])]
    assert nll_means(nll_sums(data, logprobs)) == pytest.approx((14 / 4, weighted))
    loss = -sum(float(d.loss_fn_inputs["weights"].array @ p.array) for d, p in zip(data, logprobs, strict=True))
    assert weighted == pytest.approx(loss / (2 if reduction == "mean" else 4))
