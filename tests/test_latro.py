"""LaTRO: the worked cases of its specification, an estimator without bias through the real training
step, and the recipe from end to end.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import chz
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from envs.graders import StatedNumber
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.futures import InOrder
from posttrain.backend.loss_terms import LossTerm
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import character_tokenizer, load_tokenizer
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, Datum, ForwardBackwardOutput, ModelInput, OptimStepResponse, TensorData
from posttrain.renderers.plain import PlainRenderer
from posttrain.renderers.turns import decode
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.run_folder import open_run_folder
from recipes.latro import env, evaluation, train
from recipes.latro.env import LatentRationales, RationaleGroup, answer_tokens, prompt_tokens
from recipes.latro.evaluation import Best, best_so_far
from recipes.latro.examples import example
from recipes.latro.sizes import derive_sizes
from recipes.latro.tasks import ANSWER_STOPS, ArcChallengeBuilder, Gsm8kBuilder, JsonlBuilder, MathBuilder, Task
from recipes.latro.toy import ToyBuilder
from rl.kl import Reference, starting_weights
from rl.likelihood_reward import LikelihoodReward, LikelihoodRewardBuilder
from rl.train_step import Learner, train_step
from rl.types import Metrics, TokensWithLogprobs, Trajectory, TrajectoryGroup, Transition
from tests.conftest import ROUNDING, full_logits, random_tokens, rounded, trainer_of
from tests.jsonl_files import write

CHARACTERS = character_tokenizer(512)
EOS = 1  # of CHARACTERS


class OneBatch:
    """A group source that has one batch."""

    num_minibatches, max_steps_off_policy, max_refills = 1, 0, 0

    def __init__(self, groups_P: list[TrajectoryGroup]):
        self.groups_P = groups_P

    async def minibatches(self, step: int) -> AsyncIterator[list[TrajectoryGroup]]:
        yield self.groups_P


def rationale_group(
    prompt: list[int],
    answer: list[int],
    renderer: PlainRenderer,
    actions_G: Sequence[list[int]],
    temperature: float = 1.0,
) -> TrajectoryGroup:
    builder = RationaleGroup(Task("", ""), prompt, answer, env.stop_strings(renderer), renderer, len(actions_G))
    sampled_G = [TokensWithLogprobs(ac, [0.0] * len(ac), temperature=temperature) for ac in actions_G]
    turns_G = [Transition(ModelInput.from_ints(prompt), sampled, 0.0, True) for sampled in sampled_G]
    group = TrajectoryGroup([Trajectory([turn]) for turn in turns_G], [0.0] * len(actions_G), [{} for _ in actions_G])
    group.builder = builder
    return group


def settings(**options: Any) -> Any:
    """The loop's configuration as the recipe makes it."""
    config = train.prepared(train.Config(**options))
    return train.rl_config(config, train.sizes_of(config, 10_000), None)


def step(client: Any, config: Any, reference: Any, groups_P: list[TrajectoryGroup]) -> tuple[Metrics, list[Datum]]:
    reward = LikelihoodReward(client, config.batch_reward)
    learner = Learner(config, client, None, reference if config.kl.coef else None, reward)  # type: ignore[arg-type]
    metrics: Metrics = {}
    outcome = asyncio.run(train_step(learner, OneBatch(groups_P), 0, AdamParams(), metrics))  # type: ignore[arg-type]
    return metrics, outcome.data_D


# --- worked cases -------------------------------------------------------------------------------


