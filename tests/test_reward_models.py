"""Reward models: losses by hand, what is read from the model, saved models opened by environments,
honest evaluation.
"""

import asyncio
import math
from collections.abc import Sequence

import chz
import numpy as np
import pytest
import torch

from envs.kind_words import KindWordsComparisons, gold_reward
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError, ContextLengthError, DataError, ModelError
from posttrain.backend.tokenizers import character_tokenizer, load_tokenizer
from posttrain.backend.types import ModelInput
from posttrain.renderers import get_renderer
from posttrain.renderers.turns import encode
from posttrain.renderers.types import Message
from posttrain.tracking.metrics_log import read_metrics
from preference import train_reward_model
from preference.bradley_terry import (
    BradleyTerryJudge,
    PreferencePairsBuilder,
    RewardModelReward,
    ScalarBatchReward,
    ScalarModel,
    ScalarModelBuilder,
    bradley_terry,
    last_token_datum,
)
from preference.comparisons import LabeledBuilder
from preference.label_model import LABELS, LabelExamplesBuilder, LabelFormat, LabelModel, LabelModelBuilder, question
from preference.prm import PrmReward, ProcessReward, ProcessRewardModel
from preference.prm_labels import StepRecord
from preference.reward_evaluation import Evaluation, evaluate_judge, length_baseline
from preference.reward_types import JudgeError, PreferenceModel, RewardModel, judge_all
from preference.scored_tokens import scored_tokens
from preference.step_data import StepExamplesBuilder, step_datum
from preference.steps import StepFormat
from preference.types import Comparison, ComparisonDatasetBuilder, Label, LabeledComparison
from rl.types import TokensWithLogprobs, Trajectory, TrajectoryGroup, Transition
from tests import commands
from tests.conftest import ROOT, rounded
from tests.jsonl_files import write
from tests.test_message_parts import RENDERERS
from tests.test_renderers import bpe_tokenizer

TORCH = BackendConfig(engine="torch")


def said(role: str, content: str) -> list[Message]:
    return [Message(role=role, content=content)]


def pair(prompt: str, a: str, b: str) -> Comparison:
    return Comparison(said("user", prompt), said("assistant", a), said("assistant", b))


@chz.chz
class LetterComparisons(ComparisonDatasetBuilder):
    """The answer with more x in it is better: what a model learns in seconds."""

    def __call__(self) -> tuple[list[LabeledComparison], list[LabeledComparison]]:
        rng = np.random.default_rng(0)
        drawn = [["".join(rng.choice(list("xo"), 3)) for _ in range(2)] for _ in range(500)]
        labels: list[Label] = [
            "Tie" if a.count("x") == b.count("x") else "A" if a.count("x") > b.count("x") else "B" for a, b in drawn
        ]
        labeled = [LabeledComparison(pair("q", a, b), label) for (a, b), label in zip(drawn, labels, strict=True)]
        return labeled[:400], labeled[400:]


# --- Bradley and Terry --------------------------------------------------------------------------


def test_bradley_terry_loss_and_gradient_by_hand():
    scalars_D = [torch.tensor([9.0, r], dtype=torch.float64, requires_grad=True) for r in (2.0, 0.5, -1.0, 0.0)]
    data_D = [last_token_datum([5, 6], margin) for margin in (0.25, 0.25, 0.0, 0.0)]
    loss, metrics = bradley_terry(data_D, scalars_D)
    loss.backward()
    first, second = 2.0 - 0.5 - 0.25, -1.0 - 0.0  # r_chosen - r_rejected - m
    assert loss.item() == pytest.approx((math.log1p(math.exp(-first)) + math.log1p(math.exp(-second))) / 2, abs=1e-12)
    expected = [-1 / (1 + math.exp(first)) / 2, 1 / (1 + math.exp(first)) / 2, -1 / (1 + math.exp(second)) / 2]
    for scalar_T, gradient in zip(scalars_D, expected, strict=False):
        assert scalar_T.grad is not None and scalar_T.grad.tolist() == pytest.approx([0.0, gradient], abs=1e-12)
    assert metrics == {"accuracy": 0.5, "reward_gap": pytest.approx((1.5 - 1.0) / 2)}


