"""Preference losses against numbers worked out by hand, and the loop: reference, micro-batches,
resume, learning.
"""

import asyncio
import json
import math
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import CheckpointError, ConfigError, DataError
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.trainer import Trainer
from posttrain.backend.training_client import TrainingClient
from posttrain.renderers import get_renderer
from posttrain.tracking.metrics_log import read_metrics
from preference import train_dpo
from preference.losses import DPO, IPO, RPO, PairLogprobs, PreferenceLoss, SimPO, pair_metrics
from preference.pairs import Pair, as_data, micro_batches_of_pairs, render_pairs
from preference.reference import with_reference
from recipes.dpo import train as recipe
from recipes.dpo.letters import SortedPreferredBuilder
from tests.commands import Command
from tests.conftest import gradients, rounded
from tests.finished_runs import outcome, steps_logged
from tests.jsonl_files import write

# star_graph.md E.4: policy chosen -2, -.5, rejected -1, -4; reference chosen -3, -1, rejected -1.5,
# -2. Tokens are our own.
CASE = ([-2.0, -0.5], [-1.0, -4.0], [-3.0, -1.0], [-1.5, -2.0], [4.0, 2.0], [2.0, 8.0])


def logprobs(*columns: list[float]) -> PairLogprobs:
    return PairLogprobs(
        *(torch.tensor(column, dtype=torch.float64, requires_grad=i < 2) for i, column in enumerate(columns))
    )


# the loss of each pair, d loss / d policy chosen, d loss / d policy rejected; worked out by hand: m
# = beta * delta, delta = .5, 2.5
HAND_CASES: list[tuple[PreferenceLoss, list[float], list[float], list[float]]] = [
    (DPO(), [0.668459648, 0.575939420], [-0.0487502604, -0.0437823499], [0.0487502604, 0.0437823499]),
    # e = .2: -.8 log s(m) - .2 log s(-m); gradient beta (.2 s(m) - .8 s(-m))
    (
        DPO(label_smoothing=0.2),
        [0.678459648, 0.625939420],
        [-0.0287502604, -0.0237823499],
        [0.0287502604, 0.0237823499],
    ),
    # per token: 1/4 - .5/2 = 0 and .5/2 - -2/8 = .5; gradients -beta s(-m) / |y|
    (
        DPO(beta=2.0, length_normalised=True),
        [math.log(2), math.log(1 + math.exp(-1))],
        [-0.25, -0.2689414214],
        [0.5, 0.0672353553],
    ),
    (RPO(), [2.668459648, 1.075939420], [-1.0487502604, -1.0437823499], [0.0487502604, 0.0437823499]),
    (
        RPO(nll_coef=0.5, nll_per_token=True),
        [0.918459648, 0.700939420],
        [-0.1737502604, -0.2937823499],
        [0.0487502604, 0.0437823499],
    ),
    # (delta - 1 / (2 * .1))^2 = 4.5^2, 2.5^2
    (IPO(), [20.25, 6.25], [-9.0, -5.0], [9.0, 5.0]),
    (IPO(beta=1.0, length_normalised=True), [0.25, 0.0], [-0.25, 0.0], [0.5, 0.0]),
    # 2 (-2/4) - 2 (-1/2) - 1 = -1; 2 (-.5/2) - 2 (-4/8) - 1 = -.5; -log s(z), gradient -s(-z) beta
    # / |y|
    (SimPO(), [1.3132616875, 0.9740769842], [-0.3655292893, -0.6224593312], [0.7310585786, 0.1556148328]),
]


@pytest.mark.parametrize(("loss", "expected", "chosen_gradient", "rejected_gradient"), HAND_CASES)
def test_losses_and_gradients_equal_hand_computation(loss, expected, chosen_gradient, rejected_gradient) -> None:
    case = logprobs(*CASE)
    loss_P = loss(case)
    loss_P.sum().backward()
    assert loss_P.tolist() == pytest.approx(expected, abs=1e-9)
    assert case.policy_chosen_P.grad is not None and case.policy_rejected_P.grad is not None
    assert case.policy_chosen_P.grad.tolist() == pytest.approx(chosen_gradient, abs=1e-9)
    assert case.policy_rejected_P.grad.tolist() == pytest.approx(rejected_gradient, abs=1e-9)
    assert pair_metrics(loss, case)["dpo_loss"] == pytest.approx(sum(expected) / 2, abs=1e-9)


