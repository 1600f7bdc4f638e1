"""Runs in the Tinker SDK's own Python, against a server: `python sdk_checks.py CHECK ...` prints a
line per check, "CHECK ok" or "CHECK: why not". test_serve_sdk.py starts it.
"""

import asyncio
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

warnings.simplefilter("ignore")
import tinker  # noqa: E402  # pyright: ignore[reportMissingImports]
from tinker import types  # noqa: E402  # pyright: ignore[reportMissingImports]

BASE = os.environ.get("CHECK_MODEL", "m")
TOKENS = [10, 20, 30, 40, 50, 60, 70, 80]
ADAM = types.AdamParams(learning_rate=0.01)


def service() -> Any:
    return tinker.ServiceClient()


def model(rank: int = 4, seed: int = 1, of: Any = None) -> Any:
    return (of or service()).create_lora_training_client(base_model=BASE, rank=rank, seed=seed)


def datum(tokens: Any = TOKENS, **inputs: Any) -> Any:
    inputs = inputs or {"weights": np.ones(len(tokens) - 1, np.float32)}
    inputs = {"target_tokens": np.array(tokens[1:], np.int64), **inputs}
    tensors = {name: types.TensorData.from_numpy(np.asarray(value)) for name, value in inputs.items()}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=tensors)


def logprobs(client: Any, data: list[Any], index: int = 0) -> np.ndarray:
    output = client.forward(data, "cross_entropy").result()
    return output.loss_fn_outputs[index]["logprobs"].to_numpy()


def step(client: Any, data: list[Any], loss: str = "cross_entropy", config: Any = None) -> float:
    done = client.forward_backward(data, loss, config)
    moved = client.optim_step(ADAM)
    moved.result()
    return done.result().metrics["loss:sum"]


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return str(error)
    raise AssertionError("no error")


def prompt(tokens: list[int] = TOKENS) -> Any:
    return types.ModelInput.from_ints(tokens)


# --- the checks ----------------------------------------------------------------------------------


def capabilities() -> None:
    found = service().get_server_capabilities().supported_models
    assert [entry.model_name for entry in found] == [BASE], found
    client = model(rank=3)
    info = client.get_info()
    assert (info.is_lora, info.lora_rank, info.model_data.model_name) == (True, 3, BASE), info
    assert client.get_tokenizer().decode(client.get_tokenizer().encode("abc")) == "abc"


def supervised() -> None:
    client, weights = model(), np.linspace(0, 1, 7, dtype=np.float32)
    data = [datum(weights=weights)]
    p = logprobs(client, data)
    losses = [step(client, data) for _ in range(6)]
    np.testing.assert_allclose(losses[0], -(weights * p).sum(), rtol=1e-5)
    assert losses[-1] < losses[0] / 2, losses
    assert p[0] != 0  # Trap: a logprob is wanted at weight 0, too


def pipelined() -> None:
    """Five steps submitted together equal five awaited ones, and two half batches one whole."""
    data = [datum(), datum(TOKENS[::-1])]
    one, two = model(), model()
    futures = [
        future for _ in range(5) for future in (one.forward_backward(data, "cross_entropy"), one.optim_step(ADAM))
    ]
    for future in futures:
        future.result()
    for _ in range(5):
        two.forward_backward(data, "cross_entropy").result()
        two.optim_step(ADAM).result()
    assert np.array_equal(logprobs(one, data), logprobs(two, data))


def many_data() -> None:
    """More data than one request takes: the SDK cuts them, and sends the first part last."""
    client, rng = model(), np.random.default_rng(0)
    data = [datum(rng.integers(4, 200, size=3).tolist()) for _ in range(1100)]
    output = client.forward_backward(data, "cross_entropy").result()
    assert len(output.loss_fn_outputs) == 1100
    for d in (0, 1023, 1024, 1099):
        np.testing.assert_allclose(
            output.loss_fn_outputs[d]["logprobs"].to_numpy(), logprobs(client, [data[d]]), atol=1e-4
        )
    assert client.optim_step(ADAM).result().metrics["grad_norm"] > 0