def test_a_fresh_scalar_model_is_undecided_and_its_judge_ignores_the_order(torch_service):
    renderer = get_renderer("plain", load_tokenizer("tiny"))
    client = torch_service.create_scalar_client("tiny")
    judge = BradleyTerryJudge(ScalarModel(client, renderer))
    comparison = pair("q", "abc", "de")
    assert asyncio.run(judge(comparison)) == 0.0

    class Length(RewardModel):
        async def score(self, conversations_D: Sequence[Sequence[Message]]) -> list[float]:
            return [float(len(conversation[-1]["content"])) for conversation in conversations_D]

    longer = BradleyTerryJudge(Length())
    assert asyncio.run(longer(comparison)) == pytest.approx(-math.tanh(0.5)) == -asyncio.run(longer(comparison.swap()))


def test_ties_and_missing_margins_never_become_preferences(capsys):
    renderer = get_renderer("plain", load_tokenizer("tiny"))
    labeled = [
        LabeledComparison(pair("q", "a", "b"), "Tie"),
        LabeledComparison(pair("q", "a", "b"), "B", where="pairs.jsonl:7"),
    ]
    dataset = PreferencePairsBuilder(comparisons=LetterComparisons()).examples(renderer, labeled)
    chosen, rejected = dataset.get_batch(0)
    assert (
        chosen.model_input.to_ints()
        == renderer.build_supervised_example([*said("user", "q"), *said("assistant", "b")])[0]
    )
    assert chosen.model_input.to_ints() != rejected.model_input.to_ints() and "1 ties of 2" in capsys.readouterr().out
    with pytest.raises(DataError, match="all of 1 comparisons are ties"):
        PreferencePairsBuilder(comparisons=LetterComparisons()).examples(renderer, labeled[:1])
    with pytest.raises(DataError, match="pairs.jsonl:7: no margin"):
        PreferencePairsBuilder(comparisons=LetterComparisons(), margin_coef=1.0).examples(renderer, labeled)


# --- label tokens -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "role_colon", "chat_template"])
def test_the_labels_token_is_what_is_trained_and_asked(name):
    tokenizer = load_tokenizer("tiny")
    label_format = LabelFormat(get_renderer(name, tokenizer))
    comparison = pair("q", "one", "two")
    for label, token in zip(LABELS, label_format.label_tokens, strict=True):
        (datum,) = label_format.examples([LabeledComparison(comparison, label)])
        tokens, weights = datum.model_input.to_ints(), datum.loss_fn_inputs["weights"].array
        assert tokens == label_format.prompt(comparison) and datum.loss_fn_inputs["target_tokens"].array[-1] == token
        assert weights.tolist() == [0.0] * (len(tokens) - 1) + [1.0]
        # a character is a token here; a leading space is part of the prompt
        assert tokenizer.decode([token]) == label[0]
    assert label_format.inquiry(comparison).model_input.to_ints() == label_format.prompt(comparison)


# Trap: a model that was never taught labels read as "tie".
def test_label_probabilities_are_those_of_the_language_model(torch_service):
    renderer = get_renderer("plain", load_tokenizer("tiny"))
    client = torch_service.create_training_client("tiny")
    comparisons = [pair("q", "one", "two"), pair("what", "x" * 40, "y")]
    model = LabelModel(client, renderer, both_orders=False, min_label_mass=0.0)
    probabilities_DK = asyncio.run(model.probabilities(comparisons))
    sampler = client.save_weights_and_get_sampling_client()
    for comparison, row in zip(comparisons, probabilities_DK, strict=True):
        for token, probability in zip(model.format.label_tokens, row, strict=True):
            sequence = ModelInput.from_ints([*model.format.prompt(comparison), token])
            logprob = sampler.compute_logprobs(sequence).result()[-1]
            assert logprob is not None and math.exp(logprob) == pytest.approx(probability, rel=rounded(1e-4))
    one_way, back = asyncio.run(model.compare(comparisons)), asyncio.run(model.compare([c.swap() for c in comparisons]))
    averaged = asyncio.run(LabelModel(client, renderer, min_label_mass=0.0).compare(comparisons))
    assert averaged == pytest.approx([(ab - ba) / 2 for ab, ba in zip(one_way, back, strict=True)], abs=rounded(1e-6))
    with pytest.raises(JudgeError, match="not trained to say them"):
        asyncio.run(LabelModel(client, renderer).compare(comparisons))
    with pytest.raises(ContextLengthError, match="label model's context 512"):
        asyncio.run(model.compare([pair("q", "x" * 300, "y" * 300)]))