def test_metrics_equal_hand_computation_and_equal_rewards_are_wrong() -> None:
    metrics = pair_metrics(DPO(), logprobs(*CASE))
    by_hand = {"accuracy": 1.0, "margin": 0.15, "chosen_reward": 0.075, "rejected_reward": -0.075}
    by_hand |= {"chosen_logprob": -1.25, "rejected_logprob": -2.5, "dpo_loss": 0.6221995339}
    assert metrics == pytest.approx(by_hand, abs=1e-9)
    for loss, chosen, rejected in [  # means of both pairs
        (IPO(beta=0.3), 0.3 * 0.75, 0.3 * -0.75),
        (IPO(beta=0.3, length_normalised=True), 0.3 * (1 / 4 + 0.5 / 2) / 2, 0.3 * (0.5 / 2 - 2 / 8) / 2),
        (SimPO(), 2 * -(2 / 4 + 0.5 / 2) / 2, 2 * -(1 / 2 + 4 / 8) / 2),
    ]:
        found = pair_metrics(loss, logprobs(*CASE))
        assert (found["chosen_reward"], found["rejected_reward"]) == pytest.approx((chosen, rejected)), loss
    policy_is_reference = logprobs(*CASE[:2], *CASE[:2], *CASE[4:])
    assert DPO()(policy_is_reference).tolist() == [math.log(2)] * 2  # to the last bit
    assert pair_metrics(DPO(), policy_is_reference)["accuracy"] == 0


def test_settings_that_mean_nothing_are_refused() -> None:
    for make in (lambda: DPO(beta=0.0), lambda: SimPO(beta=-1.0), lambda: RPO(label_smoothing=0.5)):
        with pytest.raises(ConfigError, match="must be"):
            make()


def letter_pairs(count: int) -> list[Pair]:
    train, _ = SortedPreferredBuilder()()
    return [*render_pairs(train[:count], get_renderer("plain", load_tokenizer("tiny")))]


# Trap: all activations alive in a custom loss; gradients that depend on the cut.
def test_gradients_do_not_depend_on_how_pairs_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches of pairs by the loop, and of sequences by the trainer, against one pass over
    everything.
    """
    pairs, forwards, results = letter_pairs(24), [], []
    forward, objective = Trainer._logprobs, train_dpo.PreferenceObjective(SimPO(), 50)
    monkeypatch.setattr(
        Trainer, "_logprobs", lambda self, batch: forwards.append(len(batch.loss.rows_M)) or forward(self, batch)
    )
    for budget, cut_by_loop in ((10**6, False), (50, True), (50, False)):
        trainer = Trainer("tiny", BackendConfig(micro_batch_tokens=budget))
        parts = micro_batches_of_pairs(pairs, budget) if cut_by_loop else [pairs]
        assert len(parts) == (12 if cut_by_loop else 1)
        forwards.clear()  # the constructor's own check
        for part in parts:
            trainer.run_custom(as_data(part), partial(objective._share_of_mean, part, len(pairs)))
        results.append(gradients(trainer))
        # one forward each, unless the trainer has to cut
        assert (len(forwards) == len(parts)) == (budget > 50 or cut_by_loop)
    for other in results[1:]:
        assert all(
            (other[name] - gradient).norm() <= rounded(2e-6) * gradient.norm() for name, gradient in results[0].items()
        )


# Trap: a DPO reference that moves, or is taken from resumed weights.
def test_the_reference_is_cached_by_content_and_another_one_is_refused(tmp_path: Path) -> None:
    file, pairs = tmp_path / "reference_logprobs.jsonl", letter_pairs(30)
    with ServiceClient(BackendConfig(engine="torch"), tmp_path) as service:
        client, other = (service.create_training_client("tiny", seed=seed) for seed in (0, 1))

        def cached(pairs: list[Pair], client=client, name: str = "seed 0") -> list[Pair]:
            return [*asyncio.run(with_reference(pairs, client, file, {"policy": name}))]

        first = cached(pairs)
        lines = file.read_text().splitlines()
        assert len(lines) == 61 and cached(pairs) == first and file.read_text().splitlines() == lines
        more = cached([*reversed(letter_pairs(34))])
        # only the new answers were added
        assert more[:3:-1] == first and len(file.read_text().splitlines()) == 69
        file.write_text("\n".join(lines[:20]) + "\n" + lines[20][:9])  # killed while it was written
        assert cached(pairs) == first
        with pytest.raises(CheckpointError, match="this run starts from"):
            cached(pairs, name="seed 1")
        with pytest.raises(CheckpointError, match="have changed"):
            cached(pairs, client=other)


def config(folder: Path, **changes) -> train_dpo.Config:
    settings = {
        "dataset": SortedPreferredBuilder(alphabet=9, test_size=40),
        "renderer_name": "plain",
        "learning_rate": 3e-4,
    }
    settings |= {"batch_size": 16, "log_path": str(folder), "backend": BackendConfig(engine="torch")}
    return train_dpo.Config(**{**settings, **changes})


@pytest.mark.parametrize("method", [DPO(), RPO(), IPO(), SimPO()], ids=lambda method: type(method).__name__)
def test_every_method_learns_to_prefer(method: PreferenceLoss, tmp_path: Path) -> None:
    metrics = asyncio.run(train_dpo.main(config(tmp_path / "run", method=method, num_epochs=4, eval_every=100)))
    first = read_metrics(tmp_path / "run")[0]
    if type(method) is DPO:
        assert first["dpo_loss"] == pytest.approx(math.log(2), abs=rounded(1e-6))
        assert first["test/dpo_loss"] == pytest.approx(math.log(2), abs=rounded(1e-6))
    assert metrics["test/accuracy"] > 0.75 and metrics["test/dpo_loss"] < first["test/dpo_loss"]
    assert first["num_pairs"] == 16 and first["num_tokens"] == 16 * 2 * 9
    assert (tmp_path / "run" / "reference_logprobs.jsonl").exists() == method.needs_reference


def test_bad_input_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none is left; raise max_length"):
        asyncio.run(train_dpo.main(config(tmp_path / "run", max_length=2)))
    assert not (tmp_path / "run").exists()


def test_fewer_pairs_than_a_batch_are_trained_on_and_said_once(tmp_path: Path, capsys) -> None:
    asyncio.run(train_dpo.main(config(tmp_path / "run", batch_size=1000, max_steps=1, eval_every=0)))
    assert capsys.readouterr().out.count("batch_size=1000 is more than the 86 pairs:") == 1
    assert read_metrics(tmp_path / "run")[0]["num_pairs"] == 86


@pytest.mark.parametrize("method", [DPO(), SimPO()], ids=["with a reference", "without"])
def test_the_policy_that_is_compared_and_referred_to_is_the_checkpoint_and_is_loaded_once(
    method: PreferenceLoss, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ServiceClient(BackendConfig(engine="torch"), tmp_path) as service:
        path = service.create_training_client("tiny", seed=1).save_state("start").result().path
    events: list[str] = []
    load, compare, refer = TrainingClient.load_state, train_dpo.check_at_start, train_dpo.with_reference
    monkeypatch.setattr(TrainingClient, "load_state", lambda *args: (events.append("load"), load(*args))[1])
    monkeypatch.setattr(train_dpo, "check_at_start", lambda *args: (events.append("compare"), compare(*args))[1])
    monkeypatch.setattr(train_dpo, "with_reference", lambda *args: (events.append("refer"), refer(*args))[1])
    asyncio.run(
        train_dpo.main(config(tmp_path / "run", method=method, load_checkpoint_path=path, max_steps=1, eval_every=0))
    )
    assert events == ["load", "compare", *(["refer"] if method.needs_reference else [])]


def letters_file(folder: Path) -> str:
    """The letters as solutions of a problem, as GSM8K's file of model solutions has them."""
    train, _ = SortedPreferredBuilder(alphabet=9, test_size=40)()
    rows = []
    for one in train:
        right, wrong = (answer[0]["content"] for answer in one.chosen_and_rejected())
        solutions = {
            "large": {"is_correct": True, "solution": right},
            "small": {"is_correct": False, "solution": wrong},
        }
        rows.append({"question": one.comparison.prompt_conversation[0]["content"], **solutions})
    return write(folder / "solutions.jsonl", *rows)