def losses() -> None:
    """Each policy loss by its formula."""
    client = model()
    p = logprobs(client, [datum()]).astype(np.float64)
    q, a = p + np.linspace(-0.5, 0.5, 7), np.array([1, -1, 2, -2, 1, -1, 0.5])
    r = np.exp(p - q)
    inputs = {"logprobs": q.astype(np.float32), "advantages": a.astype(np.float32)}
    expected = {
        ("importance_sampling", None): -(r * a).sum(),
        ("ppo", None): -np.minimum(r * a, r.clip(0.8, 1.2) * a).sum(),
        ("ppo", (("clip_low_threshold", 0.9), ("clip_high_threshold", 1.1))): -np.minimum(
            r * a, r.clip(0.9, 1.1) * a
        ).sum(),
        ("cispo", (("clip_low_threshold", 0.8), ("clip_high_threshold", 1.2))): -(r.clip(0.8, 1.2) * p * a).sum(),
        ("dro", (("beta", 0.1),)): -(p * a - 0.05 * (p - q) ** 2).sum(),
    }
    for (name, config), value in expected.items():
        got = client.forward([datum(**inputs)], name, dict(config) if config else None).result().metrics["loss:sum"]
        np.testing.assert_allclose(got, value, rtol=1e-4, err_msg=name)
    low, high = np.linspace(0.7, 0.9, 7), np.linspace(1.1, 1.3, 7)
    thresholds = {"clip_low_threshold": low.astype(np.float32), "clip_high_threshold": high.astype(np.float32)}
    got = client.forward([datum(**inputs, **thresholds)], "ppo").result().metrics["loss:sum"]
    np.testing.assert_allclose(got, -np.minimum(r * a, r.clip(low, high) * a).sum(), rtol=1e-4)
    mask = np.array([0, 1, 1, 0, 1, 1, 0], np.float32)
    s = np.exp((p - q)[mask > 0].mean())
    got = client.forward([datum(**inputs, sequence_ratio_mask=mask)], "gspo").result().metrics["loss:sum"]
    np.testing.assert_allclose(got, -np.minimum(s * a, s.clip(0.8, 1.2) * a).sum(), rtol=1e-4)
    assert "importance_sampling" in error_of(lambda: client.forward([datum(**inputs)], "stable_reinforce").result())


def reinforced() -> None:
    """What is paid rises, under each loss."""
    for name, config in (("importance_sampling", None), ("ppo", None), ("cispo", None), ("dro", {"beta": 0.05})):
        client = model()
        q = logprobs(client, [datum()])
        data = [datum(logprobs=q, advantages=np.ones(7, np.float32))]
        step(client, data, name, config)
        assert logprobs(client, [datum()]).sum() > q.sum(), name


def custom_loss() -> None:
    """A custom loss moves the weights as the loss it repeats, and returns its metrics."""
    one, two, data = model(), model(), [datum()]

    def loss(data: list[Any], logprobs_D: list[Any]) -> Any:
        total: Any = -sum(p.sum() for p in logprobs_D)
        return total, {"mine": float(total.detach())}

    output = one.forward_backward_custom(data, loss).result()
    one.optim_step(ADAM).result()
    np.testing.assert_allclose(output.metrics["mine"], step(two, data), rtol=1e-5)
    np.testing.assert_allclose(logprobs(one, data), logprobs(two, data), atol=1e-5)


