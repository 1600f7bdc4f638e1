"""One step of recipes/latro against the straightforward composition of Hugging Face parts, on the
recipe's sums of digits.

    python benchmarks/latro_step_vs_plain.py [--shapes tiny,tiny-long,small] [--rounds 3] [--steps 8]

The other side is what the paper's code amounts to (specs: latro A.2), with nothing in it that would
slow it down: `generate` to the full response length, since a rationale is cut at its stop
afterwards; three scoring passes (log p(z) of the policy and of the reference, log p(y|z) of the
policy) and one training pass, each over whole sequences with all logits. Same warm start,
questions, K, precision (fp32 on a CPU) and AdamW.

Ours is the whole step of the loop: it also syncs weights into a second engine, probes the sync and
writes metrics, which is all counted. A GPU takes --shapes qwen2.5-0.5b-shape, with random weights,
whose rationales never stop: that side of it was not run.
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the packages are one folder up
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import chz
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.clocked import ASKED_AT, ClockedDataset, mean_timings, step_times
from benchmarks.report import ROOT, alternate, in_subprocess, over, spread, wait_until_quiet, write_report
from posttrain.backend.config import BackendConfig, compute_dtype, training_device
from posttrain.backend.models import load_model
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.renderers import get_renderer
from posttrain.renderers.types import Renderer
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.stages import run_stages
from recipes.latro import train
from recipes.latro.env import LatentRationales, RationaleGroup
from recipes.latro.toy import ToyBuilder
from rl import train as rl_train
from rl.advantages import LeaveOneOut
from rl.types import RLDataset

QUESTIONS = 2000


@dataclass(frozen=True)
class Shape:
    model: str
    digits: int  # of a question; a rationale has two tokens more, its stop included
    response_length: int
    rloo_k: int
    rationales: int  # per step
    warm_start: int  # supervised updates, enough that rationales stop; 0 = random weights


# The recipe as it comes, where a rationale has half the response length; then a third of it, as on
# GSM8K with the README's command: 500 tokens for rationales of 100 to 200.
SHAPES = {
    "tiny": Shape("tiny", 6, 16, 8, 128, 300),
    "tiny-long": Shape("tiny", 18, 60, 16, 128, 60),
    "small": Shape("small", 18, 60, 8, 64, 120),
    "qwen2.5-0.5b-shape": Shape("qwen2.5-0.5b-shape", 18, 256, 16, 384, 0),
}


def recipe(shape: Shape, log_path: str, **options: Any) -> train.Config:
    return train.prepared(
        train.Config(
            dataset=ToyBuilder(num_tasks=QUESTIONS, num_validation=50, num_digits=shape.digits, noise=0.0),
            model_name=shape.model,
            response_length=shape.response_length,
            rloo_k=shape.rloo_k,
            train_batch_size=shape.rationales,
            warm_start_updates=shape.warm_start,
            backend=BackendConfig(engine="vllm" if torch.cuda.is_available() else "torch"),
            log_path=log_path,
            behavior_if_log_dir_exists="resume",
            **options,
        )
    )


# --- ours ---------------------------------------------------------------------------------------


@chz.chz
class ClockedRationales(LatentRationales):
    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        dataset, _ = await LatentRationales.__call__(self, renderer)
        return ClockedDataset(dataset), None


def run_ours(shape: Shape, begin: str | None, steps: int, warmup: int) -> dict[str, Any]:
    """The recipe's own configuration of the loop, without evaluations, checkpoints and transcripts,
    which are no part of a step.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = recipe(shape, folder, max_updates=steps + warmup + 1, num_evaluations=1)
        settings = train.rl_config(config, train.sizes_of(config, QUESTIONS), begin)
        env = ClockedRationales(**{name: getattr(settings.env, name) for name in chz.chz_fields(LatentRationales)})
        settings = chz.replace(settings, env=env, eval_every=0, save_every=0, transcript_every=0)
        asyncio.run(rl_train.main(settings))
        records = read_metrics(Path(settings.log_path))
        parts = {
            name.removeprefix("time/"): value for name, value in mean_timings(Path(settings.log_path), warmup).items()
        }
    mean = {
        key: statistics.mean(record[key] for record in records)
        for key in ("env/all/ac_tokens_per_turn", "likelihood/finished")
    }
    return {
        **step_times(ASKED_AT, warmup),
        "parts": {name: seconds for name, seconds in parts.items() if "/" not in name and name != "total"},
        "sampled_tokens": mean["env/all/ac_tokens_per_turn"],
        "finished": mean["likelihood/finished"],
        "answer_logprob": records[0]["likelihood/answer_logprob"],
    }


