"""vLLM against the torch sampler and both against the trainer, on the same weights; and the traps
that specs/vllm.md lists.
"""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError, ContextLengthError, DataError, EngineError, StaleSamplerError
from posttrain.backend.ranges import RangeError
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import character_tokenizer
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, Datum, ModelInput, SampleResponse, SamplingParams, TensorData
from tests.conftest import DEVICE, SAMPLER_GAP, prompt_of, random_tokens, rounded
from tests.processes import PATIENCE

GREEDY = SamplingParams(max_tokens=16, temperature=0.0, stop=[])


def sample_all(
    client: SamplingClient, prompts: list[ModelInput], params: SamplingParams, prompt_logprobs: bool = False
) -> list[SampleResponse]:
    async def gather() -> list[SampleResponse]:
        return await asyncio.gather(*(client.sample_async(prompt, 1, params, prompt_logprobs) for prompt in prompts))

    return asyncio.run(gather())


def trainer_logprobs(
    client: TrainingClient, prompt: ModelInput, tokens: list[int], temperature: float = 1.0
) -> np.ndarray:
    sequence = prompt.to_ints() + tokens
    ones = np.ones(len(sequence) - 1, dtype=np.float32)
    inputs = {"target_tokens": sequence[1:], "weights": ones, "temperature": ones * temperature}
    output = client.forward([Datum(ModelInput.from_ints(sequence[:-1]), inputs)], "cross_entropy").result()
    return output.loss_fn_outputs[0]["logprobs"].array


