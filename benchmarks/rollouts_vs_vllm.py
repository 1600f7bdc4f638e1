"""Rollouts through our environments against vLLM's own LLM.generate: the same prompts, weights,
engine settings and sampling.

    python benchmarks/rollouts_vs_vllm.py [--task fixed|arithmetic|short] [--rounds N]

One process holds two engines with the settings of posttrain/backend/vllm_settings.py and the same
weights: one behind SamplingClient, Policy and do_rollouts, the other inside vLLM's LLM class.
`fixed` has random prompts and answers of one length; `arithmetic` is the demo's task with an
untrained model, stopped at EOS; `short` is the same with answers of at most 4 tokens, where a sequence
costs more than its tokens. LLM.generate runs with and without per-request seeds, which cost
vLLM time of their own; we seed every request on a CPU, and none on a GPU, so the ratio with the
same setting as ours is the cost of our machinery. Left out: prefix caching (prompts are shorter
than a block on a CPU), several turns.
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

if not __package__:  # run as a file: the packages are one folder up
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np
import torch

from benchmarks.report import alternate, over, spread, wait_until_quiet, write_report
from envs.arithmetic import ArithmeticBuilder
from envs.problem import Problem
from envs.problem_env import ProblemEnv, ProblemGroupBuilder
from posttrain.backend.config import BackendConfig, training_device
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import ModelInput
from posttrain.backend.vllm_engine import VllmEngine
from posttrain.renderers import get_renderer
from rl.rollouts import Policy, do_rollouts
from rl.types import Action, Observation, StepResult, StopCondition

FIRST_BYTE = 4  # the presets' special tokens come before it


@dataclass(frozen=True)
class Size:
    model_name: str
    num_prompts: int
    group_size: int
    prompt_tokens: int
    max_tokens: int
    config: BackendConfig


CPU = Size("tiny", 64, 8, 40, 32, BackendConfig(engine="vllm", max_num_seqs=256))
GPU = Size("qwen2.5-0.5b-shape", 128, 8, 128, 256, BackendConfig(engine="vllm", max_length=2048, max_num_seqs=1024))


class FixedLengthEnv(ProblemEnv):
    """Asks with given tokens and never stops: every answer has max_tokens tokens, which are decoded
    and graded like any other.
    """

    def __init__(self, prompt: list[int], renderer: Any):
        super().__init__(Problem("", ""), renderer)
        self._rendered = ModelInput.from_ints(prompt)

    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        return self.build_prompt(), []

    async def step(self, action: Action) -> StepResult:
        return await super().step(
            [token for token in action if token >= FIRST_BYTE]
        )  # nothing stopped it, so it may hold many EOS


def fixed_groups(size: Size, renderer: Any, seed: int = 0) -> list[ProblemGroupBuilder]:
    rng = np.random.default_rng(seed)
    prompts = rng.integers(FIRST_BYTE, 260, (size.num_prompts, size.prompt_tokens)).tolist()
    return [ProblemGroupBuilder(partial(FixedLengthEnv, prompt, renderer), size.group_size) for prompt in prompts]


async def arithmetic_groups(size: Size, renderer: Any) -> Sequence[ProblemGroupBuilder]:
    dataset, _ = await ArithmeticBuilder(batch_size=size.num_prompts, group_size=size.group_size)(renderer)
    return dataset.get_batch(0)  # type: ignore[return-value]


def our_rollouts(client: SamplingClient, groups: Sequence[ProblemGroupBuilder], size: Size) -> float:
    """Tokens per second."""
    start = time.perf_counter()
    done = asyncio.run(do_rollouts(groups, Policy(client, size.max_tokens), (0,)))
    seconds = time.perf_counter() - start
    return (
        sum(len(turn.ac.tokens) for group in done for member in group.trajectories_G for turn in member.transitions)
        / seconds
    )


def open_llm(client: TrainingClient, size: Size, seeded: bool) -> tuple[VllmEngine, Any]:
    """vLLM's LLM class around a second engine made by our VllmEngine: the settings cannot drift
    apart.
    """
    from vllm import LLM
    from vllm.v1.engine.llm_engine import LLMEngine

    trainer: Any = client._trainer
    engine = VllmEngine(
        trainer.hf_config, client.get_tokenizer(), trainer.max_length, size.config, trainer.device, seeded
    )
    engine.load_weights(trainer.sampled.sampler_weights())
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(LLMEngine, "from_engine_args", lambda **_: engine._engine),
    ):
        # LLM looks at it, though the engine is there already
        trainer.hf_config.save_pretrained(folder)
        return engine, LLM(model=folder)


def llm_generate(llm: Any, prompts: list[list[int]], stop: StopCondition, max_tokens: int, seeded: bool) -> float:
    """Tokens per second of the sampled token's logprobs, without detokenising: no more is asked of
    it than of us.
    """
    from vllm import SamplingParams

    common = {
        "max_tokens": max_tokens,
        "temperature": 1.0,
        "logprobs": 0,
        "detokenize": False,
        "skip_special_tokens": False,
    }
    params = [
        SamplingParams(**common, seed=i if seeded else None, stop_token_ids=list(stop or []), ignore_eos=stop == [])  # type: ignore[arg-type]
        for i in range(len(prompts))
    ]
    start = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    seconds = time.perf_counter() - start
    assert all(output.outputs[0].logprobs for output in outputs)
    return sum(len(output.outputs[0].token_ids) for output in outputs) / seconds


def compare(task: str, size: Size, rounds: int) -> None:
    with ServiceClient(size.config) as service:
        client = service.create_training_client(size.model_name)
        renderer = get_renderer("plain", client.get_tokenizer())
        groups = fixed_groups(size, renderer) if task == "fixed" else asyncio.run(arithmetic_groups(size, renderer))
        stop = [] if task == "fixed" else renderer.get_stop_sequences()
        prompts = [group.env_thunk().build_prompt().to_ints() for group in groups for _ in range(size.group_size)]
        seeded_here = training_device().type == "cpu"
        sampling_client = client.save_weights_and_get_sampling_client()
        engine, llm = open_llm(client, size, seeded_here)
        sides = {
            "our rollouts": partial(our_rollouts, sampling_client, groups, size),
            "LLM.generate, seeded": partial(llm_generate, llm, prompts, stop, size.max_tokens, True),
            "LLM.generate, unseeded": partial(llm_generate, llm, prompts, stop, size.max_tokens, False),
        }
        alternate(sides, 1)  # warm-up: the first calls compile
        load = wait_until_quiet()
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, values in alternate(sides, 1).items():
                rates[name] += values
            # a machine that is lent for minutes may not see the last round
            report(task, size, rates, seeded_here, load)
        engine.close()


def report(task: str, size: Size, rates: dict[str, list[float]], seeded_here: bool, load: float) -> None:
    same = "LLM.generate, seeded" if seeded_here else "LLM.generate, unseeded"
    figures: dict[str, Any] = {f"{name}: tokens/s": statistics.median(values) for name, values in rates.items()}
    figures |= {f"{name}: spread": spread(values) for name, values in rates.items()}
    settings = asdict(size) | {
        "config": {"max_num_seqs": size.config.max_num_seqs},
        "rounds": len(rates["our rollouts"]),
        "ours seeded": seeded_here,
    }
    ours = rates["our rollouts"]
    ratios = {
        f"ours / {name}{' (our setting)' if name == same else ''}": over(ours, values)
        for name, values in rates.items()
        if values is not ours
    }
    write_report(f"rollouts_vs_vllm-{task}", figures, settings, load, ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("fixed", "arithmetic", "short"), default="fixed")
    parser.add_argument("--rounds", type=int, default=1 if torch.cuda.is_available() else 5)
    arguments = parser.parse_args()
    size = GPU if torch.cuda.is_available() else CPU
    compare(arguments.task, replace(size, max_tokens=4) if arguments.task == "short" else size, arguments.rounds)


if __name__ == "__main__":
    main()
