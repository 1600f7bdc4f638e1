"""What a user writes and gives wrongly, through the API and in builders: an error that names it, and
nothing lost. Environments are in test_hostile_environments.py, options in test_cli.py.
"""

import asyncio
from pathlib import Path
from typing import Any

import chz
import pytest
import torch

from envs.interleaved import InterleavedBuilder
from envs.problem import Grade, Grader, GraderError, Problem, ProblemSet, Split, check_apart
from envs.rewards import correct_answer
from envs.single_turn import SingleTurn
from posttrain.backend import Datum, ModelInput, SamplingParams, ServiceClient
from posttrain.backend.data_checks import _say_unshifted
from posttrain.backend.errors import ConfigError, CookbookError, DataError, ModelError
from posttrain.backend.models import model_folder
from posttrain.renderers.types import Renderer
from posttrain.tracking.command_line import parse
from posttrain.tracking.datasets import DrawnDataset, ListDataset
from preference.comparisons import PreferenceRowsBuilder
from preference.types import Comparison, LabeledComparison
from rl import evaluate, play, rollouts
from rl import train as rl
from rl.names import ENVS
from rl.rollouts import RolloutLimits, do_group_rollout
from rl.types import Env, EnvGroupBuilder, MalformedStep, RLDatasetBuilder, StepResult, TokensWithLogprobs
from supervised import train as sft
from supervised.data import ChatDatasetBuilder, HuggingFaceBuilder, MixtureBuilder
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


# Trap: labels as other libraries take them: -100 for no loss, and shifted by the model.
def test_labels_of_other_libraries_are_named(torch_service: ServiceClient, capsys: pytest.CaptureFixture[str]) -> None:
    client, tokens = torch_service.create_training_client("micro"), ModelInput.from_ints([1, 2, 3])
    ones = [1.0, 1.0, 1.0]
    with pytest.raises(DataError, match="outside the vocabulary .* weights of 0 leave tokens out, not -100"):
        client.forward([Datum(tokens, {"target_tokens": [2, 3, -100], "weights": ones})], "cross_entropy").result()
    _say_unshifted.cache_clear()
    for targets, said in [([2, 3, 1], 0), ([1, 2, 3], 1), ([1, 2, 3], 0)]:
        client.forward([Datum(tokens, {"target_tokens": targets, "weights": ones})], "cross_entropy").result()
        assert capsys.readouterr().out.count("the model learns to repeat each token") == said
    # Trap: said of every run with a scalar model, which has no targets
    _say_unshifted.cache_clear()
    torch_service.create_scalar_client("micro").forward([Datum(tokens, {"weights": ones})], zero_loss).result()
    assert capsys.readouterr().out == ""


