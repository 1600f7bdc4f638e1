"""Two sampler replicas in processes of Ray: the loop unchanged, weights that are the trainer's, the
same tokens after a kill.
"""

# Trap: a replica without weights that answers; a tied head or an adapter lost on the way.

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import chz
import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import EngineError, StaleSamplerError
from posttrain.backend.models import PRESETS
from posttrain.backend.sampler_pool import SamplerPool
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams
from rl import train
from tests.conftest import policy_data, rounded
from tests.processes import actors, wait_until
from tests.test_group_sources import config, metrics

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.usefixtures("cluster"),
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"),
]
BACKEND = BackendConfig(engine="torch", sampler_replicas=2, max_num_seqs=4)
PROMPTS = [ModelInput.from_ints([1, 5 + number, 7, 9]) for number in range(24)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    with ServiceClient(BACKEND, tmp_path_factory.mktemp("replicas")) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: ServiceClient) -> TrainingClient:
    return service.create_training_client("micro")


def untied(folder: Path) -> str:
    settings: dict[str, Any] = PRESETS["micro"].to_dict() | {"tie_word_embeddings": False}
    hf_config = type(PRESETS["micro"])(**settings)
    AutoModelForCausalLM.from_config(hf_config).save_pretrained(folder)
    load_tokenizer("micro").save_pretrained(folder)
    return str(folder)


def sampled(sampler: SamplingClient, max_tokens: int = 12) -> list[list[int]]:
    params = SamplingParams(max_tokens=max_tokens, seed=3)
    answers = [sampler.sample(prompt, 2, params) for prompt in PROMPTS]
    return [sequence.tokens for answer in answers for sequence in answer.result(300).sequences]


def gap(client: TrainingClient, sampler: SamplingClient) -> float:
    """The largest difference of a logprob between sampler and trainer."""
    params = SamplingParams(max_tokens=12, seed=3)
    responses = [sampler.sample(prompt, 1, params) for prompt in PROMPTS[:8]]
    largest = 0.0
    for prompt, response in zip(PROMPTS, responses, strict=False):
        sequence = response.result(300).sequences[0]
        tokens = prompt.to_ints() + sequence.tokens
        inputs = {"target_tokens": np.array(tokens[1:]), "weights": np.ones(len(tokens) - 1, np.float32)}
        output = client.forward([Datum(ModelInput.from_ints(tokens[:-1]), inputs)], "cross_entropy").result()
        logprobs = np.asarray(output.loss_fn_outputs[0]["logprobs"].data)[prompt.length - 1 :]
        largest = max(largest, float(np.abs(logprobs - np.array(sequence.logprobs)).max()))
    return largest


def step(client: TrainingClient) -> None:
    client.forward_backward(policy_data(4), "importance_sampling")
    client.optim_step(AdamParams(1e-2)).result()


def pool_of(client: TrainingClient) -> SamplerPool:
    assert isinstance(client._engine, SamplerPool)
    return client._engine


def num_serving(pool: SamplerPool) -> int:
    return sum(place.serving for place in pool._places)


def test_versions_follow_the_trainer(client: TrainingClient) -> None:
    kept = client.save_weights_and_get_sampling_client()
    stale = client.save_weights_and_get_sampling_client(keep=False)
    live = client.save_weights_and_get_sampling_client(follow=True)
    before = sampled(kept)
    assert gap(client, kept) < rounded(1e-5)
    step(client)
    newest = client.save_weights_and_get_sampling_client()
    assert gap(client, newest) < rounded(1e-5) and gap(client, live) < rounded(1e-5)
    with pytest.raises(StaleSamplerError):
        stale.sample(PROMPTS[0], 1, SamplingParams(max_tokens=2)).result(300)
    assert sampled(kept) == before != sampled(newest)  # a snapshot is loaded from its files
    assert pool_of(client).deaths == 0 and num_serving(pool_of(client)) == 2


def test_a_snapshot_answers_while_new_weights_are_loaded(client: TrainingClient) -> None:
    """One replica has them, and the policy's newest version is still the snapshot's."""
    snapshot, pool = client.save_weights_and_get_sampling_client(), pool_of(client)
    before = sampled(snapshot)
    step(client)
    os.kill(late := actors("SamplerActor")[0], signal.SIGSTOP)
    asked = {place.replica.progress(): place.replica for place in pool._places if place.replica}
    (runs, *_), _ = wait(asked, return_when=FIRST_COMPLETED)
    with ThreadPoolExecutor() as thread:
        newest = thread.submit(client.save_weights_and_get_sampling_client)
        wait_until(lambda: asked[runs].progress().result(300) > runs.result())
        answers = [snapshot.sample(prompt, 2, SamplingParams(max_tokens=12, seed=3)) for prompt in PROMPTS]
        os.kill(late, signal.SIGCONT)
        assert [sequence.tokens for answer in answers for sequence in answer.result(300).sequences] == before
        assert gap(client, newest.result(300)) < rounded(1e-5)