def test_multi_turn_prompts_keep_their_speakers():
    comparison = Comparison(
        [*said("user", "hi"), *said("assistant", "ho"), *said("user", "so?")],
        said("assistant", "1"),
        said("assistant", "2"),
    )
    text = question(comparison)[0]["content"]
    assert text.startswith("User: hi\n\nAssistant: ho\n\nUser: so?\n\n[A]\n1\n\n[B]\n2\n\n")


TEXT_RENDERERS = {name: get_renderer(name, load_tokenizer("tiny")) for name in ("plain", "role_colon")}


# Trap: a template that writes a line break after the end of an answer, which is in no sampled answer.
@pytest.mark.parametrize("name", [*TEXT_RENDERERS, *RENDERERS])
def test_scores_are_trained_where_sampled_answers_end(name):
    renderer = (TEXT_RENDERERS | RENDERERS)[name]
    tokens, weights = scored_tokens(renderer, [*said("user", "7="), *said("assistant", "1+6;#7")])
    start = weights.index(1.0)
    assert renderer.parse_response(tokens[start:])[1] and not renderer.parse_response(tokens[start:-1])[1]
    config = StepExamplesBuilder(path="", form=StepFormat(separator=";", answer_marker="#"), last_tokens=1)
    datum = step_datum(StepRecord("7=", ["1+6", "#7"], [1, 1]), renderer, config)
    assert datum is not None and datum.model_input.to_ints() == tokens
    assert np.flatnonzero(datum.loss_fn_inputs["step_ends"].array)[-1] == len(tokens) - 1


# Trap: an answer that begins with a line break, which joins that of the prompt in one token.
def test_sampled_white_space_before_an_answer_is_scored():
    renderer = get_renderer("chat_template", bpe_tokenizer(str(character_tokenizer(512).chat_template)))
    prompt = renderer.build_generation_prompt(said("user", "7=")).to_ints()
    for written in ("\n1+6;#7", "\n\n 1+6;#7", "\n<|im_end|>6;#7"):
        conversation = [*said("user", "7="), *said("assistant", written)]
        with pytest.raises(DataError, match="joins"):
            renderer.build_supervised_example(conversation)
        tokens, weights = scored_tokens(renderer, conversation)
        answer = [
            token for text in (*written.partition("<|im_"), "<|im_end|>") for token in encode(renderer.tokenizer, text)
        ]
        assert tokens == prompt + answer and weights == [0.0] * len(prompt) + [1.0] * len(answer)
        config = StepExamplesBuilder(path="", form=StepFormat(separator=";", answer_marker="#"), last_tokens=1)
        datum = step_datum(StepRecord("7=", [*written.split(";")], [1, 1]), renderer, config)
        assert datum is not None and datum.model_input.to_ints() == tokens
    with pytest.raises(DataError, match="message 1"):  # another fault of such an answer stays one
        scored_tokens(renderer, [*said("user", "7="), *said("assistant", "\n7<|im_end|>")])


# --- training, saving, opening ------------------------------------------------------------------


def reward_config(dataset, folder, **settings) -> train_reward_model.Config:
    defaults = {
        "learning_rate": 2e-3,
        "lr_schedule": "constant",
        "eval_every": 1000,
        "save_every": 0,
        "renderer_name": "plain",
    }
    return train_reward_model.Config(dataset=dataset, log_path=str(folder), backend=TORCH, **(defaults | settings))