def checkpoints() -> None:
    """Continuing with the optimizer equals never having stopped; with weights only it does not."""
    client, data = model(), [datum()]
    for _ in range(3):
        step(client, data)
    path = client.save_state("three").result().path
    saved = logprobs(client, data)
    for _ in range(2):
        step(client, data)
    after = logprobs(client, data)
    other = service().create_training_client_from_state_with_optimizer(path)
    assert np.array_equal(logprobs(other, data), saved)
    for _ in range(2):
        step(other, data)
    assert np.array_equal(logprobs(other, data), after)
    fresh = service().create_training_client_from_state(path)
    for _ in range(2):
        step(fresh, data)
    assert not np.array_equal(logprobs(fresh, data), after)
    client.load_state_with_optimizer(path).result()
    assert np.array_equal(logprobs(client, data), saved)
    started = time.monotonic()
    assert "exists" in error_of(lambda: client.save_state("three").result())
    assert time.monotonic() - started < 200  # Trap: 409 would be tried again for five minutes
    assert "checkpoint name" in error_of(lambda: client.save_state("../up").result())
    sampler = client.save_weights_for_sampler("three").result().path
    assert "sampler weights" in error_of(lambda: service().create_training_client_from_state(sampler).get_info())


def samplers() -> None:
    """Samplers by path and by snapshot keep their weights, and equal their trainer."""
    of = service()
    client = model(of=of)
    base = of.create_sampling_client(base_model=BASE)
    before = base.compute_logprobs(prompt()).result()
    np.testing.assert_allclose(before[1:], logprobs(client, [datum()]), atol=1e-4)  # a fresh adapter
    step(client, [datum()])
    snapshot = client.save_weights_and_get_sampling_client()
    path = client.save_weights_for_sampler("s").result().path
    p = logprobs(client, [datum()])
    for _ in range(3):
        step(client, [datum()])
    for sampler in (snapshot, of.create_sampling_client(model_path=path), client.create_sampling_client(path)):
        np.testing.assert_allclose(sampler.compute_logprobs(prompt()).result()[1:], p, atol=1e-4)
    assert base.compute_logprobs(prompt()).result() == before
    assert "there is no checkpoint" in error_of(
        lambda: of.create_sampling_client(model_path=path + "x").compute_logprobs(prompt())
    )


def sampling() -> None:
    sampler = service().create_sampling_client(base_model=BASE)
    params = types.SamplingParams(max_tokens=5, seed=3, temperature=1.0, stop=[])
    one, two = (sampler.sample(prompt(), 4, params).result().sequences for _ in range(2))
    assert [s.tokens for s in one] == [s.tokens for s in two]
    assert len({tuple(s.tokens) for s in one}) > 1
    assert all(len(s.tokens) == 5 and s.stop_reason == "length" for s in one)
    whole = sampler.compute_logprobs(prompt([*TOKENS, *one[0].tokens])).result()
    np.testing.assert_allclose(whole[len(TOKENS) :], one[0].logprobs, atol=1e-4)
    greedy = sampler.sample(prompt(), 1, types.SamplingParams(max_tokens=1, temperature=0.0)).result().sequences[0]
    asked = sampler.sample(
        prompt(), 1, types.SamplingParams(max_tokens=1), include_prompt_logprobs=True, topk_prompt_logprobs=3
    ).result()
    assert asked.prompt_logprobs[0] is None and len(asked.prompt_logprobs) == len(TOKENS)
    topk = asked.topk_prompt_logprobs
    assert topk[0] is None or not topk[0] or topk[0][0][1] < -9999
    assert all(len(row) == 3 and row[0][1] >= row[1][1] >= row[2][1] for row in topk[1:]), topk
    stop = types.SamplingParams(max_tokens=20, seed=3, stop=[one[0].tokens[2]])
    stopped = sampler.sample(prompt(), 1, stop).result().sequences[0]
    assert stopped.tokens == one[0].tokens[:3] and stopped.stop_reason == "stop"
    assert (
        greedy.tokens
        == sampler.sample(prompt(), 1, types.SamplingParams(max_tokens=1, temperature=1.0, top_k=1))
        .result()
        .sequences[0]
        .tokens
    )
    assert "context" in error_of(lambda: sampler.sample(prompt([5] * 5000), 1, params).result())
    assert "vocabulary" in error_of(lambda: sampler.sample(prompt([5000]), 1, params).result())