class Table:
    """Stands for a policy and its reference: the rationale is one token k, and every number is
    looked up by it.
    """

    ANSWER = [-1.2, -0.4, -3.0, -0.9]
    POLICY = [-5.0, -7.0, -4.0, -6.0]
    REFERENCE = [-5.5, -6.5, -4.2, -6.0]
    FIRST, GOLD = 10, 30  # the id of rationale 0, and of the answer's only token

    def __init__(self) -> None:
        self.thread = InOrder("table")

    def forward_terms(self, terms: Sequence[LossTerm], keep: bool = False) -> Any:
        return self.thread.submit(lambda: [self.run(term.data_D, str(term.loss_fn)) for term in terms])

    forward_backward_terms = forward_terms

    def optim_step(self, adam: AdamParams) -> Any:
        return self.thread.submit(OptimStepResponse, {"grad_norm": 0.0})

    def run(self, data_D: Sequence[Datum], loss_fn: str) -> ForwardBackwardOutput:
        values, loss = [], 0.0
        for datum in data_D:
            inputs = {name: value.array for name, value in datum.loss_fn_inputs.items()}
            targets_T = inputs["target_tokens"]
            if loss_fn == "cross_entropy":  # [prompt, k] -> [k, answer]: weight on the answer only
                assert targets_T[-1] == self.GOLD and (np.flatnonzero(inputs["weights"]) == len(targets_T) - 1).all()
                logprobs_T, weights_T = (
                    np.where(targets_T == self.GOLD, self.ANSWER[targets_T[0] - self.FIRST], 0.0),
                    inputs["weights"],
                )
            else:
                logprobs_T = np.array([self.POLICY[k - self.FIRST] if k >= self.FIRST else 0.0 for k in targets_T])
                weights_T = inputs["advantages"]
            values.append({"logprobs": TensorData(logprobs_T)})
            loss -= float((logprobs_T * weights_T).sum())
        return ForwardBackwardOutput(values, {"loss:sum": loss, "num_loss_tokens:sum": float(len(data_D))})

    async def logprobs(self, data_D: Sequence[Datum]) -> list[np.ndarray]:
        return [
            np.array([self.REFERENCE[k - self.FIRST] for k in datum.loss_fn_inputs["target_tokens"].array])
            for datum in data_D
        ]


@pytest.mark.parametrize(("coef", "total"), [(0.0, 1.3716667), (0.5, 2.0591667), (1.0, 2.7466667)])
def test_worked_batch(coef: float, total: float):
    """Case D2: leave-one-out (D1) of answer likelihoods less the KL, and both terms of the loss
    with one factor.
    """
    client = Table()
    group = rationale_group([5], [Table.GOLD], PlainRenderer(CHARACTERS), [[Table.FIRST + k] for k in range(4)])
    for trajectory, logprob in zip(group.trajectories_G, Table.POLICY, strict=True):
        trajectory.transitions[0].ac.logprobs[0] = logprob
    config = settings(rloo_k=4, kl_coef=0.05, likelihood_coef=coef, non_stop_penalty=False)
    metrics, data_D = step(client, config, client, [group])
    assert group.final_rewards_G == pytest.approx(Table.ANSWER)
    advantages = [float(datum.loss_fn_inputs["advantages"].array[0]) for datum in data_D]
    assert advantages == pytest.approx([0.203333, 1.336667, -2.176667, 0.636667], abs=1e-6)
    assert metrics["optim/loss"] / 4 == pytest.approx(1.3716667, abs=1e-6)
    assert (metrics["optim/loss"] + metrics.get("optim/supervised_loss", 0.0)) / 4 == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize(("reduction", "tokens"), [("sum", 1), ("sequence_mean", 1), ("token_mean", 4)])
def test_worked_batch_under_every_reduction(reduction: str, tokens: int):
    """Case D2 with coef 1: four rationales of one token each, so the whole loss is divided by 1, or
    by all 4.
    """
    group = rationale_group([5], [Table.GOLD], PlainRenderer(CHARACTERS), [[Table.FIRST + k] for k in range(4)])
    for trajectory, logprob in zip(group.trajectories_G, Table.POLICY, strict=True):
        trajectory.transitions[0].ac.logprobs[0] = logprob
    config = settings(rloo_k=4, kl_coef=0.05, likelihood_coef=1.0, non_stop_penalty=False)
    metrics, _ = step(client := Table(), chz.replace(config, loss_reduction=reduction), client, [group])
    assert (metrics["optim/loss"] + metrics["optim/supervised_loss"]) / 4 == pytest.approx(2.7466667 / tokens, abs=1e-6)


def test_rationales_that_never_stop_get_twice_the_mean():
    client = Table()
    group = rationale_group([5], [Table.GOLD], PlainRenderer(CHARACTERS), [[10, EOS], [11], [12]])
    metrics = asyncio.run(LikelihoodReward(client, LikelihoodRewardBuilder())([group]))  # type: ignore[arg-type]
    mean = (-1.2 - 0.4 - 3.0) / 3
    assert group.final_rewards_G == pytest.approx([-1.2, 2 * mean, 2 * mean])
    assert metrics["likelihood/answer_logprob"] == pytest.approx(mean) and metrics[
        "likelihood/finished"
    ] == pytest.approx(1 / 3)
    assert all(len(trajectory.supervised) == 1 for trajectory in group.trajectories_G)