def zero_loss(scalars_N: torch.Tensor, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return 0 * scalars_N, {}


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
        (MixtureBuilder(builders=[OddExamples()]), "OddExamples returned None, not a training set"),
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


def test_a_module_that_lacks_a_package_is_not_looked_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lacking_envs.py").write_text("import no_such_package.part\n")
    with pytest.raises(ConfigError, match="no_such_package is neither installed nor in the current folder"):
        parse(evaluate.Config, ["models=micro", "env=lacking_envs:Builder"], {"env": ENVS})


@chz.chz
class SyncTasks(RLDatasetBuilder):
    def __call__(self, renderer: Renderer) -> Any:
        return None


@chz.chz
class OddTasks(RLDatasetBuilder):
    returns: Any = None

    async def __call__(self, renderer: Renderer) -> Any:
        return self.returns


class OfNegativeLength:
    def get_batch(self, index: int) -> list[Any]:
        return []

    def __len__(self) -> int:
        return -1


# Trap: builders that training checks, and evaluation or play does not.
def test_a_builder_of_environments_is_checked_in_training_evaluation_and_play(tmp_path: Path) -> None:
    def trained(env: RLDatasetBuilder) -> Any:
        return rl.main(rl.Config(env=env, model_name="micro", log_path=str(tmp_path / "run")))

    def evaluated(env: RLDatasetBuilder) -> Any:
        return evaluate.main(evaluate.Config(models=["micro"], env=env, log_path=str(tmp_path / "eval")))

    def played(env: RLDatasetBuilder) -> Any:
        return play.play(play.Config(env=env, model_name="micro"))

    no_tasks = DrawnDataset(lambda *_: [], 1)
    for env, message in [
        (SyncTasks(), "SyncTasks.__call__ must be an `async def`"),
        (OddTasks(), "OddTasks returned None, not a training set and a held-out set"),
        (OddTasks(returns=no_tasks), "OddTasks returned <.*>, not a training set and a held-out set"),
        (OddTasks(returns=(None, None)), "OddTasks returned None, which is not an RLDataset"),
        (OddTasks(returns=(no_tasks, [1])), r"OddTasks returned \[1\], which is not an RLDataset"),
        (OddTasks(returns=(OfNegativeLength(), None)), "whose length cannot be taken: __len__.. should return >= 0"),
        (InterleavedBuilder(builders=[OddTasks()]), "OddTasks returned None, not a training set"),
    ]:
        for use in (trained, evaluated, played):
            with pytest.raises(DataError, match=message):
                asyncio.run(use(env))
    with pytest.raises(DataError, match="get_batch.* returned no group"):
        asyncio.run(played(OddTasks(returns=(no_tasks, None))))
    with pytest.raises(ConfigError, match="OddTasks has no held-out problems"):
        asyncio.run(evaluated(OddTasks(returns=(no_tasks, None))))


class Forever(Env):
    async def initial_observation(self) -> Any:
        return PROMPT, []

    async def step(self, action: list[int]) -> StepResult:
        return StepResult(0.0, False, PROMPT, [])


class SameAgain(EnvGroupBuilder):
    envs = (Forever(),)

    async def make_envs(self) -> Any:
        return self.envs


async def zeros(*args: object) -> TokensWithLogprobs:
    return TokensWithLogprobs([0], [0.0])


# Trap: an episode that goes on where the last one ended; an episode that never ends, without a word.
def test_an_env_that_is_used_again_and_one_that_never_ends_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rollouts, "MANY_TURNS", 5)
    policy: Any = zeros
    for turns, said in [(5, 0), (9, 1), (9, 0)]:
        group = asyncio.run(do_group_rollout(SameAgain(), policy, (0,), RolloutLimits(max_turns=turns)))
        assert [len(trajectory.transitions) for trajectory in group.trajectories_G] == [turns]
        assert capsys.readouterr().out.count("an episode of Forever has 5 turns") == said
        SameAgain.envs = (Forever(),)
    asyncio.run(do_group_rollout(SameAgain(), policy, (0,), RolloutLimits(max_turns=1)))
    with pytest.raises(
        MalformedStep, match="SameAgain.make_envs returned an environment that an earlier call returned"
    ):
        asyncio.run(do_group_rollout(SameAgain(), policy, (0,), RolloutLimits(max_turns=1)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"env": SyncTasks},
            r"env=<class .*SyncTasks'> is no object of RLDatasetBuilder: from Python write SyncTasks\(",
        ),
        ({"advantage": "rloo"}, "advantage='rloo' is no object of AdvantageEstimator"),
        ({"backend": {"engine": "torch"}}, r"backend={.*} is no object of BackendConfig"),
        ({"kl": 0.1}, "kl=0.1 is no object of KLPenalty"),
        ({"batch_reward": None, "limits": None}, "limits=None is no object of RolloutLimits"),
    ],
)
def test_a_field_that_needs_an_object_names_what_it_was_given(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rl.Config(**{"env": SyncTasks(), **given})


@chz.chz
class SyncEvaluator(EvaluatorBuilder):
    def __call__(self, renderer: Renderer) -> Any:
        return None


def test_an_evaluator_that_is_not_async_or_gives_no_numbers_is_named() -> None:
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


@chz.chz
class OddChats(ChatDatasetBuilder):
    given: Any = ([("chats:1", {})], [])
    said: Any = "hello"

    def rows(self) -> Any:
        return self.given

    def messages(self, fields: Any) -> Any:
        return self.said(fields) if callable(self.said) else self.said


@chz.chz
class OddPairs(PreferenceRowsBuilder):
    returns: Any = None

    def comparison(self, fields: Any) -> Any:
        return self.returns


# Trap: rows without a place are unpacked as one where they have two fields.
def test_a_reader_of_data_that_returns_something_else_is_named(tmp_path: Path) -> None:
    renderer = sft.Config(dataset=OddExamples()).renderer()
    row = {"question": "a", "answer": "b"}
    for builder, message in [
        (OddChats(given=[row]), "OddChats.rows returned .*, not two lists"),
        (OddChats(given=([row], [])), "OddChats.rows returned the row .*, not a pair of a place"),
        (OddChats(given=([], [])), "OddChats.rows returned no rows"),
        (OddChats(), "chats:1: what OddChats.messages returned is 'hello', not a list of messages"),
        (OddChats(said=[{"content": "a"}]), "chats:1: .* a message has a 'role' and a 'content'"),
        (
            OddChats(said=lambda fields: fields["no"]),
            r"chats:1: OddChats.messages raised KeyError: 'no' \(.*\.py:\d+\)",
        ),
    ]:
        with pytest.raises(DataError, match=message):
            builder(renderer)
    path = tmp_path / "pairs.jsonl"
    path.write_text("{}\n")
    texts: Any = LabeledComparison(Comparison("a", "b", "c"), "A")  # type: ignore[arg-type]
    for returns, message in [
        (("b", "c"), "not a LabeledComparison of a Comparison"),
        (texts, "OddPairs.comparison: the prompt_conversation is 'a', not a list of messages"),
    ]:
        with pytest.raises(DataError, match=message):
            OddPairs(path=str(path), returns=returns)()


@chz.chz
class OddProblems(ProblemSet):
    returns: Any

    def read(self, split: Split, limit: int | None) -> Any:
        return self.returns if split == "train" else []


def test_what_is_no_problem_and_no_list_of_them_is_named() -> None:
    odd: Any = 2
    for make, message in [
        (lambda: Problem("1+1=", odd), "Problem '1[+]1=': gold=2 is not a text"),
        (lambda: Problem(odd, "2", id="row 3"), "Problem row 3: question=2 is not a text"),
        (lambda: Problem("1+1=", "2", Grader), "grader=<class .*> is not an object of Grader"),  # type: ignore[arg-type]
        (OddProblems(returns=None).splits, r"OddProblems.read\('train', ...\) returned None, not a list of Problems"),
        (OddProblems(returns=[{"question": "a"}]).splits, "not a list of Problems"),
        (lambda: check_apart([Problem("a", "b")], [Problem("a", "c")]), "in the test set too, first 'a'; remove"),
    ]:
        with pytest.raises(DataError, match=message):
            make()
    (problem,), _ = OddProblems(returns=(Problem(text, "b") for text in "a")).splits()
    assert problem.question == "a"
    with pytest.raises(ConfigError, match=r"rewards=<function correct_answer .* as \[correct_answer\]"):
        SingleTurn([problem], correct_answer)  # type: ignore[arg-type]


class IntGrader(Grader):
    def extract(self, text: str) -> Any:
        return int(text)


# Trap: an answer that is no text equals no gold answer: every reward is 0, without a word.
def test_a_grader_that_extracts_something_else_than_text_is_named() -> None:
    with pytest.raises(GraderError, match="IntGrader.extract returned 2, neither a text nor None"):
        asyncio.run(Problem("1+1=", "2", IntGrader()).graded("2"))


class OddGrader(Grader):
    def grade(self, text: str, gold: str) -> Any:
        return Grade(text, True, 0.5) if text == gold else 0.5

    def is_right(self, answer: str, gold: str) -> Any:
        return answer[0] == gold[0]


def test_a_grader_may_do_without_async_and_must_return_a_grade() -> None:
    problem = Problem("1+1=", "2", OddGrader())
    assert asyncio.run(problem.scored("2", truncated=False))[0] == 0.5
    assert asyncio.run(Grader.grade(problem.grader, "21", "2")).correct
    with pytest.raises(CookbookError, match=r"OddGrader.grade returned 0.5, not a Grade"):
        asyncio.run(problem.scored("3", truncated=False))


# Trap: a loss of N x N pairs; a diagnostic that is a mean, divided by the number of tokens again.
def test_a_loss_that_returns_something_else_is_named(torch_service: ServiceClient) -> None:
    client = torch_service.create_training_client("micro")
    for loss, message in [
        (lambda p, inputs: -p, "it must return the loss of each token, and a dict"),
        (lambda p, inputs: (-p, None), "it must return the loss of each token, and a dict"),
        (lambda p, inputs: (-p, {"x": 1.0}), "returned x 1.0, not a tensor"),
        (lambda p, inputs: (-p.mean(), {}), r"returned a loss of shape \(\) for 2 tokens"),
        (lambda p, inputs: (-p[:, None] * inputs["weights"], {}), r"returned a loss of shape \(2, 2\) for 2 tokens"),
        (lambda p, inputs: (-p, {"x": p.mean()}), r"returned x of shape \(\) for 2 tokens"),
        (lambda p, inputs: (-p, {"x": p[1:]}), r"returned x of shape \(1,\) for 2 tokens"),
        (lambda p, inputs: (torch.zeros_like(p), {}), "does not depend on the logprobs"),
    ]:
        with pytest.raises(ConfigError, match=message):
            client.forward_backward([datum(PROMPT)], loss).result()