def topk_samples() -> None:
    sampler = service().create_sampling_client(base_model=BASE)
    params = types.SamplingParams(max_tokens=4, seed=3, stop=[])
    sequence = sampler.sample(prompt(), 1, params, topk_sample_logprobs=3).result().sequences[0]
    rows = sequence.topk_logprobs
    assert len(rows) == 4 and all(len(row) == 3 and row[0][1] >= row[2][1] for row in rows), rows
    for token, logprob, row in zip(sequence.tokens, sequence.logprobs, rows, strict=True):
        assert token not in dict(row) or abs(dict(row)[token] - logprob) < 1e-5


def last_n() -> None:
    sampler = service().create_sampling_client(base_model=BASE)
    params = types.SamplingParams(max_tokens=1)
    whole = sampler.compute_logprobs(prompt()).result()
    part = sampler.sample(prompt(), 1, params, include_prompt_logprobs=True, prompt_logprobs_last_n=2).result()
    assert part.prompt_logprobs[:6] == [None] * 6 and part.prompt_logprobs[6:] == whole[6:], part.prompt_logprobs


def other_tokens() -> None:
    """target_prompt_logprobs, dense and sparse, and prompt_alt_tokens_k."""
    sampler = service().create_sampling_client(base_model=BASE)
    params = types.SamplingParams(max_tokens=1, seed=5)
    ids = np.full((len(TOKENS) - 1, 200), -1, np.int64)
    ids[:, 0], ids[3, 7] = TOKENS[1:], 99
    import torch  # the SDK makes sparse tensors of torch's

    dense = types.TensorData.from_numpy(ids)
    sparse = types.TensorData.from_torch_sparse(torch.from_numpy(ids), pad_value=-1)
    assert sparse.sparse_crow_indices is not None
    answers = [
        sampler.sample(prompt(), 1, params, True, target_prompt_logprobs=targets, prompt_alt_tokens_k=4).result()
        for targets in (dense, sparse)
    ]
    for answer in answers:
        scored = answer.target_prompt_logprobs.to_torch()
        scored = (scored.to_dense() if scored.is_sparse_csr else scored).numpy()
        np.testing.assert_allclose(scored[:, 0], answer.prompt_logprobs[1:], atol=1e-5)
        assert scored[3, 7] < 0 and not scored[4:, 1:].any()
        drawn = answer.prompt_alt_tokens
        assert list(drawn.tokens.shape) == list(drawn.logprobs.shape) == [len(TOKENS) - 1, 4]
        # what was drawn has the logprob that it has as a target
        again = sampler.sample(prompt(), 1, params, target_prompt_logprobs=drawn.tokens).result()
        np.testing.assert_allclose(again.target_prompt_logprobs.to_numpy(), drawn.logprobs.to_numpy(), atol=1e-5)


def pickled() -> None:
    """A sampling client in another process answers as here, and its numbers are its own."""
    sampler = service().create_sampling_client(base_model=BASE)
    params = types.SamplingParams(max_tokens=5, seed=3, stop=[])
    here = sampler.sample(prompt(), 1, params).result().sequences[0].tokens
    script = (
        "import json, pickle, sys; from tinker import types\n"
        "sampler = pickle.load(sys.stdin.buffer)\n"
        f"params = types.SamplingParams(max_tokens=5, seed=3, stop=[])\n"
        f"answer = sampler.sample(types.ModelInput.from_ints({TOKENS}), 1, params).result()\n"
        "print(json.dumps([sampler._cloned_sampler_id, answer.sequences[0].tokens]))"
    )
    copy = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(sampler), stdout=subprocess.PIPE)
    number, there = json.loads(copy.stdout.splitlines()[-1])
    assert (number, there) == (1, here)


