"""Distillation: reverse KL of sampled tokens, top-k targets, contexts that only the teacher reads; by
hand, by second implementations, and through runs.
"""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import chz
import numpy as np
import pytest
import torch

from envs.arithmetic import ArithmeticBuilder, ArithmeticExamplesBuilder
from envs.pairwise import PairwisePreferenceGroupBuilder
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError, ContextLengthError, DataError
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import character_tokenizer, load_tokenizer
from posttrain.backend.types import Datum, ModelInput
from posttrain.renderers import get_renderer, with_tools
from posttrain.renderers.turns import decode
from rl import train
from rl.advantages import NoReward
from rl.data_processing import rows_of
from rl.distill import Distillation, Teachers
from rl.kl import penalized_advantages
from rl.types import Trajectory, TrajectoryGroup
from supervised import distill
from supervised.data import FileBuilder
from tests.conftest import full_logits, rounded
from tests.test_estimators import advantages, two_data
from tests.test_group_sources import metrics, weights
from tests.test_rl import turn

TORCH = BackendConfig(engine="torch")
TINY = load_tokenizer("tiny")
D = [np.array([0.0, 0.5, -1.0], np.float32), np.array([0.0, 0.3], np.float32)]


def test_reverse_kl_is_the_advantage_of_each_token() -> None:
    rows = penalized_advantages(two_data(), D, coef=2.0, discount=0.0, centre=False)
    assert advantages(rows) == [pytest.approx([0, 0.5 - 1.0, 0.5 + 2.0]), pytest.approx([0, -0.5 - 0.6])]
    rows = penalized_advantages(two_data(), D, coef=2.0, discount=0.5, centre=False)
    assert advantages(rows)[0] == pytest.approx([0, 0.5 - 2 * (0.5 - 0.5), 0.5 + 2.0])


def arithmetic_run(folder: Path, **settings: object) -> train.Config:
    env = ArithmeticBuilder(num_digits=1, n_batches=2, batch_size=4, group_size=2, num_test=5)
    common = {"env": env, "advantage": NoReward(), "renderer_name": "plain", "eval_every": 0, "backend": TORCH}
    return train.Config(log_path=str(folder), behavior_if_log_dir_exists="delete", **(common | settings))  # type: ignore[arg-type]


class Group:
    """A builder whose teacher reads three tokens where the policy reads two."""

    def teacher_prompt(self, context: str) -> ModelInput:
        assert context == "a hint"
        return ModelInput.from_ints([7, 8, 9])


@pytest.mark.parametrize("context", [None, "a hint"])
def test_teachers_score_the_sampled_tokens_and_only_those(torch_service, context: str | None) -> None:  # noqa: ANN001
    """Against logprobs of a forward pass on each teacher's own sequence; two teachers are averaged."""
    policy = torch_service.create_training_client("tiny")
    trajectories = [Trajectory([turn([1, 2], [3, 4], [-1.0, -2.0])]), Trajectory([turn([1, 2], [5], [-0.5])])]
    group = TrajectoryGroup(trajectories, [0.0] * 2, [{}] * 2, builder=Group())  # type: ignore[arg-type]
    rows = rows_of([group])
    teachers = Teachers(Distillation(teacher="micro,llama-tiny", context=context), torch_service, policy)
    difference_D, out = asyncio.run(teachers.difference([group], rows))
    prompt = [7, 8, 9] if context else [1, 2]
    for row, d_T, sampled in zip(rows, difference_D, ([3, 4], [5]), strict=True):
        tokens, expected = [*prompt, *sampled], []
        for name in ("micro", "llama-tiny"):
            teacher = torch_service.create_training_client(name)
            datum = Datum(
                ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
            )
            logprobs_T = teacher.forward([datum], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].array
            expected.append(logprobs_T[-len(sampled) :])
        assert d_T[0] == 0 and d_T[1:] == pytest.approx(
            row.logprobs_T[1:] - np.mean(expected, axis=0), abs=rounded(1e-5)
        )
    assert out["teacher_kl"] == pytest.approx(sum(d_T.sum() for d_T in difference_D) / 3, abs=rounded(1e-6))