# Trap: stop strings missed because they were tokenized otherwise.
def test_rationales_end_before_the_stop_string_however_it_was_tokenized():
    """Case D6, with stops as text, and tokens that are not characters."""
    stops = [decode(CHARACTERS, [2]), decode(CHARACTERS, [50, 51])]
    assert env.tokens_before_stop(CHARACTERS, [7, 8, 50, 51, 9, 2], stops) == (2, True)
    assert env.tokens_before_stop(CHARACTERS, [7, 8, 50, 9], stops) == (4, False)
    assert env.tokens_before_stop(CHARACTERS, [2, 7], stops) == (0, True)
    merged = words(["so", "it", ".The", "answer", "is", "7"])
    tokens = [2, 3, 4, 5, 6, 7]
    assert decode(merged, tokens) == "so it .The answer is 7"
    # ".The" is partly stop
    assert env.tokens_before_stop(merged, tokens, ["The answer is"]) == (2, True)
    accents = CHARACTERS.encode("né=1")
    # é is two tokens
    assert env.tokens_before_stop(CHARACTERS, accents, ["="]) == (3, True) and len(accents) == 5


# --- the estimator ------------------------------------------------------------------------------


def words(vocabulary: list[str], bos: bool = False) -> PreTrainedTokenizerFast:
    ids = {word: i for i, word in enumerate(["<eos>", "<s>", *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<s>", model_max_length=32)


def enumerable_policy(service: ServiceClient, folder: Path) -> TrainingClient:
    """A model of eight words, moved away from what is saved in `folder`."""
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 8,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=32, initializer_range=0.5)).save_pretrained(
            folder
        )
        words(list("abcdef")).save_pretrained(folder)
        client = service.create_training_client(str(folder))
        with torch.no_grad():
            for p in trainer_of(client).named_trainable.values():
                p += 0.2 * torch.randn_like(p)
    return client


# Trap: a biased estimator: the stop without gradient, K in one term only.
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_estimator_is_unbiased(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kl_coef: float):
    """The average over all pairs of one-token rationales is the analytic gradient. One of the
    tokens is the stop: its rationale is empty, and the gradient would be biased if the stop had
    none."""
    prompt, answer = [2, 3], [4, 0]
    with ServiceClient(BackendConfig(engine="torch"), tmp_path) as service:
        client = enumerable_policy(service, tmp_path / "model")
        reference = Reference(starting_weights(service, str(tmp_path / "model"), None, None, 0))
        trainer, renderer = trainer_of(client), PlainRenderer(words(list("abcdef")))

        def logprobs(model: Any, tokens: list[int]) -> torch.Tensor:
            return full_logits(model, tokens).log_softmax(-1)

        policy_V = logprobs(trainer.base, prompt)[-1]
        reference_V = logprobs(trainer_of(reference._client).base, prompt)[-1].detach()
        answers = []
        for token in range(8):
            context = prompt if token == 0 else [*prompt, token]
            rows = logprobs(trainer.base, [*context, *answer])
            answers.append(rows[len(context) - 1, answer[0]] + rows[len(context), answer[1]])
        objective = (policy_V.exp() * (torch.stack(answers) - kl_coef * (policy_V - reference_V))).sum()
        parameters = list(trainer.named_trainable.values())
        # the loop sums over the two members
        expected = [-2 * g for g in torch.autograd.grad(objective, parameters)]

        mean = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        probability = 0.0

        def collect(adam: AdamParams) -> OptimStepResponse:
            for total, p in zip(mean, parameters, strict=True):
                assert p.grad is not None
                total += probability * p.grad.double()
            trainer.zero_grad()
            return OptimStepResponse({})

        monkeypatch.setattr(trainer, "optim_step", collect)
        config = settings(rloo_k=2, kl_coef=kl_coef, non_stop_penalty=False)
        for first in range(8):
            for second in range(first, 8):
                both_orders = 1 if first == second else 2
                probability = both_orders * float((policy_V[first] + policy_V[second]).detach().exp())
                group = rationale_group(prompt, answer, renderer, [[first], [second]])
                for trajectory, token in zip(group.trajectories_G, (first, second), strict=True):
                    trajectory.transitions[0].ac.logprobs[0] = float(policy_V[token].detach())
                step(client, config, reference, [group])
    largest = max(float(g.abs().max()) for g in expected)
    assert largest > 0.1
    for total, g in zip(mean, expected, strict=True):
        assert float((total - g).abs().max()) < ROUNDING / 3 * max(1.0, largest)


# Trap: a likelihood reward that scores a token of the rationale, or padding.
def test_rewards_score_exactly_the_answer_whatever_the_batch(torch_service: ServiceClient):
    """Ragged prompts, rationales and answers: the same as one unpadded pass each, in one batch and
    in micro-batches of one row.
    """
    rng, renderer = np.random.default_rng(0), PlainRenderer(CHARACTERS)
    client = torch_service.create_training_client("tiny")
    groups_P = []
    for _ in range(4):
        actions_G = [random_tokens(rng, int(n)) + [EOS] for n in rng.integers(0, 20, 3)]
        prompt, answer = random_tokens(rng, int(rng.integers(1, 15))), random_tokens(rng, int(rng.integers(1, 6)))
        groups_P.append(rationale_group(prompt, answer, renderer, actions_G))
    rewards = {}
    for budget in (16384, 8):
        trainer_of(client).config = BackendConfig(micro_batch_tokens=budget)
        for group in groups_P:
            group.final_rewards_G = [0.0] * 3
        asyncio.run(LikelihoodReward(client, LikelihoodRewardBuilder(likelihood_coef=0.0))(groups_P))
        rewards[budget] = [reward for group in groups_P for reward in group.final_rewards_G]
    alone = []
    for group in groups_P:
        assert isinstance(group.builder, RationaleGroup)
        for trajectory in group.trajectories_G:
            tokens = [*group.builder.prompt, *trajectory.transitions[0].ac.tokens[:-1], *group.builder.answer_tokens]
            with torch.no_grad():
                rows = full_logits(trainer_of(client).base, tokens).log_softmax(-1)
            start = len(tokens) - len(group.builder.answer_tokens)
            alone.append(sum(float(rows[t - 1, tokens[t]]) for t in range(start, len(tokens))))
    assert rewards[16384] + rewards[8] == pytest.approx(2 * alone, abs=rounded(1e-4))


# --- data and sizes -----------------------------------------------------------------------------


def test_datasets_become_tasks(tmp_path: Path):
    solution = "She sold 48/2 = <<48/2=24>>24.\nIn all 72.\n#### 72"
    write(tmp_path / "train.jsonl", *[{"question": "How many?", "answer": solution}] * 4)
    gsm8k = Gsm8kBuilder(data_dir=str(tmp_path)).tasks("train", None)[0]
    assert (gsm8k.solution, gsm8k.answer, gsm8k.gold) == (
        "She sold 48/2 = 24.\nIn all 72.",
        "\nThe answer is 72.",
        "72",
    )
    row = {"question": "How many legs?", "choices": {"text": ["15", "5"], "label": ["A", "B"]}, "answerKey": "B"}
    write(tmp_path / "train.jsonl", row)
    arc = ArcChallengeBuilder(data_dir=str(tmp_path)).tasks("train", None)[0]
    assert arc.answer == "\nThe answer is 5." and arc.solution is None and "Options:\n15\n5\n" in arc.question
    file = write(tmp_path / "math.jsonl", {"problem": "Half?", "solution": "It is $\\boxed{\\frac{1}{2}}$."})
    task = MathBuilder(train_path=str(file)).tasks("train", None)[0]
    assert task.gold == "\\frac{1}{2}" and asyncio.run(task.grader.is_right("0.5", task.gold))
    rows = [
        {"queries": "1+1?", "responses": "The answer is 2.", "groundtruth": 2},
        {"queries": "Sky?", "responses": "The answer is blue."},
    ]
    file = write(tmp_path / "three.jsonl", *rows[:1])
    assert JsonlBuilder(train_path=str(file)).tasks("train", None)[0].answer == "\nThe answer is 2."
    with pytest.raises(
        DataError, match=r"three.jsonl:2: no groundtruth; the columns are queries, responses, groundtruth"
    ):
        JsonlBuilder(train_path=write(Path(file), *rows)).tasks("train", None)
    with pytest.raises(DataError, match="num_validation=4 of 4 problems: it must be from 1 to 3"):
        write(tmp_path / "train.jsonl", *[{"question": "How many?", "answer": solution}] * 4)
        Gsm8kBuilder(data_dir=str(tmp_path), num_validation=4).split()


def test_the_splits_share_no_question():
    builder = ToyBuilder(num_tasks=60, num_validation=20, num_test=10)
    train_tasks, validation = builder.split()
    questions = [{task.question for task in tasks} for tasks in (train_tasks, validation, builder.test_tasks())]
    assert [len(part) for part in questions] == [40, 20, 10] and len(set.union(*questions)) == 70
    assert {task.gold for task, thought in builder.demonstrations(train_tasks) if thought[0] == "?"} <= set(
        "0123456789"
    )


def test_one_bos_and_answers_begin_where_the_stop_was():
    tokenizer = words(["Why?", "So", "\nThe", "answer", "is", "7."], bos=True)
    renderer, task = PlainRenderer(tokenizer), Task("Why?", "7", StatedNumber(), "So", answer="\nThe answer is 7.")
    datum = example(renderer, task, "So")
    tokens = [*datum.model_input.to_ints(), int(datum.loss_fn_inputs["target_tokens"].array[-1])]
    assert tokens.count(1) == 1 and tokens[0] == 1  # <s>
    assert datum.loss_fn_inputs["weights"].array.sum() == len(tokens) - len(prompt_tokens(renderer, task))
    plain = PlainRenderer(CHARACTERS)
    said = [*CHARACTERS.encode("So"), *answer_tokens(plain, task.answer)]
    assert env.tokens_before_stop(CHARACTERS, said, env.stop_strings(plain, ANSWER_STOPS)) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rloo_k": 1}, "the least that works is rloo_k=2, or baseline=none"),
        ({"train_batch_size": 100}, "not a multiple of rloo_k=8; the nearest is train_batch_size=96"),
        (
            {"train_batch_size": 1600},
            "wants 200 questions per update, and there are 100; the largest that works is train_batch_size=800",
        ),
        ({"evaluations": 99}, "num_evaluations=99 in 12 updates; the nearest is num_evaluations=12"),
        ({"length": 0}, "response_length=0"),
    ],
)
def test_sizes_that_cannot_work_name_the_nearest_that_do(options: dict[str, int], message: str):
    given = {
        "num_prompts": 100,
        "rloo_k": 8,
        "least_k": 2,
        "train_batch_size": 64,
        "epochs": 1.0,
        "max_updates": None,
        "evaluations": 4,
        "length": 9,
    }
    sizes = derive_sizes(**given)  # type: ignore[arg-type]
    assert (sizes.prompts_per_update, sizes.updates, sizes.epochs, sizes.eval_every) == (8, 12, 0.96, 3)
    with pytest.raises(ConfigError, match=message):
        derive_sizes(**(given | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"baseline": "none"}, {"method": "sft"}])