# Trap: a reward model of another tokenizer or renderer.
def test_a_scalar_model_learns_is_saved_and_scores_rollouts(tmp_path, torch_service):
    dataset = PreferencePairsBuilder(comparisons=LetterComparisons(), batch_size=32)
    metrics = asyncio.run(train_reward_model.main(reward_config(dataset, tmp_path / "rm", num_epochs=4)))
    assert metrics["test/accuracy"] >= 0.9 and metrics["test/swap_agreement"] == 1.0
    assert (tmp_path / "rm" / "plots" / "reliability.png").exists()
    path = str(tmp_path / "rm" / "checkpoints" / "final")

    tokenizer = load_tokenizer("tiny")
    model = ScalarModelBuilder(path=path)(tokenizer)  # the renderer is that of the run, "plain"
    answers = ["ooo", "xoo", "oxx", "xxx"]
    scores = asyncio.run(model.score([[*said("user", "q"), *said("assistant", answer)] for answer in answers]))
    assert scores == sorted(scores)
    assert asyncio.run(BradleyTerryJudge(model)(pair("q", "ooo", "xxx"))) > 0.5

    renderer = get_renderer("plain", tokenizer)
    policy = torch_service.create_training_client("tiny")
    reward = asyncio.run(RewardModelReward(path=path, coef=2.0)(torch_service, policy, renderer))
    group = TrajectoryGroup([rolled_out(renderer, answer) for answer in answers], [0.5] * 4, [{} for _ in answers])
    step_metrics = asyncio.run(reward([group]))
    assert group.final_rewards_G == pytest.approx([0.5 + 2 * score for score in scores], abs=rounded(1e-4))
    assert step_metrics == pytest.approx(
        {"reward_model/mean": np.mean(scores), "reward_model/std": np.std(scores)}, abs=rounded(1e-4)
    )

    with pytest.raises(ConfigError, match="was trained with renderer_name=plain"):
        ScalarModelBuilder(path=path, renderer_name="role_colon")(tokenizer)
    with pytest.raises(ConfigError, match="give both the same renderer_name"):
        asyncio.run(RewardModelReward(path=path)(torch_service, policy, get_renderer("role_colon", tokenizer)))
    other = character_tokenizer(512)
    other.add_tokens(["<extra>"])
    with pytest.raises(ModelError, match="another tokenizer than the policy"):
        ScalarModelBuilder(path=path)(other)


def rolled_out(renderer, answer: str) -> Trajectory:
    tokens = renderer.tokenizer.encode(answer) + [renderer.tokenizer.eos_token_id]
    action = TokensWithLogprobs(tokens, [0.0] * len(tokens))
    return Trajectory([Transition(renderer.build_generation_prompt(said("user", "q")), action, 0.0, True)])


@pytest.mark.parametrize("reward", ["scalar", "process"])
def test_a_member_too_long_for_the_reward_model_leaves_its_group(reward: str, torch_service):
    renderer, client = get_renderer("plain", load_tokenizer("tiny")), torch_service.create_scalar_client("tiny")
    scored = (
        ScalarBatchReward(ScalarModel(client, renderer), 1.0)
        if reward == "scalar"
        else ProcessReward(ProcessRewardModel(client, renderer, StepFormat()), PrmReward(path=""))
    )
    answers = ["1\n\n2", "x" * 600, "3\n\n4"]
    group = TrajectoryGroup([rolled_out(renderer, answer) for answer in answers], [0.0] * 3, [{}, {}, {}])
    kept = [group.trajectories_G[0], group.trajectories_G[2]]
    asyncio.run(scored([group]))
    assert group.trajectories_G == kept and len(group.final_rewards_G) == len(group.metrics_G) == 2
    assert [type(error) for error in group.errors] == [JudgeError] and "context 512" in str(group.errors[0])


def test_a_label_model_learns_by_the_supervised_loop_and_is_opened_by_path(tmp_path):
    dataset = LabelExamplesBuilder(comparisons=LetterComparisons(), batch_size=32)
    config = reward_config(dataset, tmp_path / "rm", num_epochs=4, learning_rate=3e-3)
    metrics = asyncio.run(train_reward_model.main(config))
    assert metrics["test/accuracy"] >= 0.9 and metrics["test/swap_agreement"] >= 0.8 and metrics["train_mean_nll"] < 0.5
    judge = LabelModelBuilder(path=str(tmp_path / "rm" / "checkpoints" / "final"))(load_tokenizer("tiny"))
    better, worse = asyncio.run(judge_all(judge, [pair("q", "ooo", "xxx"), pair("q", "xxx", "oox")]))
    assert better > 0.5 and worse < -0.5