def test_an_answer_that_leaves_the_teacher_no_room_says_so(torch_service) -> None:  # noqa: ANN001
    policy = torch_service.create_training_client("tiny")
    length = policy.get_info().max_length - 1  # of the answer, which fills the policy's context
    group = TrajectoryGroup([Trajectory([turn([1, 2], [3] * length, [-1.0] * length)])], [0.0], [{}], builder=Group())  # type: ignore[arg-type]
    teachers = Teachers(Distillation(teacher="micro", context="a hint"), torch_service, policy)
    with pytest.raises(ContextLengthError, match=r"distill.context: .* 1 more than the policy.*lower max_tokens"):
        asyncio.run(teachers.difference([group], rows_of([group])))


def test_each_data_set_has_its_teacher_and_a_group_without_one_is_an_error(torch_service) -> None:  # noqa: ANN001
    policy = torch_service.create_training_client("tiny")
    groups = [
        TrajectoryGroup([Trajectory([turn([1, 2], [3], [-1.0])])], [0.0], [{}], tags=[tag]) for tag in ("math", "code")
    ]
    rows = rows_of(groups)

    def difference(**config: object) -> tuple[list[np.ndarray], dict]:
        teachers = Teachers(Distillation(**config), torch_service, policy)  # type: ignore[arg-type]
        return asyncio.run(teachers.difference(groups, rows))

    micro, llama = (difference(teacher=name)[0] for name in ("micro", "llama-tiny"))
    d, out = difference(teacher="micro", teachers={"code": "llama-tiny"})
    assert d[0] == pytest.approx(micro[0], abs=rounded(1e-5)) and d[1] == pytest.approx(llama[1], abs=rounded(1e-5))
    assert out["teacher_kl/code"] == pytest.approx(llama[1].sum(), abs=rounded(1e-5)) and out[
        "teacher_kl/rest"
    ] == pytest.approx(micro[0].sum())
    with pytest.raises(ConfigError, match=r"no teacher for a group with the tags \['math'\]"):
        difference(teachers={"code": "llama-tiny"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "advantage=no_reward leaves nothing to learn from"),
        ({"teacher": "policy"}, "needs distill.context"),
        ({"teacher": "numerals"}, "its tokenizer has .* tokens, the policy's 260"),
        ({"teachers": {"arithmetic": "numerals"}}, "distill.teachers.arithmetic=.*: its tokenizer has"),
        ({"teachers": {"code": "tiny"}}, r"no teacher for a group with the tags \['arithmetic'\]"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_before_the_run(
    tmp_path: Path, settings: dict, message: str, numerals: Path
) -> None:
    settings = json.loads(json.dumps(settings).replace("numerals", str(numerals)))
    with pytest.raises(ConfigError, match=message):
        asyncio.run(train.main(arithmetic_run(tmp_path / "run", distill=Distillation(**settings))))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="PairwisePreferenceGroupBuilder has no teacher_prompt"):
        other = PairwisePreferenceGroupBuilder([], None, None, 2)  # type: ignore[arg-type]
        Distillation(teacher="tiny", context="a hint").check_groups([other])
    if settings.get("teacher") == str(numerals):
        data = ArithmeticExamplesBuilder(n_batches=1)
        off_policy = distill.Config(
            dataset=data, teacher=str(numerals), renderer_name="plain", log_path=str(tmp_path / "run")
        )
        with pytest.raises(ConfigError, match=message):
            asyncio.run(distill.main(off_policy))
        assert not (tmp_path / "run").exists()


@pytest.fixture
def numerals(tmp_path: Path) -> Path:
    from envs.star_graph import StarGraph
    from recipes.star_graph.model import make_model

    return asyncio.run(make_model(StarGraph(2, 3, 10), tmp_path / "numerals"))


@pytest.mark.slow
@pytest.mark.cpu_only
def test_a_distillation_run_learns_from_the_teacher_alone_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    """The reward has no part: of the policy's own start KL is 0, and with coef=0 nothing moves."""
    for name, teacher, coef in (("self", "tiny", 0.0), ("other", "micro", 1.0)):
        distill = Distillation(teacher=teacher, coef=coef)
        asyncio.run(train.main(arithmetic_run(tmp_path / name, distill=distill)))
    start = tmp_path / "start"
    with ServiceClient(TORCH, tmp_path) as service:
        service.create_training_client("tiny").save_state(str(start)).result()
    assert weights(tmp_path / "self") == (start / "model.safetensors").read_bytes() != weights(tmp_path / "other")
    assert abs(metrics(tmp_path / "self")[0]["teacher_kl"]) < rounded(1e-5)
    assert metrics(tmp_path / "other")[0]["teacher_kl"] > 0.01
    config = arithmetic_run(tmp_path / "cut", distill=Distillation(teacher="micro"))
    asyncio.run(train.main(chz.replace(config, max_steps=1)))
    asyncio.run(train.main(chz.replace(config, behavior_if_log_dir_exists="resume_changed")))
    assert weights(tmp_path / "cut") == weights(tmp_path / "other")


def test_a_problems_context_reaches_the_teacher() -> None:
    dataset, _ = asyncio.run(ArithmeticBuilder(num_digits=1, num_test=5)(get_renderer("role_colon", TINY)))
    builder = dataset.get_batch(0)[0]
    problem = builder.env_thunk().problem  # type: ignore[attr-defined]
    text = TINY.decode(builder.teacher_prompt("{question}{solution} or {gold}").to_ints())  # type: ignore[attr-defined]
    assert (
        text
        == f"System: {problem.question}{problem.solution} or {problem.gold}\n\nUser: {problem.question}\n\nAssistant:"
    )


# --- off-policy ---------------------------------------------------------------------------------


def test_top_k_cross_entropy_by_hand_and_its_least_value_is_the_teacher() -> None:
    teacher = torch.tensor([[0.5, 0.3], [0.6, 0.0]])
    p = torch.tensor([[0.25, 0.25], [0.5, 0.25]]).log().requires_grad_()
    inputs = {"teacher": teacher, "rest": torch.tensor([0.2, 0.4]), "weights": torch.tensor([1.0, 0.5])}
    loss, out = distill.top_k_cross_entropy(p, inputs)
    first = -(0.5 * np.log(0.25) + 0.3 * np.log(0.25) + 0.2 * np.log(0.5))
    second = -(0.6 * np.log(0.5) + 0.4 * np.log(0.25))
    assert loss.tolist() == pytest.approx([first, 0.5 * second])
    entropy = -(0.5 * np.log(0.5) + 0.3 * np.log(0.3) + 0.2 * np.log(0.2))
    assert out["teacher_kl"][0].item() == pytest.approx(first - entropy)
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        distill.top_k_cross_entropy(logits.log_softmax(-1)[:, :2], inputs)[0].sum().backward()
        optimizer.step()
    assert logits.softmax(-1)[0, :2].tolist() == pytest.approx([0.5, 0.3], abs=0.01)


@pytest.mark.parametrize("rest", [True, False])
def test_top_k_training_has_the_gradient_of_the_whole_distribution(torch_service, rest: bool) -> None:  # noqa: ANN001
    """Second implementation: the teacher's softmax and the student's from transformers' logits, all
    260 tokens cut to the 5 most likely here."""
    student, k = torch_service.create_training_client("tiny"), 5
    data = ArithmeticExamplesBuilder(num_digits=1, n_batches=1, batch_size=3, num_test=5)
    dataset, _ = data(get_renderer("plain", TINY))
    config = distill.Config(dataset=data, teacher="micro", top_k=k, rest=rest)
    targets = distill.TeacherTargets(
        dataset, dataset, torch_service.create_sampling_client(base_model="micro"), config, student.vocabulary
    )
    batch = targets.get_batch(0)
    output = student.forward_backward(batch, distill.top_k_cross_entropy).result()
    trainer = student._trainer
    ours = {name: p.grad.clone() for name, p in trainer.named_trainable.items()}
    trainer.zero_grad()
    teacher, total, kls = torch_service.create_training_client("micro")._trainer.model, torch.zeros(()), []
    for plain in dataset.get_batch(0):
        tokens, w = plain.model_input.to_ints(), torch.from_numpy(plain.loss_fn_inputs["weights"].array)
        with torch.no_grad():
            q_TK, at_TK = full_logits(teacher, tokens).softmax(-1).topk(k)
        p_TV = full_logits(trainer.model, tokens).log_softmax(-1)
        p_TK, q_rest = p_TV.gather(-1, at_TK), 1 - q_TK.sum(-1, keepdim=True)
        if rest:
            p_TK = torch.cat([p_TK, (1 - p_TK.exp().sum(-1, keepdim=True)).log()], -1)
            q_TK = torch.cat([q_TK, q_rest], -1)
        else:
            q_TK = q_TK / q_TK.sum(-1, keepdim=True)
        total = total - (w[:, None] * q_TK * p_TK).sum()
        kls += (q_TK * (q_TK.log() - p_TK)).sum(-1)[w > 0].tolist()
    total.backward()
    assert output.metrics["loss:sum"] == pytest.approx(total.item(), rel=rounded(1e-5))
    assert output.metrics["teacher_kl:mean"] == pytest.approx(np.mean(kls), rel=rounded(1e-4))
    for name, p in trainer.named_trainable.items():
        assert (ours[name] - p.grad).norm() <= rounded(2e-5) * p.grad.norm() + 1e-8, name


def test_a_context_changes_what_the_teacher_reads_and_not_what_the_student_does(torch_service) -> None:  # noqa: ANN001
    renderer = get_renderer("role_colon", TINY)
    data = ArithmeticExamplesBuilder(num_digits=1, n_batches=1, batch_size=3, num_test=5)
    plain, read = data(renderer)[0], data(distill.with_context(renderer, "Be brief."))[0]  # type: ignore[arg-type]
    config = distill.Config(dataset=data, teacher="micro", context="Be brief.")
    teacher = torch_service.create_sampling_client(base_model="micro")
    with_context = distill.TeacherTargets(plain, read, teacher, config, 260).get_batch(0)
    alone = distill.TeacherTargets(read, read, teacher, config, 260).get_batch(0)
    for ours, there, original in zip(with_context, alone, plain.get_batch(0), strict=True):
        assert ours.model_input == original.model_input and ours.model_input.length < there.model_input.length
        at, there_at = (np.flatnonzero(d.loss_fn_inputs["weights"].array) for d in (ours, there))
        for key in ("target_tokens", "teacher", "rest"):
            assert np.array_equal(ours.loss_fn_inputs[key].array[at], there.loss_fn_inputs[key].array[there_at])
    everything = chz.replace(data, train_on_what="all_tokens")
    mismatched = distill.TeacherTargets(
        everything(renderer)[0],
        everything(distill.with_context(renderer, "Be brief."))[0],
        teacher,
        config,  # type: ignore[arg-type]
        260,
    )
    with pytest.raises(DataError, match="the teacher reads other trained tokens"):
        mismatched.get_batch(0)


# Trap: Qwen's models have one tokenizer and 151,936 or 152,064 rows: a run that ends at a teacher's id beyond its own.
@pytest.mark.parametrize("rest", [True, False])
def test_a_teachers_ids_beyond_the_students_vocabulary_are_among_all_other_tokens(torch_service, rest: bool) -> None:  # noqa: ANN001
    data = ArithmeticExamplesBuilder(num_digits=1, n_batches=1, batch_size=3, num_test=5)
    dataset, _ = data(get_renderer("plain", TINY))
    teacher = torch_service.create_sampling_client(base_model="micro")
    of_all, of_few = (
        distill.TeacherTargets(dataset, dataset, teacher, distill.Config(dataset=data, teacher="micro", top_k=k), n)
        for k, n in ((260, 260), (2, 200))
    )
    of_few = replace(of_few, config=chz.replace(of_few.config, rest=rest))
    for whole, ours in zip(of_all.get_batch(0), of_few.get_batch(0), strict=True):
        for t in np.flatnonzero(ours.loss_fn_inputs["weights"].array):
            q = dict(
                zip(*(whole.loss_fn_inputs[key].array[t].tolist() for key in ("target_tokens", "teacher")), strict=True)
            )
            best = sorted((token for token in q if token < 200), key=lambda token: -q[token])[:2]
            assert ours.loss_fn_inputs["target_tokens"].array[t].tolist() == best
            total = 1.0 if rest else sum(q[token] for token in best)
            assert ours.loss_fn_inputs["teacher"].array[t] == pytest.approx([q[token] / total for token in best])


# Trap: the tools of a row make another renderer, and the teacher reads no context, or the run ends.
def test_a_context_stays_where_a_row_has_tools() -> None:
    spec = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}, "required": []}}
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    renderer = distill.with_context(get_renderer("chat_template", character_tokenizer(512)), "Be brief.")
    row = {"messages": messages, "tools": [spec]}
    text = decode(renderer.tokenizer, FileBuilder(path="none.jsonl").example(row, renderer)[0])
    assert "Be brief." in text and '"name": "add"' in text and "hello" in text
    with pytest.raises(ConfigError, match="RoleColonRenderer cannot write tools"):
        with_tools(distill.with_context(get_renderer("role_colon", TINY), "Be brief."), [])
