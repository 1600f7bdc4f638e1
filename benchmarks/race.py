"""A race of training steps between our loop and TRL's trainer, each in its own process, in turn,
from the same warm-started model.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.clocked import run_sft
from benchmarks.report import ROOT, alternate, in_subprocess, over, spread, wait_until_quiet, write_report

TRL_SITE = os.environ.get("TRL_SITE", "/tmp/trl-site")
# what a side may report beside its times
MEASURED = ("reward", "answer_tokens", "nll", "dpo_loss", "peak_mib")
Ours = dict[str, Callable[..., dict[str, Any]]]
WARM_START_STEPS = 100  # about 10 s; enough that answers end with EOS and some of them are right


def check_trl() -> None:
    """TRL lives beside the virtual environment, or in it."""
    try:
        importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        if not os.path.isdir(f"{TRL_SITE}/trl"):
            raise SystemExit(f"TRL is not installed: pip install --target {TRL_SITE} --no-deps trl==1.16.0") from None


def race(
    document: str | None,
    name: str,
    ours: Ours,
    trl: dict[str, str],
    settings: dict[str, Any],
    rounds: int,
    steps: int,
    warmup: int,
) -> None:
    """The command line of NAME.py; `rounds`, `steps` and `warmup` are defaults. `ours`: side ->
    what runs it; `trl`: side -> the mode of trl_side.py. The step times of all rounds are pooled.
    """
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--steps", type=int, default=steps, help="timed steps in each round")
    parser.add_argument("--warmup", type=int, default=warmup)
    choices = (*ours, "warm_start")
    parser.add_argument("--side", choices=choices, help="used by the script itself: run one side, print its times")
    parser.add_argument("--model", default="tiny", help="used with --side")
    given = parser.parse_args()
    if given.side == "warm_start":
        print(json.dumps(run_sft("tiny", given.steps, 0, save_to=given.model, learning_rate=1e-3)))
    elif given.side:
        print(json.dumps(ours[given.side](given.model, steps=given.steps, warmup=given.warmup)))
    else:
        _race(name, list(ours), trl, settings, given.rounds, given.steps, given.warmup)


def _race(
    name: str, ours: list[str], trl: dict[str, str], settings: dict[str, Any], rounds: int, steps: int, warmup: int
) -> None:
    check_trl()
    script = str(ROOT / "benchmarks" / f"{name}.py")
    with tempfile.TemporaryDirectory() as folder:
        in_subprocess(script, "--side", "warm_start", "--model", f"{folder}/warm", "--steps", str(WARM_START_STEPS))
        model = f"{folder}/warm/checkpoints/final"
        counts = ["--steps", str(steps), "--warmup", str(warmup)]
        sides = {side: partial(in_subprocess, script, "--side", side, "--model", model, *counts) for side in ours}
        trl_script = str(ROOT / "benchmarks" / "trl_side.py")
        for side, mode in trl.items():
            sides[side] = partial(in_subprocess, trl_script, mode, model, str(steps), str(warmup), PYTHONPATH=TRL_SITE)
        load = wait_until_quiet()
        results = alternate(sides, rounds)
    figures: dict[str, Any] = {}
    medians: dict[str, list[float]] = {}
    tenths: dict[str, list[float]] = {}
    for side, outcomes in results.items():
        medians[side] = [statistics.median(outcome["step_seconds"]) for outcome in outcomes]
        tenths[side] = [statistics.quantiles(outcome["step_seconds"], n=10)[0] for outcome in outcomes]
        figures |= {f"{side}: step, s": statistics.median(medians[side])}
        figures |= {f"{side}: spread of the rounds": spread(medians[side])}
        figures[f"{side}: fastest tenth, s"] = statistics.median(tenths[side])
        figures[f"{side}: CPU time of a step, s"] = statistics.median(
            second for outcome in outcomes for second in outcome["cpu_seconds"]
        )
        last = outcomes[-1]
        figures |= {f"{side}: {key}": last[key] for key in MEASURED if key in last}
        figures |= {f"{side}: {part}, s": mean for part, mean in last.get("parts", {}).items()}
    settings |= {"steps": steps, "warmup": warmup, "rounds": rounds, "trl": _trl_version()}
    settings["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "default")
    ratios = {f"{peer} / {side}": over(medians[peer], medians[side]) for peer in trl for side in ours}
    # The fastest steps are those that nothing else on the machine disturbed.
    ratios |= {f"{peer} / {side}, fastest tenths": over(tenths[peer], tenths[side]) for peer in trl for side in ours}
    for peer, side in [(peer, side) for peer in trl for side in ours if "peak_mib" in results[side][-1]]:
        peaks = [[outcome["peak_mib"] for outcome in results[one]] for one in (peer, side)]
        ratios[f"{peer} / {side}, peak memory above the start"] = over(*peaks)
    write_report(name, figures, settings, load, ratios)


def _trl_version() -> str:
    found = next(iter(importlib.metadata.distributions(name="trl", path=[TRL_SITE])), None)
    return found.version if found else importlib.metadata.version("trl")