def test_one_rationale_a_question_is_enough_without_the_leave_one_out_baseline(options: dict[str, Any]):
    config = train.prepared(train.Config(rloo_k=1, train_batch_size=4, **options))
    assert train.sizes_of(config, 10_000).prompts_per_update == 4


def test_questions_that_do_not_fit_are_counted_or_refused(capsys: pytest.CaptureFixture[str]):
    renderer = PlainRenderer(character_tokenizer(20))
    env = LatentRationales(tasks=ToyBuilder(), response_length=8, stop_seqs=("=",), batch_size=2, group_size=2)
    tasks = [Task("1234567890", "1", answer="=1"), Task("12", "1", answer="=1")]
    assert [group.task.question for group in env.groups(tasks, renderer)] == ["12"]
    assert "1 of 2 questions dropped: with response_length=8" in capsys.readouterr().out
    with pytest.raises(DataError, match="no question fits: with response_length=80"):
        chz.replace(env, response_length=80).groups(tasks, renderer)


# --- the recipe ---------------------------------------------------------------------------------


def test_the_best_checkpoint_is_read_from_the_folder(tmp_path: Path):
    folder = open_run_folder(tmp_path / "run", "raise", {})
    assert best_so_far(folder.path) is None
    for name, number in (("000002", 2), ("000004", 4), ("final", 6)):
        (folder.checkpoints / name).mkdir()
        folder.record_checkpoint(name, number, folder.checkpoints / name)
    values = {0: 0.1, 2: 0.4, 3: 0.9, 4: 0.4, 6: 0.3}  # no checkpoint holds the weights of step 3
    lines = [json.dumps({"step": number, "test/env/all/correct": value}) + "\n" for number, value in values.items()]
    folder.metrics_file.write_text("".join(lines))
    assert best_so_far(folder.path) == Best(4, folder.path / "checkpoints" / "000004", 0.4)