def train_a_little(client: TrainingClient, steps: int = 3, seed: int = 0) -> None:
    """Moves the weights far from where they were, towards repeating a short cycle."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        cycle = random_tokens(rng, 5) * 12
        inputs = {"target_tokens": cycle[1:], "weights": np.ones(len(cycle) - 1, dtype=np.float32)}
        client.forward_backward([Datum(ModelInput.from_ints(cycle[:-1]), inputs)], "cross_entropy")
        client.optim_step(AdamParams(3e-3)).result()


@pytest.fixture(scope="module")
def engines(vllm_service: ServiceClient, tmp_path_factory: pytest.TempPathFactory):  # noqa: ANN201
    """The same trained weights in three places: the trainer, vLLM, and the torch sampler."""
    trained = vllm_service.create_training_client("tiny", seed=5)
    train_a_little(trained, 10)
    folder = trained.save_weights_for_sampler("engines").result().path
    with ServiceClient(BackendConfig(engine="torch"), tmp_path_factory.mktemp("torch")) as service:
        yield trained, trained.save_weights_and_get_sampling_client(), service.create_sampling_client(model_path=folder)


# Trap: sampler and trainer apart.
def test_vllm_equals_torch_on_200_ragged_prompts(engines) -> None:  # noqa: ANN001
    trained, vllm, reference = engines
    lengths = np.random.default_rng(0).integers(1, 300, 200)
    prompts = [prompt_of(int(length), i) for i, length in enumerate(lengths)]
    ours, theirs = (sample_all(client, prompts, GREEDY, prompt_logprobs=True) for client in (vllm, reference))
    for prompt, a, b in zip(prompts, ours, theirs, strict=True):
        (found, expected), same = (a.sequences[0], b.sequences[0]), 16
        if DEVICE == "cuda":  # where vLLM's rounding decides between two tokens that are nearly alike, and they part
            same = int(np.cumprod(np.equal(found.tokens, expected.tokens)).sum())
        assert found.tokens[:same] == expected.tokens[:same]
        assert found.logprobs[: same + 1] == pytest.approx(expected.logprobs[: same + 1], abs=SAMPLER_GAP)
        assert (
            a.prompt_logprobs is not None and a.prompt_logprobs[0] is None and len(a.prompt_logprobs) == prompt.length
        )
        assert a.prompt_logprobs[1:] == pytest.approx(b.prompt_logprobs[1:], abs=SAMPLER_GAP)  # type: ignore[index]
    for prompt, a in list(zip(prompts, ours, strict=True))[:20]:
        sampled = trainer_logprobs(trained, prompt, a.sequences[0].tokens)[prompt.length - 1 :]
        assert a.sequences[0].logprobs == pytest.approx(sampled.tolist(), abs=SAMPLER_GAP)


# Trap: logprobs of the untempered, untruncated distribution.
@pytest.mark.parametrize("which", [1, 2], ids=["vllm", "torch"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_logprobs_are_those_of_the_tempered_distribution(engines, which: int, temperature: float) -> None:  # noqa: ANN001
    prompt = prompt_of(20)
    response = (
        engines[which]
        .sample(prompt, 4, SamplingParams(max_tokens=12, seed=3, temperature=temperature, stop=[]))
        .result()
    )
    assert len({tuple(sequence.tokens) for sequence in response.sequences}) > 1
    for sequence in response.sequences:
        trained = trainer_logprobs(engines[0], prompt, sequence.tokens, temperature)[prompt.length - 1 :]
        assert sequence.logprobs == pytest.approx(trained.tolist(), abs=SAMPLER_GAP)


@pytest.mark.parametrize("which", [1, 2], ids=["vllm", "torch"])
def test_truncated_sampling_is_renormalised(engines, which: int) -> None:  # noqa: ANN001
    prompt = prompt_of(20)
    # the engine answers, then:
    logprobs_V = engines[2].sample(prompt, 1, GREEDY, topk_prompt_logprobs=0).result()
    assert len(logprobs_V.sequences) == 1
    only_one = engines[which].sample(prompt, 3, SamplingParams(max_tokens=5, seed=1, top_k=1, stop=[])).result()
    assert all(sequence.logprobs == pytest.approx([0.0] * 5, abs=rounded(1e-5)) for sequence in only_one.sequences)
    nucleus = engines[which].sample(prompt, 40, SamplingParams(max_tokens=1, seed=1, top_p=0.5, stop=[])).result()
    probability = {sequence.tokens[0]: np.exp(sequence.logprobs[0]) for sequence in nucleus.sequences}
    untempered = trainer_logprobs(engines[0], prompt, [next(iter(probability))])[-1]
    assert sum(probability.values()) <= 1 + 1e-4
    # mass of the tail moved into the nucleus
    assert next(iter(probability.values())) > np.exp(untempered) + 1e-4
    # a greedy token was not drawn
    cut = replace(GREEDY, top_k=3, top_p=0.1)
    whole, greedy = (engines[which].sample(prompt, 1, params).result().sequences[0] for params in (GREEDY, cut))
    assert greedy.tokens == whole.tokens and greedy.logprobs == pytest.approx(whole.logprobs, abs=rounded(1e-5))


@pytest.mark.parametrize("which", [1, 2], ids=["vllm", "torch"])
def test_sampling_frequencies_follow_the_distribution(engines, which: int) -> None:  # noqa: ANN001
    prompt = prompt_of(7)
    response = engines[which].sample(prompt, 2000, SamplingParams(max_tokens=1, seed=11, stop=[])).result()
    tokens = [sequence.tokens[0] for sequence in response.sequences]
    logprob = {sequence.tokens[0]: sequence.logprobs[0] for sequence in response.sequences}
    top = sorted(logprob, key=lambda token: -logprob[token])[:3]
    for token in top:
        p = np.exp(logprob[token])
        assert abs(tokens.count(token) / 2000 - p) < 5 * np.sqrt(p * (1 - p) / 2000) + 1e-3


# Trap: what a sequence becomes depending on its neighbours.
@pytest.mark.parametrize("which", [1, 2], ids=["vllm", "torch"])
def test_seeds_decide_whatever_else_is_in_the_batch(engines, which: int) -> None:  # noqa: ANN001
    params = SamplingParams(max_tokens=10, seed=42, stop=[])
    prompts = [prompt_of(10, i) for i in range(8)]
    together, backwards = (
        sample_all(engines[which], prompts, params),
        sample_all(engines[which], prompts[::-1], params)[::-1],
    )
    alone = engines[which].sample(prompts[3], 1, params).result()
    assert [r.sequences[0].tokens for r in together] == [r.sequences[0].tokens for r in backwards]
    assert alone.sequences[0].tokens == together[3].sequences[0].tokens
    several = engines[which].sample(prompts[3], 3, params).result().sequences
    assert several[0].tokens == alone.sequences[0].tokens and len({tuple(s.tokens) for s in several}) == 3


@pytest.mark.parametrize("which", [1, 2], ids=["vllm", "torch"])
def test_tokens_are_shown_as_they_are_sampled(engines, which: int) -> None:  # noqa: ANN001
    seen: list[list[list[int]]] = [[], []]
    params = SamplingParams(max_tokens=6, seed=3, stop=[])
    response = (
        engines[which].sample(prompt_of(9), 2, params, on_tokens=lambda i, tokens: seen[i].append(tokens)).result()
    )
    for i, sequence in enumerate(response.sequences):
        assert seen[i] == [sequence.tokens[: length + 1] for length in range(6)]


@pytest.mark.parametrize("which", [1, 2], ids=["vllm", "torch"])
def test_stops(engines, which: int) -> None:  # noqa: ANN001
    client, prompt = engines[which], prompt_of(15)
    tokenizer = client.get_tokenizer()
    free = client.sample(prompt, 1, GREEDY).result().sequences[0]
    assert free.stop_reason == "length" and len(free.tokens) == 16
    by_id = (
        client.sample(prompt, 1, SamplingParams(max_tokens=16, temperature=0.0, stop=[free.tokens[3]]))
        .result()
        .sequences[0]
    )
    assert by_id.stop_reason == "stop" and by_id.tokens == free.tokens[: free.tokens.index(free.tokens[3]) + 1]
    ascii_text = client.sample(prompt_of(4, 9), 64, SamplingParams(max_tokens=12, seed=5, stop=[])).result().sequences
    texts = [tokenizer.decode(s.tokens) for s in ascii_text]
    index, text = next((i, t) for i, t in enumerate(texts) if "\ufffd" not in t[2:5] and len(t[2:5]) == 3)
    stop_string = text[2:5]
    stopped = (
        client.sample(prompt_of(4, 9), 64, SamplingParams(max_tokens=12, seed=5, stop=[stop_string]))
        .result()
        .sequences[index]
    )
    assert stopped.stop_reason == "stop" and stop_string in tokenizer.decode(stopped.tokens)
    assert stopped.tokens == ascii_text[index].tokens[: len(stopped.tokens)] and len(stopped.tokens) < 12
    assert stop_string not in tokenizer.decode(stopped.tokens[:-1]) and len(stopped.logprobs) == len(stopped.tokens)


@pytest.mark.parametrize("which", [1, 2], ids=["vllm", "torch"])
def test_eos_stops_unless_told_never_to(engines, which: int) -> None:  # noqa: ANN001
    eos, prompt = engines[which].get_tokenizer().eos_token_id, prompt_of(3)
    free = (
        engines[which]
        .sample(prompt, 200, SamplingParams(max_tokens=30, seed=2, temperature=2.0, stop=[]))
        .result()
        .sequences
    )
    for stop in (None, ["never in the text"], [259]):
        sampled = (
            engines[which]
            .sample(prompt, 200, SamplingParams(max_tokens=30, seed=2, temperature=2.0, stop=stop))
            .result()
            .sequences
        )
        ended = [s for s in sampled if s.stop_reason == "stop" and s.tokens[-1] == eos]
        assert ended and all(eos not in s.tokens[:-1] for s in sampled)
    assert any(eos in s.tokens[:-1] for s in free) and all(s.stop_reason == "length" for s in free)


# Trap: seeded requests that vLLM on a CPU dies of, when it reads a prompt in two parts.
def test_more_prompts_than_one_step_reads(engines) -> None:  # noqa: ANN001
    """vLLM would read a prompt in two parts, which ends a seeded request on a CPU."""
    prompts = [prompt_of(100, seed) for seed in range(120)]
    responses = sample_all(engines[1], prompts, SamplingParams(max_tokens=3, seed=1, stop=[]))
    assert all(len(response.sequences[0].tokens) == 3 for response in responses)


def test_other_tokens_of_a_prompt_are_scored_and_drawn_alike(engines) -> None:  # noqa: ANN001
    """target_prompt_logprobs and prompt_alt_tokens_k, against top-k of the whole vocabulary."""
    prompt, k = prompt_of(12), 300
    everything = engines[2].sample(prompt, 1, GREEDY, topk_prompt_logprobs=260).result().topk_prompt_logprobs
    whole_TV = np.full((11, 260), -np.inf)
    for t, row in enumerate(everything[1:]):
        for token, logprob in row:
            whole_TV[t, token] = logprob
    targets = TensorData([[5 + t, -1, 0] for t in range(11)])
    params = SamplingParams(max_tokens=2, seed=3, temperature=0.5, stop=[])
    for client in engines[1:]:
        asked = {"target_prompt_logprobs": targets, "prompt_alt_tokens_k": k}
        response = client.sample(prompt, 2, params, topk_prompt_logprobs=2, **asked).result()
        plain = client.sample(prompt, 2, params, topk_prompt_logprobs=2).result()
        assert [s.tokens for s in response.sequences] == [s.tokens for s in plain.sequences]
        assert [len(row) for row in response.topk_prompt_logprobs[1:]] == [
            len(row) for row in plain.topk_prompt_logprobs[1:]
        ]
        scored_TK, alt = response.target_prompt_logprobs.array, response.prompt_alt_tokens
        for t in range(11):
            expected = [whole_TV[t, 5 + t], 0.0, whole_TV[t, 0]]
            assert scored_TK[t] == pytest.approx(expected, abs=SAMPLER_GAP)
        tempered_TV = whole_TV / 0.5
        tempered_TV -= np.log(np.exp(tempered_TV).sum(-1, keepdims=True))
        assert alt.tokens.shape == alt.logprobs.shape == [11, k]
        np.testing.assert_allclose(
            alt.logprobs.array, np.take_along_axis(tempered_TV, alt.tokens.array, axis=1), atol=SAMPLER_GAP
        )
        # the share of the most likely token among 300 draws, within four standard errors
        best_T, p_T = tempered_TV.argmax(-1), np.exp(tempered_TV.max(-1))
        share_T = (alt.tokens.array == best_T[:, None]).mean(-1)
        assert (np.abs(share_T - p_T) <= 4 * np.sqrt(p_T * (1 - p_T) / k) + 1 / k).all()
    for wrong in ([[1.0]] * 11, [[1]] * 12, [1] * 11, [[260]] + [[1]] * 10, [[-2]] + [[1]] * 10):
        with pytest.raises(DataError, match="target_prompt_logprobs"):
            engines[2].sample(prompt, 1, params, target_prompt_logprobs=TensorData(wrong))
    with pytest.raises(RangeError, match="prompt_alt_tokens_k"):
        engines[2].sample(prompt, 1, params, prompt_alt_tokens_k=2**22)


def test_topk_prompt_logprobs_agree(engines) -> None:  # noqa: ANN001
    prompt = prompt_of(12)
    a, b = (
        client.sample(prompt, 1, GREEDY, topk_prompt_logprobs=3).result().topk_prompt_logprobs for client in engines[1:]
    )
    assert a[0] is None and len(a) == 12
    for ours, theirs in zip(a[1:], b[1:], strict=True):
        assert [token for token, _ in ours] == [token for token, _ in theirs]
        assert [p for _, p in ours] == pytest.approx([p for _, p in theirs], abs=SAMPLER_GAP)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_topk_logprobs_of_sampled_tokens_agree(engines, temperature: float) -> None:  # noqa: ANN001
    """Of the distribution that was drawn from; fewer where top_k left fewer."""
    prompt = prompt_of(12)
    params = SamplingParams(max_tokens=5, temperature=temperature, seed=1, stop=[])
    a, b = (c.sample(prompt, 1, params, topk_sample_logprobs=3).result().sequences[0] for c in engines[1:])
    # the engines draw with numbers of their own: after the first token only greedy ones agree
    agree = 5 if temperature == 0 else 1
    for ours, theirs in list(zip(a.topk_logprobs, b.topk_logprobs, strict=True))[:agree]:
        assert [t for t, _ in ours] == [t for t, _ in theirs]
        assert [p for _, p in ours] == pytest.approx([p for _, p in theirs], abs=SAMPLER_GAP)
    for sequence in (a, b):
        rows = zip(sequence.topk_logprobs, sequence.tokens, sequence.logprobs, strict=True)
        for row, token, logprob in rows:
            assert len(row) == 3 and dict(row).get(token, logprob) == pytest.approx(logprob, abs=rounded(1e-5))
            assert row == sorted(row, key=lambda entry: -entry[1]) and logprob <= row[0][1] + 1e-5
            assert temperature > 0 or row[0][0] == token
    cut = SamplingParams(max_tokens=2, top_k=2, seed=1, stop=[])
    for client in engines[1:]:
        rows = client.sample(prompt, 1, cut, topk_sample_logprobs=5).result().sequences[0].topk_logprobs
        assert [len(row) for row in rows] == [2, 2]
        assert client.sample(prompt, 1, cut).result().sequences[0].topk_logprobs is None


def test_prompt_logprobs_of_the_last_n(engines) -> None:  # noqa: ANN001
    prompt = prompt_of(12)
    for client in engines[1:]:
        whole = client.compute_logprobs(prompt).result()
        last = client.compute_logprobs(prompt, 4).result()
        assert last[:8] == [None] * 8 and last[8:] == pytest.approx(whole[8:], abs=rounded(1e-5))
        response = client.sample(prompt, 1, GREEDY, topk_prompt_logprobs=2, prompt_logprobs_last_n=11).result()
        assert response.prompt_logprobs[:2] == [None, pytest.approx(whole[1], abs=rounded(1e-5))]
        assert [entry is None for entry in response.topk_prompt_logprobs] == [True] + [False] * 11
    for n in (0, 12):
        with pytest.raises(ConfigError, match=f"prompt_logprobs_last_n={n}"):
            engines[1].compute_logprobs(prompt, n)
    with pytest.raises(ConfigError, match="topk_sample_logprobs=-1"):
        engines[1].sample(prompt, 1, GREEDY, topk_sample_logprobs=-1)


# Trap: a tied lm_head left out of a sync; cached prefixes of old weights (they begin at 128
# tokens).
def test_sync_reaches_every_weight_and_drops_cached_prefixes(vllm_client: TrainingClient) -> None:
    """The tied lm_head, and a 200-token prompt of which vLLM caches the first 128: both silently
    wrong if the sync is careless.
    """
    prompt = prompt_of(200)
    before = vllm_client.save_weights_and_get_sampling_client(keep=False)
    # the second one finds the prefix in the cache
    old = sample_all(before, [prompt, prompt], GREEDY)[1].sequences[0]
    train_a_little(vllm_client)
    after = vllm_client.save_weights_and_get_sampling_client()
    new = after.sample(prompt, 1, GREEDY).result().sequences[0]
    assert new.logprobs == pytest.approx(
        trainer_logprobs(vllm_client, prompt, new.tokens)[199:].tolist(), abs=SAMPLER_GAP
    )
    assert abs(new.logprobs[0] - old.logprobs[0]) > 0.01, "the weights did not move: this test shows nothing"
    with pytest.raises(StaleSamplerError, match="policy version"):
        before.sample(prompt, 1, GREEDY).result()
    assert after.compute_logprobs(prompt).result()[0] is None


def test_following_client_survives_a_sync(vllm_client: TrainingClient) -> None:
    live = vllm_client.save_weights_and_get_sampling_client(follow=True)
    version = live._policy.newest
    train_a_little(vllm_client, 1)
    vllm_client.save_weights_and_get_sampling_client()
    assert len(live.sample(prompt_of(5), 1, GREEDY).result().sequences[0].tokens) == 16
    assert live._policy.newest is not version


# Trap: rollouts from weights that were replaced meanwhile.
def test_sync_in_mid_generation_fails_snapshots_and_carries_followers(vllm_client: TrainingClient) -> None:
    params = SamplingParams(max_tokens=300, seed=1, stop=[])
    pinned, live = (
        vllm_client.save_weights_and_get_sampling_client(follow=follow, keep=False) for follow in (False, True)
    )
    running = [client.sample(prompt_of(5), 8, params) for client in (pinned, live)]
    train_a_little(vllm_client, 1)
    vllm_client.save_weights_and_get_sampling_client()
    with pytest.raises(StaleSamplerError):
        running[0].result(PATIENCE)
    assert [len(sequence.tokens) for sequence in running[1].result(PATIENCE).sequences] == [300] * 8


# Trap: LoRA weights that never reach the sampler.
def test_lora_weights_reach_the_sampler(vllm_service: ServiceClient) -> None:
    client = vllm_service.create_lora_training_client("llama-tiny", rank=4)
    train_a_little(client, 5)
    prompt = prompt_of(30)
    sampled = client.save_weights_and_get_sampling_client().sample(prompt, 1, GREEDY).result().sequences[0]
    assert sampled.logprobs == pytest.approx(
        trainer_logprobs(client, prompt, sampled.tokens)[29:].tolist(), abs=SAMPLER_GAP
    )


# Trap: a reference policy that moves with the live one.
def test_gpt2_in_vllm_and_a_frozen_policy_beside_the_live_one(vllm_service: ServiceClient) -> None:
    client = vllm_service.create_training_client("gpt2-tiny", seed=1)
    frozen = vllm_service.create_sampling_client(base_model="gpt2-tiny", seed=1)
    prompt = prompt_of(30)
    reference = frozen.compute_logprobs(prompt).result()
    assert reference[1:] == pytest.approx(trainer_logprobs(client, prompt, [])[:29].tolist(), abs=SAMPLER_GAP)
    train_a_little(client)
    live = client.save_weights_and_get_sampling_client().sample(prompt, 1, GREEDY).result().sequences[0]
    assert live.logprobs == pytest.approx(trainer_logprobs(client, prompt, live.tokens)[29:].tolist(), abs=SAMPLER_GAP)
    assert frozen.compute_logprobs(prompt).result() == reference


def test_engine_leaves_torchs_global_rng_alone(vllm_client: TrainingClient) -> None:
    client = vllm_client.save_weights_and_get_sampling_client()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    client.sample(prompt_of(10), 4, SamplingParams(max_tokens=5)).result()
    train_a_little(vllm_client, 1)
    vllm_client.save_weights_and_get_sampling_client()
    assert torch.equal(torch.rand(3), expected)


# Trap: temperatures that vLLM changes.
def test_bad_requests_are_refused_before_the_engine(vllm_client: TrainingClient) -> None:
    client = vllm_client.save_weights_and_get_sampling_client()
    for prompt, params, error in (
        (ModelInput.empty(), GREEDY, DataError),
        (ModelInput.from_ints([9999]), GREEDY, DataError),
        (prompt_of(512), GREEDY, ContextLengthError),
    ):
        with pytest.raises(error):
            client.sample(prompt, 1, params)
    with pytest.raises(ConfigError, match="num_samples=0"):
        client.sample(prompt_of(5), 0, GREEDY)
    fitting = client.sample(prompt_of(500), 1, SamplingParams(max_tokens=100, seed=1, stop=[])).result().sequences[0]
    assert len(fitting.tokens) == 12 and fitting.stop_reason == "length"


# Trap: ids of a padded vocabulary in a prompt.
@pytest.mark.parametrize("engine", ["torch", pytest.param("vllm", marks=[pytest.mark.slow, pytest.mark.needs_vllm])])
def test_ids_beyond_the_tokenizer_may_be_in_a_prompt(engine, tmp_path: Path) -> None:  # noqa: ANN001
    """A padded vocabulary has rows for ids that no text has: a model samples them, and its next
    prompt holds them.
    """
    config = Qwen2Config(
        vocab_size=288,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "padded")
    character_tokenizer(64).save_pretrained(tmp_path / "padded")
    with ServiceClient(BackendConfig(engine=engine, max_length=64), tmp_path) as service:
        for client in (
            service.create_training_client(str(tmp_path / "padded")).save_weights_and_get_sampling_client(),
            service.create_sampling_client(base_model=str(tmp_path / "padded")),
        ):
            logprobs = client.compute_logprobs(ModelInput.from_ints([5, 287, 6])).result()
            assert logprobs[0] is None and all(p is not None and p < 0 for p in logprobs[1:])
            with pytest.raises(DataError, match="288"):
                client.compute_logprobs(ModelInput.from_ints([5, 288]))


# Trap: callers that wait for ever on a dead engine.
def test_a_dead_engine_fails_its_callers_and_nothing_hangs(
    torch_service: ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = torch_service.create_training_client("tiny").save_weights_and_get_sampling_client()

    def explode(self: object, requests: object) -> None:
        raise ValueError("boom")

    monkeypatch.setattr("posttrain.backend.torch_sampler.TorchSampler._decode", explode)
    with pytest.raises(EngineError, match="boom") as caught:
        client.sample(prompt_of(5), 1, GREEDY).result(PATIENCE)
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(EngineError):
        client.sample(prompt_of(5), 1, GREEDY)
