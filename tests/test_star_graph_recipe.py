"""The star-graph recipe: decoding, REINFORCE in Q#'s form, pairs, preferences, models of other
sizes, runs side by side.
"""

import asyncio
import json
from functools import partial
from pathlib import Path

import chz
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from envs.star_graph import StarGraph, held_out, sample_graphs
from envs.star_graph_data import StarGraphExamplesBuilder, StarGraphTask, supervised_datum
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import CheckpointError, ConfigError, DataError
from posttrain.backend.models import load_model
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import ModelInput
from posttrain.tracking.jsonl import read_jsonl
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.stages import Stage
from preference.losses import DPO, RPO
from preference.pairs import as_data, sequence_logprobs
from recipes.star_graph import preferences, reinforce, train
from recipes.star_graph.evaluation import AccuracyEvaluator, decode_paths
from recipes.star_graph.model import check_model, make_model
from recipes.star_graph.rollouts import collect_pairs, read_pairs
from recipes.star_graph.side_by_side import RunFailed, run_side_by_side
from tests.conftest import trainer_of
from tests.star_graph_originals import numeral_layout

GRAPH = StarGraph(2, 3, 8)
LAYOUT = numeral_layout(GRAPH)
TORCH = BackendConfig(engine="torch")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(
        asyncio.run(
            make_model(GRAPH, tmp_path_factory.mktemp("star") / "model", 0, num_layers=1, num_heads=2, hidden=16)
        )
    )