def test_the_diagnostic_is_the_mean_of_answers_by_hand(torch_service: ServiceClient):
    config = train.prepared(train.Config(dataset=ToyBuilder(num_tasks=99, num_validation=9), response_length=4))
    tasks = config.dataset.split()[1][:2]
    found = asyncio.run(train.evaluation(config).diagnose(None, [*tasks, replace(tasks[0], answer="=?", solution="")]))
    model, renderer = (
        trainer_of(torch_service.create_training_client("tiny")).base,
        PlainRenderer(load_tokenizer("tiny")),
    )
    means = []
    for thoughts in (["", ""], [task.solution or "" for task in tasks]):
        sums = []
        for task, thought in zip(tasks, thoughts, strict=True):
            context = [*prompt_tokens(renderer, task), *renderer.tokenizer.encode(thought, add_special_tokens=False)]
            tokens = [*context, *answer_tokens(renderer, task.answer)]
            rows = full_logits(model, tokens).detach().log_softmax(-1)
            sums.append(sum(float(rows[t - 1, tokens[t]]) for t in range(len(context), len(tokens))))
        means.append(np.mean(sums))
    by_hand = {"without_rationale": means[0], "with_gold_rationale": means[1], "difference": means[1] - means[0]}
    assert found == pytest.approx(by_hand, abs=rounded(1e-4)) and abs(found["difference"]) > 1e-3


