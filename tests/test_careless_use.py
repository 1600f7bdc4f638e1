"""What a user writes and gives wrongly, through the API and in builders: an error that names it, and
nothing lost. Environments are in test_hostile_environments.py, options in test_cli.py.
"""

import asyncio
from pathlib import Path
from typing import Any

import chz
import pytest

from posttrain.backend import Datum, ModelInput, SamplingParams, ServiceClient
from posttrain.backend.errors import ConfigError, DataError, ModelError
from posttrain.backend.models import model_folder
from posttrain.renderers.types import Renderer
from posttrain.tracking.command_line import parse
from posttrain.tracking.datasets import ListDataset
from rl import evaluate
from rl import train as rl
from rl.names import ENVS
from rl.types import RLDatasetBuilder
from supervised import train as sft
from supervised.data import HuggingFaceBuilder
from supervised.evaluators import EvaluatorBuilder, EvaluatorList
from supervised.names import DATASETS
from supervised.nll import nll_means, nll_sums
from supervised.train_cli import CLIConfig
from supervised.types import SupervisedDatasetBuilder, datasets_of

PROMPT, PARAMS = ModelInput.from_ints([1, 2]), SamplingParams(max_tokens=1)


def datum(model_input: Any) -> Datum:
    return Datum(model_input, {"target_tokens": [1, 2], "weights": [1.0, 1.0]})


# Trap: a token that is no whole number is cut to one, and trained on or continued.
def test_what_is_no_datum_and_no_prompt_is_named(torch_service: ServiceClient) -> None:
    client = torch_service.create_training_client("micro")
    for data, message in [
        (["abc"], "datum 0 is 'abc', not a Datum"),
        (datum(PROMPT), "not a list of Datum"),
        (None, "the data are None"),
        ([datum(PROMPT), datum([1, 2])], r"datum 1: model_input is \[1, 2\], not a ModelInput"),
        ([datum(PROMPT), datum(ModelInput.from_ints([1.5, 2]))], "datum 1: .* not whole numbers"),  # type: ignore[list-item]
    ]:
        with pytest.raises(DataError, match=message):
            client.forward(data, "cross_entropy").result()  # type: ignore[arg-type]
        with pytest.raises(DataError, match=message):
            client.forward_backward_custom(data, lambda data, logprobs: (logprobs[0].sum(), {})).result()  # type: ignore[arg-type]
    sampler = client.save_weights_and_get_sampling_client()
    for prompt, params, message in [
        ([1, 2], PARAMS, r"the prompt is \[1, 2\], not a ModelInput"),
        (ModelInput.from_ints([1.5]), PARAMS, "the token 1.5"),  # type: ignore[list-item]
        (PROMPT, {"max_tokens": 1}, "not SamplingParams"),
    ]:
        with pytest.raises(DataError, match=message):
            sampler.sample(prompt, 1, params)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="not a ModelInput"):
        sampler.compute_logprobs([1, 2])  # type: ignore[arg-type]


@chz.chz
class OddExamples(SupervisedDatasetBuilder):
    returns: Any = None

    def __call__(self, renderer: Renderer) -> Any:
        return self.returns


@chz.chz
class AsyncExamples(SupervisedDatasetBuilder):
    async def __call__(self, renderer: Renderer) -> Any:
        return None


def test_a_supervised_builder_that_returns_no_data_sets_is_named(tmp_path: Path) -> None:
    good: Any = ListDataset([datum(PROMPT)], 1)
    config = sft.Config(dataset=OddExamples(), model_name="micro", log_path=str(tmp_path / "run"))
    with pytest.raises(DataError, match="OddExamples returned None, not a training set and a held-out set"):
        asyncio.run(sft.main(config))
    for builder, message in [
        (OddExamples(returns=good), "OddExamples returned <.*>, not a training set and a held-out set"),
        (OddExamples(returns=([datum(PROMPT)], None)), "not a data set: it has no get_batch"),
        (OddExamples(returns=(good, "test")), "OddExamples returned 'test', which is not a data set"),
        (AsyncExamples(), "AsyncExamples.__call__ is an `async def`"),
    ]:
        with pytest.raises(DataError, match=message):
            datasets_of(builder, config.renderer())
    assert datasets_of(OddExamples(returns=(good, None)), config.renderer()) == (good, None)


def test_examples_of_which_no_token_carries_loss_are_named() -> None:
    unweighted = Datum(PROMPT, {"target_tokens": [1, 2], "weights": [0.0, 0.0]})
    with pytest.raises(DataError, match="no token carries loss"):
        nll_means(nll_sums([unweighted], [unweighted.loss_fn_inputs["weights"]]))


# Trap: a file in the current folder is no data set "." of the hub.
def test_a_table_in_the_current_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    Path("sums.csv").write_text("prompt,completion\n1+1=,two\n")
    with pytest.raises(ConfigError, match="dataset=huggingface dataset.name=sums.csv reads"):
        parse(CLIConfig, ["dataset=sums.csv"], {"dataset": DATASETS})
    train, _ = HuggingFaceBuilder(name="sums.csv", prompt_field="prompt")(sft.Config(dataset=OddExamples()).renderer())
    assert len(train) == 1


def not_on_the_hub(name: str, weights: bool) -> Path:
    raise ModelError(f"{name} is not there")


def test_a_run_that_is_not_in_its_folder_is_not_only_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "first_run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="the folder runs is here, and has no frist_run .* mean runs/first_run"):
        model_folder("runs/frist_run")
    monkeypatch.setattr("posttrain.backend.models.hub_folder", not_on_the_hub)
    with pytest.raises(ModelError, match=r"rusn is not there .*; did you mean runs\?"):
        model_folder("rusn")
    with pytest.raises(ConfigError, match=r"^models: not given; write models=\.\.\."):
        parse(evaluate.Config, ["env=arithmetic"], {"env": ENVS})


@chz.chz
class SyncTasks(RLDatasetBuilder):
    def __call__(self, renderer: Renderer) -> Any:
        return None


def test_a_builder_of_environments_that_is_not_async_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="SyncTasks.__call__ must be an `async def`"):
        asyncio.run(rl.main(rl.Config(env=SyncTasks(), model_name="micro", log_path=str(tmp_path / "run"))))


@chz.chz
class SyncEvaluator(EvaluatorBuilder):
    def __call__(self, renderer: Renderer) -> Any:
        return None


def test_an_evaluator_that_is_not_async_or_gives_no_numbers_is_named(tmp_path: Path) -> None:
    config = sft.Config(dataset=OddExamples(), model_name="micro", evaluators=[SyncEvaluator()])
    with pytest.raises(ConfigError, match="evaluators.0 returned None without being an `async def`"):
        asyncio.run(config.build_evaluators(config.renderer()))

    async def gives(metrics: Any) -> Any:
        return metrics

    for evaluator, message in [
        (lambda _: {"a": 1.0}, "evaluators.0 returned {'a': 1.0} without being an `async def`"),
        (lambda _: gives(None), "evaluators.0 returned None, not a dict of metrics"),
        (lambda _: gives({"a": 1.0, "b": "c"}), "evaluators.0 returned the metric b='c': not a number"),
    ]:
        with pytest.raises(ConfigError, match=message):
            asyncio.run(EvaluatorList([("evaluators.0", evaluator)])(None))  # type: ignore[arg-type]