def abandoned() -> None:
    """A sample that nobody waits for any more is cancelled; others go on."""
    sampler = service().create_sampling_client(base_model=BASE)
    long = types.SamplingParams(max_tokens=400, stop=[])

    async def give_up() -> None:
        waits = asyncio.ensure_future(sampler.sample_async(prompt(), 64, long))
        await asyncio.sleep(1)
        waits.cancel()

    asyncio.run(give_up())
    assert sampler.sample(prompt(), 1, types.SamplingParams(max_tokens=1)).result().sequences


def sessions() -> None:
    """A session is listed while it lasts, and frees its models at its end."""
    reader = service().create_rest_client()
    with tinker.ServiceClient() as of:
        client = model(of=of)
        model_id = client.get_info().model_id
        session = model_id.split(":")[0]
        client.save_weights_and_get_sampling_client().compute_logprobs(prompt()).result()
        found = reader.get_session(session).result()
        assert found.training_run_ids == [model_id] and len(found.sampler_ids) == 1, found
        assert session in reader.list_sessions(limit=1000).result().sessions
    assert session not in reader.list_sessions(limit=1000).result().sessions
    assert "no session" in error_of(lambda: reader.get_session(session).result())


def command_line() -> None:
    """The SDK's own command lists, downloads and deletes checkpoints."""
    path = model().save_state("cli").result().path

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "tinker.cli", *arguments], capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, (arguments, done.stdout[-500:], done.stderr[-1500:])
        return done.stdout

    assert path in run("--format", "json", "checkpoint", "list")
    with tempfile.TemporaryDirectory() as folder:
        run("checkpoint", "download", path, "--output", folder)
        names = {name for _, _, names in os.walk(folder) for name in names}
    assert "adapter_model.safetensors" in names and not any("optimizer" in name for name in names), names
    run("checkpoint", "delete", "--yes", path)
    left = [c.tinker_path for c in service().create_rest_client().list_user_checkpoints().result().checkpoints]
    assert not [other for other in left if path.split("/")[2] in other], left  # the export has gone, too


def external() -> None:
    client = model()
    path = client.save_weights_external("out").result().path
    urls = service().create_rest_client().get_external_weights_urls(path).result().urls
    assert "adapter_model.safetensors" in urls, urls
    assert "age-keygen" in error_of(lambda: client.save_weights_external("x", None, ["age1"]).result())
    assert "no endpoint" in error_of(lambda: service().create_rest_client().copy_weights(path, "project").result())


def sampled_while_training() -> None:
    """Sampling goes on during training, from weights that stay."""
    client = model()
    sampler = client.save_weights_and_get_sampling_client()
    params = types.SamplingParams(max_tokens=8, seed=2, stop=[])
    before = sampler.sample(prompt(), 4, params).result().sequences
    steps = [
        future
        for _ in range(10)
        for future in (client.forward_backward([datum()] * 8, "cross_entropy"), client.optim_step(ADAM))
    ]
    during = [sampler.sample(prompt(), 4, params) for _ in range(10)]
    for answer in during:
        assert [s.tokens for s in answer.result().sequences] == [s.tokens for s in before]
    for future in steps:
        future.result()


def two_hundred_at_once() -> None:
    sampler = service().create_sampling_client(base_model=BASE)
    params = [types.SamplingParams(max_tokens=2, seed=i, stop=[]) for i in range(200)]
    futures = [sampler.sample(prompt(), 1, p) for p in params]
    assert all(len(future.result().sequences[0].tokens) == 2 for future in futures)