def test_the_best_of_several_checkpoints_is_the_latest_of_the_highest(monkeypatch: pytest.MonkeyPatch):
    values = iter([0.1, 0.4, 0.4, 0.3])

    class Scripted:
        def __init__(self, *args: Any, **options: Any):
            pass

        async def __call__(self, sampler: Any) -> Metrics:
            return {"test/env/all/correct": next(values)}

    monkeypatch.setattr(evaluation, "RLTestSetEvaluator", Scripted)
    config = train.prepared(train.Config(dataset=ToyBuilder(num_tasks=99, num_validation=9), response_length=4))
    several: dict[int, str | Path | None] = {6: None, 0: None, 4: None, 2: None}
    assert asyncio.run(train.evaluation(config).best_of(several, config.dataset.split()[1])) == Best(4, None, 0.4)


def test_toy_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The likelihood of held-out answers rises; the baseline and the diagnostic run from the same
    warm start.
    """
    small = train.Config(
        dataset=ToyBuilder(num_tasks=900, num_validation=16, num_test=16, num_digits=3, noise=0.0),
        warm_start_updates=40,
        max_updates=12,
        num_evaluations=2,
        train_batch_size=64,
        log_path=str(tmp_path),
        behavior_if_log_dir_exists="resume",
    )
    asyncio.run(train.main(small))
    printed = capsys.readouterr().out
    assert "12 updates of 8 questions with 8 rationales each" in printed and "best on the validation split" in printed
    summary = json.loads((tmp_path / "latro" / "summary.json").read_text())
    assert {"likelihood/answer_logprob", "test/env/all/correct", "test/env/all/maj@8"} <= summary["before"].keys()
    steps = read_metrics(tmp_path / "latro")
    rises = [record["likelihood/answer_logprob"] for record in steps if "likelihood/answer_logprob" in record]
    assert len(rises) == 12 and np.mean(rises[-3:]) > np.mean(rises[:3]) + 0.2
    assert abs(steps[0]["kl_policy_base"]) < rounded(1e-4)  # it began at the reference
    asyncio.run(train.main(chz.replace(small, method="sft", max_updates=2)))
    of_sft = json.loads((tmp_path / "sft" / "summary.json").read_text())
    for weights in (summary, of_sft):  # on the held-out questions
        assert weights["last"]["likelihood/answer_logprob"] > weights["before"]["likelihood/answer_logprob"] + 0.1
    asyncio.run(train.main(chz.replace(small, method="verifier", max_updates=2)))
    verified = read_metrics(tmp_path / "verifier")[0]
    assert 0 < verified["env/all/correct"] == verified["env/all/reward/total"] < 1
    assert "likelihood/answer_logprob" not in verified
    asyncio.run(train.main(chz.replace(small, method="diagnose")))
    assert "with_gold_rationale" in capsys.readouterr().out


# Trap: the best of a run's checkpoints, reported on the questions that chose it, as if on a test set.
@pytest.mark.parametrize("num_test", [0, 8])
def test_a_result_without_a_test_set_says_so(num_test: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = train.Config(dataset=ToyBuilder(num_tasks=99, num_test=num_test), log_path=str(tmp_path))
    (tmp_path / "latro").mkdir()
    (tmp_path / "latro" / "summary.json").write_text(json.dumps({"before": {}, "after": {}}))
    train.print_summary(config)
    assert ("without a test set" in capsys.readouterr().out) == (not num_test)