def test_comparisons_that_do_not_fit_are_dropped_and_counted_or_refused(tmp_path, capsys):
    rows = [
        {"prompt": f"q{i}", "completion_A": "a" * (250 if i < 2 else 5), "completion_B": "b" * 250, "label": "A"}
        for i in range(4)
    ]
    renderer = get_renderer("plain", load_tokenizer("tiny"))
    comparisons = LabeledBuilder(path=write(tmp_path / "pairs.jsonl", *rows))
    builder = LabelExamplesBuilder(comparisons=comparisons, max_length=400)
    train_D, _ = builder.load(renderer)
    assert len(train_D) == 2 and "2 of 4 comparisons are longer than 400 tokens" in capsys.readouterr().out
    with pytest.raises(DataError, match="of 4 comparisons 0 fit into 100 tokens"):
        chz.replace(builder, max_length=100).load(renderer)


def test_the_command_trains_from_a_file(tmp_path):
    rows = [
        {"prompt": f"q{i}", "completion_A": "a" * (i % 5 + 1), "completion_B": "bb", "label": "B"} for i in range(40)
    ]
    write(tmp_path / "pairs.jsonl", *rows)
    command = [
        str(ROOT / "preference" / "train_reward_model.py"),
        "dataset=scalar",
        "max_steps=2",
        "save_every=0",
    ]
    comparisons = ["=labeled", ".path=pairs.jsonl", ".test_size=8"]
    command += ["dataset.batch_size=8", *(f"dataset.comparisons{option}" for option in comparisons)]
    done = commands.run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    last = read_metrics(tmp_path / "runs" / "reward_model")[-1]
    assert {"test/accuracy", "test/ece", "test/swap_agreement", "test/length_baseline"} <= last.keys()


# --- evaluation ---------------------------------------------------------------------------------


def test_evaluation_by_hand():
    forward = np.array([0.8, 0.6, -0.2, -0.4, 0.9, -1.0, 1.0])
    reverse = np.array([0.6, -0.4, -0.4, -0.2, 0.94, -0.92, 1.0])
    evaluation = Evaluation(forward, reverse, np.array([1, 1, 1, 0, 1, 1, 1]))
    metrics = evaluation.metrics()
    assert metrics["accuracy"] == pytest.approx(2 / 3) and metrics["comparisons"] == 6 and metrics["ties"] == 1
    assert metrics["accuracy_stderr"] == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 6))
    assert metrics["swap_agreement"] == pytest.approx(5 / 6) and metrics["tie_leaning"] == pytest.approx(0.3)
    # confidences 0.85 (right), 0.55 (right), 0.65 (wrong), each alone in its bin; 0.96, 0.98 (wrong) and 1 in the last
    assert metrics["ece"] == pytest.approx((0.15 + 0.45 + 0.65 + 3 * (0.98 - 2 / 3)) / 6)


def test_an_undecided_judge_is_not_half_right_and_one_that_likes_a_side_disagrees_with_itself():
    class AlwaysB(PreferenceModel):
        async def compare(self, comparisons_D: Sequence[Comparison]) -> list[float]:
            return [1.0] * len(comparisons_D)

    labeled = [LabeledComparison(pair("q", "a", "b"), "B"), LabeledComparison(pair("q", "a", "c"), "A")]
    metrics = asyncio.run(evaluate_judge(AlwaysB(), labeled)).metrics()
    assert metrics["accuracy"] == 0.0 and metrics["swap_agreement"] == 0.0


def test_length_baseline_takes_its_direction_from_the_training_data():
    train = [LabeledComparison(pair("q", "long", "s"), "B"), LabeledComparison(pair("q", "longer", "s"), "B")]
    test = [LabeledComparison(pair("q", "ab", "c"), "B"), LabeledComparison(pair("q", "ab", "c"), "A")]
    test += [LabeledComparison(pair("q", "a", "b"), "A"), LabeledComparison(pair("q", "ab", "c"), "Tie")]
    assert length_baseline(train, test) == pytest.approx((1 + 0 + 0.5) / 3)
    with pytest.raises(DataError, match="all 1 comparisons are ties"):
        length_baseline(train, test[-1:])


def test_gold_reward_counts_kind_words_once():
    assert gold_reward([], " thanks table brave") == 2.0
    assert gold_reward([], " thanks thanks thanks") == -1.0
    train, test = KindWordsComparisons(num_train=50, test_size=20)()
    assert not {str(one.comparison.prompt_conversation) for one in train} & {
        str(one.comparison.prompt_conversation) for one in test
    }
    assert {one.label for one in train} == {"A", "B", "Tie"}