def start(solutions: str, folder: Path, killed_at: tuple[str, int] | None = None) -> Command:
    """From the command line, by short names; micro-batches of 8 pairs."""
    arguments = [
        "dataset=gsm8k_solutions",
        f"dataset.path={solutions}",
        "dataset.test_size=20",
        "method=rpo",
        "method.nll_coef=0.5",
    ]
    arguments += [
        "batch_size=16",
        "num_epochs=4",
        "learning_rate=1e-3",
        "eval_every=7",
        "save_every=4",
        "renderer_name=plain",
    ]
    arguments += [
        "backend.engine=torch",
        "backend.micro_batch_tokens=192",
        f"log_path={folder}",
        "behavior_if_log_dir_exists=resume",
    ]
    return Command("preference/train_cli.py", *arguments, killed_at=killed_at)


def test_killed_in_mid_epoch_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    solutions = letters_file(tmp_path)
    whole, killed = start(solutions, tmp_path / "whole"), start(solutions, tmp_path / "killed", ("metrics.jsonl", 11))
    assert killed.wait() == -signal.SIGKILL and 4 < steps_logged(tmp_path / "killed") < 20
    for process in (whole, again := start(solutions, tmp_path / "killed")):
        assert process.wait() == 0 and ("resuming" in process.output()) == (process is again), process.output()
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    references = [(tmp_path / name / "reference_logprobs.jsonl").read_text() for name in ("killed", "whole")]
    assert references[0] == references[1]
    saved = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert saved["method"]["class"] == "preference.losses:RPO" and saved["method"]["nll_coef"] == 0.5
    # five steps an epoch, and the last evaluation
    assert len(read_metrics(tmp_path / "whole")) == 21


def test_the_recipe_learns_and_rpo_keeps_the_chosen_answers_likely(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without its warm start to speak of, which would take half a minute."""
    asyncio.run(
        recipe.main(recipe.Config(warm_start_nll=10.0, learning_rate=1e-3, num_epochs=1, log_path=str(tmp_path)))
    )
    last = {name: read_metrics(tmp_path / name)[-1] for name in ("dpo", "rpo")}
    assert min(metrics["test/accuracy"] for metrics in last.values()) >= 0.9
    assert last["rpo"]["test/chosen_logprob"] > -6 > last["dpo"]["test/chosen_logprob"]
    assert (tmp_path / "dpo.png").exists() and capsys.readouterr().out.count("in order") == 3
