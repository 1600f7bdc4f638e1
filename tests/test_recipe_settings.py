"""Settings of recipes that do not work together: an error before anything is trained."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs.arithmetic_chain import ChainTask
from envs.star_graph_data import StarGraphExamplesBuilder, StarGraphTask
from envs.textarena import TextArenaBuilder
from posttrain.backend.errors import ConfigError, CookbookError, DataError
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.renderers import get_renderer
from posttrain.tracking.jsonl import write_jsonl
from preference.prm import StepScores
from preference.solutions import Solution
from recipes.belief_state import curriculum
from recipes.belief_state import star_graph as bst_star_graph
from recipes.bstar.config import Config as BStar
from recipes.dpo.letters import RandomOrderBuilder, SortedPreferredBuilder
from recipes.latro import train as latro
from recipes.latro.tasks import JsonlBuilder
from recipes.latro.toy import ToyBuilder
from recipes.multiplayer import train as multiplayer
from recipes.prm import train as prm
from recipes.prm.evaluation import evaluate, label_noise
from recipes.star_graph import guided, pretrain
from recipes.star_graph import train as star_graph
from recipes.warm_start import seeds_of

NONE_HELD_OUT = "num_test=0: accuracy is measured"
CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "terms that fit neither way": (lambda: ChainTask(max_total=9).chains(9, [0]), "neither added nor subtracted"),
    "a seed twice": (lambda: seeds_of("0,1,0"), "different whole numbers"),
    "a negative seed": (lambda: seeds_of("0,-1"), "from 0 up"),
    "star graphs, a seed twice": (lambda: star_graph.main(star_graph.Config(seeds=[0, 0])), "different whole"),
    "shares above 1": (lambda: ToyBuilder(useful=0.8), "together at most 1"),
    "one letter": (lambda: SortedPreferredBuilder(num_letters=1)(), "2 <= num_letters"),
    "27 letters": (lambda: RandomOrderBuilder(alphabet=27)(None), "<= 26"),  # type: ignore[arg-type]
    "no method": (lambda: BStar(methods=[]), "methods is empty"),
    "no temperature": (lambda: BStar(temperatures=["nan"]), "not a finite number"),
    "infinite threshold": (lambda: BStar(thresholds=["inf"]), "not a finite number"),
    "negative temperature": (lambda: BStar(temperatures=["0.5", "-1"]), "temperatures=-1 must be"),
    "negative test temperature": (lambda: BStar(eval_temperature="-1"), "eval_temperature=-1 must be"),
    "lengths without steps": (
        lambda: curriculum.main(curriculum.Config(lengths=[3, 4], steps=[5])),
        "a number of steps for each",
    ),
    "gpt without held-out graphs": (
        lambda: pretrain.main(pretrain.Config(dataset=StarGraphExamplesBuilder(num_test=0))),
        NONE_HELD_OUT,
    ),
    "bst without held-out graphs": (lambda: bst_star_graph.StarGraphBuilder(num_test=0)(4, 0), NONE_HELD_OUT),
    "all without held-out graphs": (
        lambda: star_graph.main(star_graph.Config(task=StarGraphTask(num_test=0))),
        NONE_HELD_OUT,
    ),
    "classifier without held-out graphs": (
        lambda: guided.main(guided.Config(policy_path="none", task=StarGraphTask(num_test=0))),
        NONE_HELD_OUT,
    ),
    "a game without listed moves": (
        lambda: multiplayer.main(multiplayer.Config(env=TextArenaBuilder(game="connect_four"))),
        "does not list its legal moves",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_impossible_settings_are_refused_at_the_start(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    call, message = CASES[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        if asyncio.iscoroutine(called := call()):
            asyncio.run(called)
    assert list(tmp_path.iterdir()) == []


# Trap: a warm start of minutes, and then the error.
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rloo_k": 1}, "rloo_k=1"),
        ({"train_batch_size": 100}, "not a multiple of rloo_k"),
        ({"max_updates": 3}, "num_evaluations=10 in 3 updates"),
        ({"dataset": ToyBuilder(num_validation=0)}, "num_validation=0"),
        ({"dataset": ToyBuilder(num_digits=3)}, "fewer than 8200"),
    ],
)
def test_latro_checks_sizes_and_data_before_its_warm_start(options: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(CookbookError, match=message):
        asyncio.run(latro.main(latro.Config(log_path=str(tmp_path), **options)))
    assert list(tmp_path.iterdir()) == []


def test_a_rationale_that_is_no_text_is_named_by_its_line(tmp_path: Path):
    row = {"queries": "1+1?", "responses": "The answer is 2.", "groundtruth": "2"}
    write_jsonl(tmp_path / "rows.jsonl", [row | {"rationales": "so"}, row, row | {"rationales": ["so"]}])
    tasks = JsonlBuilder(train_path=str(tmp_path / "rows.jsonl"))
    assert [task.solution for task in tasks.tasks("train", 2)] == ["so", None]
    with pytest.raises(DataError, match=r"rows.jsonl:3: 'rationales' is .*it is a text"):
        tasks.tasks("train", None)


@pytest.mark.parametrize("right", [True, False])
def test_chains_that_are_all_right_or_all_wrong_are_evaluated(right: bool):
    tokenizer = load_tokenizer("tiny")
    chains = ChainTask(num_steps=2, max_total=9, max_term=2, num_test=2).test_chains()
    text = {chain: "\n".join(chain.steps) if right else "1+1=3\n#9" for chain in chains}
    tokens = {chain: [*tokenizer.encode(said), tokenizer.eos_token_id] for chain, said in text.items()}
    solutions = [[Solution(chain.question, [1], tokens[chain], "", right)] for chain in chains]
    scores = [[StepScores(np.ones(3), [0, 1, 2, 3], None)] for _ in chains]
    results, aligned = evaluate(chains, solutions, scores, get_renderer("plain", tokenizer), prm.FORM)
    assert results["wrong chains"] == (0 if right else 2) and bool(aligned) != right
    assert np.isnan(results["first wrong step found" if right else "right chains left unmarked"])
    assert results["right chains left unmarked" if right else "first wrong step found"] == float(right)


def test_a_process_reward_model_of_chains_is_evaluated_by_hand(tmp_path: Path):
    tokenizer = load_tokenizer("tiny")
    (chain,) = ChainTask(num_steps=2, max_total=9, max_term=2, num_test=1).test_chains()
    first_wrong, last_wrong = ["x", *chain.steps[1:]], [*chain.steps[:-1], "#x"]
    groups = [  # steps, and the model's probability of each
        [(chain.steps, [0.9, 0.8, 0.9]), (chain.steps, [0.9, 0.2, 0.9]),
         (first_wrong, [0.1, 0.2, 0.3]), (last_wrong, [0.7, 0.4, 0.1])],
        [(first_wrong, [0.2, 0.9, 0.9])] * 4,
    ]  # fmt: skip
    solutions, scores = [], []
    for group in groups:
        tokens = [[*tokenizer.encode("\n".join(steps)), tokenizer.eos_token_id] for steps, _ in group]
        solutions.append([Solution(chain.question, [1], one, "", False) for one in tokens])
        logits = [np.log(p) - np.log1p(-np.array(p)) for _, p in group]
        scores.append([StepScores(logits_S, [0, 1, 2, 3], None) for logits_S in logits])
    results, aligned = evaluate([chain] * 2, solutions, scores, get_renderer("plain", tokenizer), prm.FORM)
    expected = {
        "first wrong step found": (1 / 2 + 1) / 2,
        "first wrong step found, standard error": 0.25,
        "... by always guessing the commonest": 5 / 6,
        "... by drawing a step": 1 / 3,
        "right chains left unmarked": 1 / 2,
        "wrong chains": 6,
    }
    assert {name: results[name] for name in expected} == pytest.approx(expected)
    by_step = {0: [0.1, 0.1, *[0.2] * 4], 1: [0.2, *[0.9] * 4], 2: [0.3, *[0.9] * 4], -2: [0.7], -1: [0.4]}
    assert {step: sorted(values) for step, values in aligned.items()} == {
        step: pytest.approx(values) for step, values in by_step.items()
    }
    labelled = [(chain.steps, [1, 0, 1]), ([chain.steps[0], "x", "#x"], [1, 1, 0])]
    records = [{"input": chain.question, "output": steps, "label": label} for steps, label in labelled]
    write_jsonl(tmp_path / "labels.jsonl", records)
    noise = label_noise({chain.question: chain}, tmp_path / "labels.jsonl")
    assert list(noise.values()) == [1 / 4, 1 / 2, 6, 4 / 6], noise


@pytest.mark.parametrize("task", [ChainTask(max_total=9, max_term=5), ChainTask(max_total=999, num_steps=7)])
def test_a_solution_of_a_chain_is_given_the_tokens_that_it_needs(task: ChainTask):
    longest = max(len("\n".join(chain.steps)) for chain in task.chains(300, [0]))
    assert longest < prm.Config(task=task).max_tokens