def test_a_replica_killed_in_a_batch_changes_no_token(client: TrainingClient) -> None:
    sampler, pool = client.save_weights_and_get_sampling_client(), pool_of(client)
    before, deaths = sampled(sampler, 40), pool.deaths
    params = SamplingParams(max_tokens=40, seed=3)
    answers = [sampler.sample(prompt, 2, params) for prompt in PROMPTS]
    for answer in answers[: len(answers) * 2 // 5]:
        answer.result(300)
    os.kill(actors("SamplerActor")[0], signal.SIGKILL)
    assert [sequence.tokens for answer in answers for sequence in answer.result(300).sequences] == before
    wait_until(lambda: num_serving(pool) == 2 and pool.deaths > deaths, 300)
    # the replacement has weights that nobody has published again
    assert sampled(sampler, 40) == before and pool.deaths == deaths + 1


def test_a_replica_that_stands_still_is_killed(client: TrainingClient) -> None:
    sampler, pool = client.save_weights_and_get_sampling_client(), pool_of(client)
    before, deaths = sampled(sampler), pool.deaths
    os.kill(actors("SamplerActor")[0], signal.SIGSTOP)
    asked = {place.replica.progress(): place for place in pool._places if place.replica}
    (runs, *_), _ = wait(asked, return_when=FIRST_COMPLETED)
    (stopped,) = (place for pulse, place in asked.items() if pulse is not runs)
    answers = [sampler.sample(prompt, 2, SamplingParams(max_tokens=12, seed=3)) for prompt in PROMPTS]
    while pool.deaths == deaths:
        stopped.moved = time.monotonic() - pool._call_seconds - 1  # long ago; of it alone: the other may be slow
        pool._todo.put(None)  # looks now
        time.sleep(0.1)
    assert [sequence.tokens for answer in answers for sequence in answer.result(300).sequences] == before
    wait_until(lambda: num_serving(pool) == 2, 300)  # the replacement is no replica of the next test
    assert pool.deaths == deaths + 1


def test_shards_of_an_adapter_and_of_an_untied_head_reach_the_replicas(tmp_path: Path) -> None:
    with ServiceClient(chz.replace(BACKEND, sampler_replicas=1, trainer_processes=2), tmp_path) as service:
        adapter = service.create_training_client("micro", LoraConfig(rank=4))
        for client in (adapter, service.create_training_client(untied(tmp_path / "model"))):
            assert gap(client, client.save_weights_and_get_sampling_client()) < rounded(1e-5)
            step(client)
            assert gap(client, client.save_weights_and_get_sampling_client()) < rounded(1e-5)


def test_without_replicas_the_run_ends_and_its_checkpoint_stands(tmp_path: Path) -> None:
    with ServiceClient(chz.replace(BACKEND, sampler_restarts=0, sampler_replicas=1), tmp_path) as service:
        client = service.create_training_client("micro")
        path, others = client.save_state("before").result().path, set(actors("SamplerActor"))
        sampler = client.save_weights_and_get_sampling_client()
        (pid,) = set(actors("SamplerActor")) - others
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="the sampler replicas have stopped"):
            sampler.sample(PROMPTS[0], 1, SamplingParams(max_tokens=2)).result(300)
        with pytest.raises(EngineError):
            client.save_weights_and_get_sampling_client()
            step(client)
            client.save_weights_and_get_sampling_client()
        assert service.create_training_client_from_state(path).get_info()


def test_the_rl_loop_on_ranks_and_replicas(tmp_path: Path) -> None:
    backend = BackendConfig(engine="torch", trainer_processes=2, sampler_replicas=2)
    settings = config(tmp_path, backend=backend, model_name="micro", max_steps=3, eval_every=0, max_steps_off_policy=1)
    asyncio.run(train.main(settings))
    rows = [row for row in metrics(tmp_path) if "optim/logprob_gap_mean" in row]
    assert len(rows) == 3 and max(row["optim/logprob_gap_mean"] for row in rows[:1]) < rounded(1e-5)
    for row in rows:
        assert 0 < row["time/sync_publish"] + row["time/sync_load"] <= row["time/sync"]
        assert 0 < row["time/sync_pause"] <= row["time/sync_load"] and row["optim/probe_logprob_gap"] < rounded(1e-5)
        for number in range(2):
            assert 0 < row[f"processes/rank_{number}/idle"] < 1
            assert 0 <= row[f"processes/replica_{number}/idle"] < 1
        tokens = sum(row[f"processes/replica_{number}/tokens_per_second"] for number in range(2))
        assert tokens > 0
    assert (tmp_path / "plots" / "timeline.png").exists()