def logits_of(model_path: str, tokens_B_T: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(model_path)(torch.from_numpy(np.array(tokens_B_T))).logits.double()


# --- decoding -----------------------------------------------------------------------------------


def test_paths_are_decoded_as_a_plain_forward_pass_would(model_path: str):
    rows_B_T, prefix = sample_graphs(GRAPH, 20, 0), GRAPH.prefix_length
    with ServiceClient(TORCH) as service:
        sampler = service.create_sampling_client(model_path)
        decode = {
            targets: asyncio.run(decode_paths(sampler, rows_B_T[:, :prefix], LAYOUT, targets))
            for targets in ("forward", "reversed")
        }
        at_once = asyncio.run(decode_paths(sampler, rows_B_T[:, :prefix], LAYOUT, "teacherless"))
    tokens_B_T = rows_B_T[:, :prefix]
    for _ in range(3):
        tokens_B_T = np.concatenate([tokens_B_T, logits_of(model_path, tokens_B_T)[:, -1:].argmax(-1).numpy()], axis=1)
    assert (decode["forward"] == tokens_B_T[:, prefix:]).all()
    assert (decode["reversed"] == tokens_B_T[:, prefix:][:, ::-1]).all()
    dummies = np.full((20, 2), GRAPH.dollar)
    expected = logits_of(model_path, np.concatenate([rows_B_T[:, :prefix], dummies], axis=1))[:, prefix - 1 :].argmax(
        -1
    )
    assert (at_once == expected.numpy()).all()


def test_the_evaluator_measures_the_present_weights(model_path: str):
    test = held_out(GRAPH, 50, 1)
    with ServiceClient(TORCH) as service:
        client = service.create_training_client(model_path)
        found = asyncio.run(AccuracyEvaluator(test, LAYOUT)(client))
    logits_B_T_V = logits_of(model_path, test.tokens_B_T)
    first_node = (
        logits_B_T_V[:, GRAPH.prefix_length - 1].argmax(-1).numpy() == test.tokens_B_T[:, GRAPH.prefix_length]
    ).mean()
    assert found["test/node_1"] == first_node and set(found) == {
        f"test/{k}" for k in ("first_hop", "exact", "node_1", "node_2", "node_3")
    }


# --- REINFORCE ----------------------------------------------------------------------------------


def test_reinforce_weights_by_hand():
    rewards_B = np.array([1.0, 0.0, 0.0, 1.0, 1.0])
    assert reinforce.weights(rewards_B, 0) == pytest.approx([1.0, -0.1, -0.1, 1.0, 1.0])
    assert reinforce.weights(rewards_B, 1) == pytest.approx([0.4, -0.6, -0.6, 0.4, 0.4])


@pytest.mark.parametrize("baseline", [0, 1])
@pytest.mark.parametrize("rollouts", ["greedy", "sampled"])
def test_the_reinforce_step_is_that_of_the_original(model_path: str, rollouts, baseline):
    """Loss and gradient against a direct computation: (1/M) sum_i w_i sum_t -log pi(y_it) at
    temperature 1.
    """
    rows_B_T, prefix = sample_graphs(GRAPH, 32, 5), GRAPH.prefix_length
    objective = reinforce.Reinforce(GRAPH.target_length, rollouts, baseline, seed=3)
    with ServiceClient(TORCH) as service:
        client = service.create_training_client(model_path)
        sampler = client.save_weights_and_get_sampling_client()
        prompts = [ModelInput.from_ints(row[:prefix]) for row in rows_B_T.tolist()]
        drawn = [sampler.sample(prompt, 1, objective.params(prompt.to_ints())).result() for prompt in prompts]
        paths_B_L = np.array([response.sequences[0].tokens for response in drawn])
        # what an untrained model writes counts as right on ten of the prompts
        rows_B_T[:10, prefix:] = paths_B_L[:10]
        batch_D = [supervised_datum(row_T, LAYOUT) for row_T in rows_B_T]
        [(_, future)] = asyncio.run(objective.passes(client, batch_D))
        output = future.result()
        grads = {name: p.grad.clone() for name, p in trainer_of(client).named_trainable.items() if p.grad is not None}
    greedy_B = logits_of(model_path, rows_B_T[:, :prefix])[:, -1].argmax(-1).numpy()
    assert (rollouts == "greedy") == bool((greedy_B == paths_B_L[:, 0]).all())
    right_B = np.arange(32) < 10
    weights_B = np.where(right_B, 1.0, -0.1) if baseline == 0 else right_B - 10 / 32
    model = load_model(model_path, 0, torch.device("cpu"), torch.float32)
    tokens_B_T = torch.from_numpy(np.concatenate([rows_B_T[:, :prefix], paths_B_L], axis=1))
    logprobs_B_L_V = model(tokens_B_T).logits.log_softmax(-1)[:, prefix - 1 : -1]
    nll_B = -logprobs_B_L_V.gather(-1, torch.from_numpy(paths_B_L)[..., None])[..., 0].sum(1).double()
    loss = (torch.from_numpy(weights_B) * nll_B).mean()
    loss.backward()
    assert objective.metrics(batch_D, [output]) == {
        "reward": 10 / 32,
        "reinforce_loss": pytest.approx(loss.item(), abs=1e-6),
    }
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.allclose(grads[name], parameter.grad, atol=1e-6), name


# Trap: rollouts of a resumed REINFORCE run being others.
def test_reinforce_stopped_and_resumed_is_the_uninterrupted_run(model_path: str, tmp_path: Path):
    def run(folder: str, steps: int) -> None:
        config = reinforce.Config(
            dataset=StarGraphExamplesBuilder(num_nodes=8, num_test=20, batch_size=16, n_batches=4),
            model_name=model_path,
            rollouts="sampled",
            baseline=0,
            max_steps=steps,
            eval_every=2,
            log_path=str(tmp_path / folder),
            behavior_if_log_dir_exists="resume",
        )
        asyncio.run(reinforce.main(config))

    run("whole", 4)
    run("parts", 2)
    run("parts", 4)
    weights = [
        load_file(tmp_path / folder / "checkpoints" / "final" / "model.safetensors") for folder in ("whole", "parts")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    losses = [
        [record["reinforce_loss"] for record in read_metrics(tmp_path / folder)[:4]] for folder in ("whole", "parts")
    ]
    assert losses[0] == losses[1] and len(set(losses[0])) == 4


# --- pairs and preferences ----------------------------------------------------------------------


def test_pairs_are_written_as_the_original_writes_them(model_path: str, tmp_path: Path):
    graph = StarGraph(1, 2, 8)
    layout, path = numeral_layout(graph), tmp_path / "pairs.jsonl"
    rows_B_T = sample_graphs(graph, 400, 7)
    with ServiceClient(TORCH) as service:
        sampler = service.create_sampling_client(model_path)
        count = asyncio.run(collect_pairs(sampler, rows_B_T, layout, path, max_tries=2))
    records = read_jsonl(path)
    assert len(records) == count > 390 and [r["global_idx"] for r in records] == sorted(
        {r["global_idx"] for r in records}
    )
    # some prompt was answered rightly at first
    assert {record["n_try"] for record in records} == {0, 1}
    for record in records:
        row, prefix = rows_B_T[record["global_idx"]].tolist(), graph.prefix_length
        wrong = record["y_pred_reject"][prefix:]
        assert list(record) == [
            "x",
            "y_pred_chosen",
            "y_pred_chosen_correct",
            "y_pred_chosen_completely_correct",
            "n_try",
            "y_pred_reject",
            "y_pred_reject_correct",
            "y_pred_reject_completely_correct",
            "global_idx",
        ]
        assert (record["x"], record["y_pred_chosen"], record["y_pred_reject"][:prefix]) == (
            row[:prefix],
            row,
            row[:prefix],
        )
        assert wrong != row[prefix:] and record["y_pred_reject_correct"] == [
            float(a == b) for a, b in zip(wrong, row[prefix:], strict=True)
        ]
        assert (record["y_pred_chosen_correct"], record["y_pred_chosen_completely_correct"]) == ([1.0, 1.0], 1.0)
        assert record["y_pred_reject_completely_correct"] == 0.0


def pair_line(graph: StarGraph, chosen: list[int], rejected: list[int]) -> str:
    return json.dumps({"x": chosen[: graph.prefix_length], "y_pred_chosen": chosen, "y_pred_reject": rejected})


def test_pairs_are_read_and_bad_ones_named(tmp_path: Path, capsys):
    path = tmp_path / "deg_2_path_3_nodes_8_20k_test.jsonl"
    row, other = (sample_graphs(GRAPH, 1, seed)[0].tolist() for seed in (0, 1))
    wrong = [*row[:-2], row[-1], row[-1]]
    path.write_text("\n".join([pair_line(GRAPH, row, wrong), pair_line(GRAPH, row, [*wrong, 3])]))
    (pair,) = read_pairs(path, LAYOUT)
    assert "1 pairs dropped" in capsys.readouterr().out
    for datum, tokens in ((pair.chosen, row), (pair.rejected, wrong)):
        assert (
            datum.model_input.to_ints() == tokens[:-1] and datum.loss_fn_inputs["target_tokens"].tolist() == tokens[1:]
        )
    logprobs_D = [torch.arange(17.0), torch.ones(17)]
    assert sequence_logprobs(as_data([pair]), logprobs_D).tolist() == [14 + 15 + 16, 3]
    for bad, what in (
        ("{", "not JSON"),
        ("{}", "not a pair"),
        (pair_line(GRAPH, row[:-1], wrong), "17 tokens; G.2,3. has 18"),
        (pair_line(GRAPH, row, [*other[:15], *wrong[15:]]), "must differ and follow the same prefix"),
        (pair_line(GRAPH, row, row), "must differ"),
    ):
        path.write_text(pair_line(GRAPH, row, wrong) + "\n" + bad)
        with pytest.raises(DataError, match=f"line 2: .*{what}"):
            read_pairs(path, LAYOUT)


@pytest.mark.parametrize("method", [DPO(), RPO()], ids=["dpo", "rpo"])
def test_preferences_start_from_ln_2_and_hold_up_the_right_path_under_rpo(model_path: str, tmp_path: Path, method):
    config = preferences.Config(
        task=StarGraphTask(num_nodes=8, num_test=20),
        method=method,
        model_name=model_path,
        num_prompts=64,
        batch_size=64,
        max_steps=4,
        learning_rate=3e-3,
        eval_every=2,
        save_every=0,
        log_path=str(tmp_path / "run"),
    )
    asyncio.run(preferences.main(config))
    records = read_metrics(tmp_path / "run")
    first, last = records[0], records[3]
    right = -first["chosen_logprob"] if isinstance(method, RPO) else 0.0
    assert first["dpo_loss"] == pytest.approx(np.log(2) + right, abs=1e-5)
    assert last["margin"] > 0 and [r["step"] for r in records if "test/first_hop" in r] == [0, 2, 4]
    if isinstance(method, RPO):
        assert last["chosen_logprob"] > first["chosen_logprob"] + 0.05


# --- models and runs ----------------------------------------------------------------------------


def test_models_of_other_graphs_are_refused(model_path: str, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"trained on G\(2,3\) over 8 nodes, not on G\(2,3\) over 12"):
        check_model(model_path, StarGraph(2, 3, 12))
    with pytest.raises(CheckpointError, match="no config.json"):
        check_model(tmp_path, GRAPH)
    config = reinforce.Config(
        dataset=StarGraphExamplesBuilder(path_length=4, num_nodes=8),
        model_name=model_path,
        log_path=str(tmp_path / "run"),
    )
    with pytest.raises(CheckpointError, match=r"not on G\(2,4\)"):
        asyncio.run(reinforce.main(config))
    with pytest.raises(ConfigError, match="starts from a trained policy"):
        asyncio.run(reinforce.main(reinforce.Config()))
    assert not (tmp_path / "run").exists()


def test_methods_bring_what_they_start_from_and_wait_for_it(tmp_path: Path):
    config = train.Config(methods="guided,rpo", seeds=[3], log_path=str(tmp_path))
    methods = train.chosen_methods(config)
    assert methods == ["gpt", "bst", "rpo", "guided"]
    stages = train.stages_of(config, 3)
    assert {"seed_3/model", "seed_3/gpt", "seed_3/bst"} < stages["guided"].made_with().keys()
    assert {"seed_3/gpt", "seed_3/pairs"} < stages["rpo"].made_with().keys()
    assert stages["rpo"].settings.model_name == str(tmp_path / "seed_3" / "gpt" / "checkpoints" / "final")
    assert train.chosen_methods(chz.replace(config, methods="guided", classifier_trunk="scratch")) == ["gpt", "guided"]
    with pytest.raises(ConfigError, match="methods=gtp: no such method"):
        asyncio.run(train.main(chz.replace(config, methods="gtp")))
    with pytest.raises(ConfigError, match="seeds=: give different whole numbers"):
        asyncio.run(train.main(chz.replace(config, seeds=[])))


# Trap: a finished run repeated.
def test_runs_side_by_side_wait_fail_and_are_not_run_twice(tmp_path: Path, capfd):
    def stage(name: str, steps: int, *needs: Stage) -> Stage:
        """Writes metrics; 0 steps stands for a bad option."""
        lines = [
            json.dumps({"step": step, "test/first_hop": 0.5, "test/exact": step / 10}) + "\n" for step in range(steps)
        ]
        (tmp_path / name).mkdir(exist_ok=True)
        write = partial(Path.write_text, tmp_path / name / "metrics.jsonl", "".join(lines))
        make = write if steps else partial(StarGraph, 5, 5, 20)
        return Stage(name, tmp_path / name, {"steps": steps}, make, needs, "metrics.jsonl")

    early, bad = stage("early", 3), stage("bad", 0)
    late, lost = stage("late", 2, early), stage("lost", 1, bad)
    with pytest.raises(RunFailed, match=r"bad: G\(5,5\) has 21 nodes.*; lost: waited for bad"):
        asyncio.run(run_side_by_side({late: 2, early: 3, bad: 0, lost: 1}, 2))
    assert [each.is_finished() for each in (late, early, bad, lost)] == [True, True, False, False]
    written = (tmp_path / "early" / "metrics.jsonl").stat().st_mtime_ns
    asyncio.run(run_side_by_side({late: 2, early: 3}, 2))
    assert (
        tmp_path / "early" / "metrics.jsonl"
    ).stat().st_mtime_ns == written and "early: has finished before" in capfd.readouterr().out
    with pytest.raises(ConfigError, match=r"was made with early.steps=3 \(now 4\)"):
        asyncio.run(run_side_by_side({stage("early", 4): 4}, 2))
    runs = [
        [{"step": 0, "test/first_hop": 0.1, "test/exact": 0}, {"step": 9, "test/first_hop": hop, "test/exact": path}]
        for hop, path in ((0.4, 0.4), (0.6, 0.5))
    ]
    assert train.table({"gpt": runs}).splitlines()[1].split() == ["gpt", "9", "0.500", "0.450", "0.400", "0.600"]
