"""What the torch sampler reads and decodes at once stays within the memory that is planned for it. Requests that are
made together share a step.
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.backend import engine, torch_sampler
from posttrain.backend.config import BackendConfig
from posttrain.backend.engine import SequenceRequest
from posttrain.backend.fake_models import cached_bytes, model_size
from posttrain.backend.memory import GIB
from posttrain.backend.memory_plan import PROMPT_BYTES, PlannedRun, prompt_bytes
from posttrain.backend.models import PRESETS, new_model
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import character_tokenizer
from posttrain.backend.torch_sampler import TorchSampler
from posttrain.backend.types import SamplingParams
from tests.conftest import prompt_of

CPU, TINY, LENGTH = torch.device("cpu"), PRESETS["tiny"], 128
TOKEN_BYTES = cached_bytes(TINY, 4)[1]
Passes = list[tuple[int, int]]  # rows, and columns of the cache


def sampled(monkeypatch: pytest.MonkeyPatch, config: BackendConfig) -> tuple[list[list[int]], Passes, Passes]:
    """Tokens of 24 prompts of three lengths, and one of nearly the whole context, two sequences of
    each; passes that read prompts, and those that decode."""
    torch.manual_seed(0)
    sampler = TorchSampler(new_model(TINY), character_tokenizer(LENGTH), LENGTH, config, CPU)
    reads: Passes = []
    decodes: Passes = []
    forward = TorchSampler._forward

    def recorded(self, tokens_BT, mask_BT, positions_BT, cache):  # noqa: ANN001, ANN202
        (reads if tokens_BT.shape[1] > 1 else decodes).append(tuple(mask_BT.shape))
        return forward(self, tokens_BT, mask_BT, positions_BT, cache)

    monkeypatch.setattr(TorchSampler, "_forward", recorded)
    prompts = [[5 + n] * (10 + 3 * (n % 3)) for n in range(24)] + [[4] * 120]
    twice = [prompt for prompt in prompts for _ in range(2)]
    requests = [SequenceRequest(prompt, SamplingParams(stop=[]), 8, seed=n) for n, prompt in enumerate(twice)]
    for request in requests:
        sampler.add(request)
    done: dict[SequenceRequest, list[int]] = {}
    while len(done) < len(requests):
        done |= {request: answer.sequence.tokens for request, answer in sampler.step()}
    return [done[request] for request in requests], reads, decodes


def test_a_batch_stays_within_pass_and_cache_and_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, reads, decodes = sampled(monkeypatch, BackendConfig())
    assert reads == [(25, 120)] and decodes[-1] == (50, 127)  # all at once
    found, reads, decodes = sampled(monkeypatch, BackendConfig(sampler_memory_gb=400 * TOKEN_BYTES / GIB))
    assert found == expected and (2, 127) in decodes
    assert max(rows * columns for rows, columns in decodes) in range(300, 401)
    monkeypatch.setattr(torch_sampler, "PROMPT_BYTES", prompt_bytes(model_size(TINY), 8, 16, 4))
    found, reads, decodes = sampled(monkeypatch, BackendConfig())
    assert found == expected and reads == [(9, 13), (8, 16), (7, 16), (1, 120)]
    assert max(rows for rows, _ in decodes) == 18  # two sequences of a prompt, which is read once


# Trap: a server's client with a long conversation waits for ever while others send short prompts.
@pytest.mark.parametrize("pads", [True, False])
def test_a_long_prompt_is_answered_though_short_ones_keep_coming(pads: bool) -> None:
    sampler = TorchSampler(new_model(TINY), character_tokenizer(LENGTH), LENGTH, BackendConfig(max_num_seqs=2), CPU)
    sampler._pads = pads

    def ask(length: int, n: int) -> SequenceRequest:
        request = SequenceRequest([5] * length, SamplingParams(stop=[]), 1, seed=n)
        sampler.add(request)
        return request

    long = [ask(100 + n % 2, n) for n in range(4)]
    shorts = [ask(10, n) for n in range(4)]
    answered: list[set[SequenceRequest]] = []
    while long[-1] not in set().union(*answered):
        answered.append({request for request, _ in sampler.step()})
        shorts += [ask(10, len(shorts)) for _ in range(4)]
        assert len(answered) < 3 * torch_sampler.MOST_WAITED
    assert all(batch <= {*shorts} for batch in answered[: torch_sampler.MOST_WAITED])
    # with one of about its length where they may share a batch, and of its length where not
    assert answered[torch_sampler.MOST_WAITED] == ({long[0], long[2]})
    # whoever came first is not forgotten afterwards either
    assert shorts[0] in answered[0] and len(set().union(*answered)) == sum(map(len, answered))


def test_the_plan_counts_what_a_batch_may_take() -> None:
    length = 2**16
    run = PlannedRun(TINY, BackendConfig(engine="torch"), None, CPU, length, samples=True)
    one, limited = length * TOKEN_BYTES, run.plan.sampling
    assert limited["KV cache"] == 2 * GIB < 256 * one and limited["prompts"] == PROMPT_BYTES
    assert run.changed(sampler_memory_gb=0.5).plan.sampling["KV cache"] == GIB // 2
    few, small = run.changed(max_num_seqs=2), run.changed(sampler_memory_gb=0.01)
    assert few.plan.sampling["KV cache"] == 2 * one
    assert small.plan.sampling["KV cache"] == one  # a sequence of the whole context is always decoded
    long = PlannedRun(TINY, run.backend, None, CPU, 2 * length, samples=True)
    assert long.plan.sampling["prompts"] == prompt_bytes(run.size, 1, 2 * length, 4) > PROMPT_BYTES


def test_rollouts_that_begin_together_share_every_step_and_one_call_wakes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the clock may decide, as on a GPU, an idle engine would begin with the first request alone."""
    monkeypatch.setattr(engine, "GATHER_SECONDS", 60.0)  # the machine may be busy
    steps: list[int] = []
    wakings: list[object] = []

    async def asked_together(client: Any) -> None:
        loop = asyncio.get_running_loop()
        call_soon = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args, **kwargs: (wakings.append(args), call_soon(*args, **kwargs))[1]  # type: ignore[method-assign]
        async with asyncio.TaskGroup() as tasks:
            for i in range(40):
                tasks.create_task(client.sample_async(prompt_of(5, i), 1, SamplingParams(max_tokens=3, stop=[])))

    with ServiceClient(BackendConfig(engine="torch", reproducible=False), tmp_path) as service:
        client: Any = service.create_sampling_client(base_model="micro")
        step = client._engine._engine.step

        def counted() -> Any:
            steps.append(client._engine.num_in_flight)
            return step()

        client._engine._engine.step = counted
        asyncio.run(asked_together(client))
    assert set(steps) == {40}
    assert len(wakings) < 10