def rest() -> None:
    client = service().create_lora_training_client(base_model=BASE, rank=4, user_metadata={"renderer_name": "plain"})
    path = client.save_state("r", ttl_seconds=3600).result().path
    client.save_state("r2").result()
    client.save_state("r2", overwrite=True).result()
    run_id = client.get_info().model_id
    reader = service().create_rest_client()
    run = reader.get_training_run(run_id).result()
    assert (run.base_model, run.lora_rank, run.user_metadata["renderer_name"]) == (BASE, 4, "plain")
    assert run_id in [r.training_run_id for r in reader.list_training_runs(limit=100).result().training_runs]
    listed = {c.checkpoint_id: c for c in reader.list_checkpoints(run_id).result().checkpoints}
    assert {*listed} == {"weights/r", "weights/r2"}
    assert listed["weights/r"].expires_at and not listed["weights/r2"].expires_at
    assert reader.get_weights_info_by_tinker_path(path).result().lora_rank == 4
    reader.set_checkpoint_ttl_from_tinker_path(path, None).result()
    reader.publish_checkpoint_from_tinker_path(path).result()
    again = {c.tinker_path: c for c in reader.list_user_checkpoints().result().checkpoints}[path]
    assert again.expires_at is None and again.public
    reader.delete_checkpoint_from_tinker_path(path).result()
    assert path not in [c.tinker_path for c in reader.list_user_checkpoints().result().checkpoints]
    assert "there is no checkpoint" in error_of(lambda: service().create_training_client_from_state(path).get_info())


def bad_data() -> None:
    """Each is a clear error of its call, and of its step; the client goes on."""
    client = model()
    for data, text in (
        ([datum([5, 6, 5000])], "datum 0"),
        ([datum(), datum(weights=np.ones(3, np.float32))], "datum 1"),
        ([datum(logprobs=np.zeros(7, np.float32))], "weights"),
        ([datum(weights=np.full(7, np.nan, np.float32))], "not finite"),
        ([datum([5] * 600)], "600|599|context"),
    ):
        done, moved = client.forward_backward(data, "cross_entropy"), client.optim_step(ADAM)
        found = error_of(done.result)
        assert any(part in found for part in text.split("|")), (text, found)
        assert error_of(moved.result)
    assert "learning_rate" in error_of(client.optim_step(types.AdamParams(learning_rate=-1.0)).result)
    assert step(client, [datum()]) > 0
    assert "served here" in error_of(
        lambda: service().create_lora_training_client(base_model="unknown", rank=4).get_info()
    )
    assert "rank" in error_of(lambda: model(rank=10_000).get_info())


def concurrent() -> None:
    """Four sessions train adapters of different rank at once, each as alone, each sampler as its
    trainer."""

    def train(rank: int) -> tuple[np.ndarray, list[Any]]:
        client = model(rank, seed=rank)
        for _ in range(4):
            step(client, [datum()])
        sampler = client.save_weights_and_get_sampling_client()
        return logprobs(client, [datum()]), sampler.compute_logprobs(prompt()).result()

    with ThreadPoolExecutor(4) as pool:
        together = [*pool.map(train, (2, 3, 4, 5))]
    for rank, (p, sampled) in zip((2, 3, 4, 5), together, strict=True):
        assert np.array_equal(p, train(rank)[0]), rank
        np.testing.assert_allclose(sampled[1:], p, atol=1e-4)


def several_targets() -> None:
    """(N, K) targets, also of different K in one request."""
    client = model()
    first = datum(target_tokens=np.array([[20, 21]] * 7), weights=np.full((7, 2), 0.5, np.float32))
    second = datum(target_tokens=np.array([[20, 21, 22]] * 7), weights=np.full((7, 3), 0.5, np.float32))
    outputs = client.forward([first, second], "cross_entropy").result().loss_fn_outputs
    assert [output["logprobs"].to_numpy().shape for output in outputs] == [(7, 2), (7, 3)]
    np.testing.assert_allclose(outputs[0]["logprobs"].to_numpy(), outputs[1]["logprobs"].to_numpy()[:, :2], atol=1e-5)


def main(names: list[str]) -> None:
    for name in names:
        started = time.monotonic()
        try:
            globals()[name]()
        except Exception:
            print(f"{name}: {traceback.format_exc()}".replace("\n", "\\n"), flush=True)
        else:
            print(f"{name} ok", flush=True)
        print(f"  {time.monotonic() - started:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