# --- the plain composition ----------------------------------------------------------------------


class Plain:
    def __init__(self, shape: Shape, begin: str | None):
        self.config, self.shape, self.device = recipe(shape, ""), shape, training_device()
        self.policy, self.reference = (self._open(begin) for _ in range(2))
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=self.config.learning_rate, betas=(0.9, 0.95), fused=True
        )
        renderer = get_renderer("plain", load_tokenizer(shape.model))
        dataset, _ = asyncio.run(train.environment(self.config)(renderer))
        self.dataset: Any = dataset
        self.seconds: dict[str, float] = defaultdict(float)
        self.sampled_tokens, self.answer_logprobs = [], []

    def _open(self, begin: str | None) -> Any:
        if begin:
            return AutoModelForCausalLM.from_pretrained(begin, dtype=torch.float32).to(self.device).eval()  # type: ignore[arg-type]
        return load_model(self.shape.model, 0, self.device, torch.float32)

    def step(self, index: int) -> None:
        members = [group for group in self.dataset.get_batch(index) for _ in range(self.shape.rloo_k)]
        with self._timed("sampling"):
            rationales, finished = self._rationales(members)
        prompts = [group.prompt for group in members]
        contexts = [prompt + rationale for prompt, rationale in zip(prompts, rationales, strict=True)]
        whole = [context + group.answer_tokens for context, group in zip(contexts, members, strict=True)]
        with self._timed("scoring"), torch.no_grad():
            logp_B = self._logprobs(self.policy, contexts, prompts)
            reference_B = self._logprobs(self.reference, contexts, prompts)
            answer_B = self._logprobs(self.policy, whole, contexts)
            rewards_B = torch.where(finished, answer_B, self.config.penalty_reward_value * answer_B.mean())
            rewards_B = rewards_B - self.config.kl_coef * (logp_B - reference_B)
            advantages = [
                LeaveOneOut()(group_G.cpu().double().numpy()) for group_G in rewards_B.split(self.shape.rloo_k)
            ]
        with self._timed("train"):
            token_logprobs_BT = self._token_logprobs(self.policy, whole)
            rationale_B = _sum_between(token_logprobs_BT, prompts, contexts)
            likelihood_B = _sum_between(token_logprobs_BT, contexts, whole)
            advantages_B = torch.from_numpy(np.concatenate(advantages)).to(rationale_B)
            (-(advantages_B * rationale_B) - likelihood_B).mean().backward()
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.answer_logprobs.append(float(answer_B.mean()))

    @contextlib.contextmanager
    def _timed(self, part: str):
        start = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=compute_dtype(self.device) == torch.bfloat16):
            yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[part] += time.perf_counter() - start

    def _rationales(self, members: Sequence[RationaleGroup]) -> tuple[list[list[int]], torch.Tensor]:
        """Questions of a batch are equally long. EOS is switched off until the full length, then
        all is cut at the stop.
        """
        length = self.shape.response_length
        prompts_BT = torch.tensor([group.prompt for group in members], device=self.device)
        options: Any = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
        out_BT = self.policy.generate(
            prompts_BT,
            attention_mask=torch.ones_like(prompts_BT),
            max_new_tokens=length,
            min_new_tokens=length,
            **options,
        )
        cut = [
            group.rationale(row) for group, row in zip(members, out_BT[:, prompts_BT.shape[1] :].tolist(), strict=True)
        ]
        self.sampled_tokens.append(length)
        return [rationale for rationale, _ in cut], torch.tensor([finished for _, finished in cut], device=self.device)

    def _logprobs(self, model: Any, sequences: list[list[int]], contexts: list[list[int]]) -> torch.Tensor:
        return _sum_between(self._token_logprobs(model, sequences), contexts, sequences)

    def _token_logprobs(self, model: Any, sequences: list[list[int]]) -> torch.Tensor:
        """(B, T - 1) of token t + 1. Padding on the right needs no mask, as nothing before it looks
        there.
        """
        rows = [torch.tensor(tokens) for tokens in sequences]
        tokens_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
        logprobs_BTV = model(tokens_BT, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        return logprobs_BTV.gather(-1, tokens_BT[:, 1:, None])[..., 0]


def _sum_between(logprobs_BT: torch.Tensor, begins: list[list[int]], ends: list[list[int]]) -> torch.Tensor:
    """(B,) over the tokens behind `begins` and within `ends`."""
    column_T = torch.arange(1, logprobs_BT.shape[1] + 1)
    begin_B, end_B = (torch.tensor([len(tokens) for tokens in side]) for side in (begins, ends))
    chosen_BT = (column_T >= begin_B[:, None]) & (column_T < end_B[:, None])
    return (logprobs_BT * chosen_BT.to(logprobs_BT)).sum(-1)


def run_plain(shape: Shape, begin: str | None, steps: int, warmup: int) -> dict[str, Any]:
    plain, marks = Plain(shape, begin), []
    for index in range(steps + warmup + 1):
        marks.append((time.perf_counter(), time.process_time()))
        if index == warmup:
            plain.seconds.clear()
        if index < steps + warmup:
            plain.step(index)
    return {
        **step_times(marks, warmup),
        "parts": {name: seconds / steps for name, seconds in plain.seconds.items()},
        "sampled_tokens": statistics.mean(plain.sampled_tokens),
        "answer_logprob": plain.answer_logprobs[0],
    }


# --- the race -----------------------------------------------------------------------------------


def race(name: str, begin: str, rounds: int, counts: Sequence[str]) -> tuple[dict[str, Any], dict[str, list[float]]]:
    shape, script = SHAPES[name], str(ROOT / "benchmarks" / "latro_step_vs_plain.py")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        config = recipe(shape, folder)
        needs = [] if begin else train.beginning(config)
        asyncio.run(run_stages(needs))
        begin = begin or train.begin_path(config, needs) or ""
        sides = {
            side: partial(in_subprocess, script, "--side", side, "--shapes", name, "--begin", begin, *counts)
            for side in ("ours", "plain")
        }
        results = alternate(sides, rounds)
    figures: dict[str, Any] = {}
    medians: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for side, outcomes in results.items():
        for kind in ("step", "cpu"):
            of_rounds = [statistics.median(outcome[f"{kind}_seconds"]) for outcome in outcomes]
            medians[kind][side], figures[f"{side}: {kind}, s"] = of_rounds, statistics.median(of_rounds)
        figures[f"{side}: spread of the rounds"] = spread(medians["step"][side])
        figures |= {f"{side}: {key}": value for key, value in outcomes[-1].items() if isinstance(value, float)}
        figures |= {
            f"{side}: {part}, s": statistics.median(one["parts"][part] for one in outcomes)
            for part in outcomes[-1]["parts"]
        }
    return figures, {f"plain / ours, {kind} time": over(both["plain"], both["ours"]) for kind, both in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", default="qwen2.5-0.5b-shape" if torch.cuda.is_available() else "tiny,tiny-long,small"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="timed steps in each round")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument(
        "--side", choices=("ours", "plain"), help="used by the script itself: run one side, print its times"
    )
    parser.add_argument("--begin", default="", help="a warm start's checkpoint, instead of making one")
    arguments = parser.parse_args()
    if arguments.side:
        side = run_ours if arguments.side == "ours" else run_plain
        print(json.dumps(side(SHAPES[arguments.shapes], arguments.begin or None, arguments.steps, arguments.warmup)))
        return
    counts = ["--steps", str(arguments.steps), "--warmup", str(arguments.warmup)]
    settings = {"steps": arguments.steps, "warmup": arguments.warmup, "rounds": arguments.rounds}
    settings |= {name: os.environ.get(name, "default") for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    for name in arguments.shapes.split(","):
        load = wait_until_quiet()
        figures, ratios = race(name, arguments.begin, arguments.rounds, counts)
        write_report(f"latro_step_vs_plain-{name}", figures, {**asdict(SHAPES[name]), **settings}, load, ratios)


if __name__ == "__main__":
    main()
