"""The distillation recipes, and two algorithms beside GRPO, as a user runs them, with few steps."""

import re
from pathlib import Path

import pytest

from posttrain.backend.errors import ConfigError
from recipes.warm_start import seeds_of
from tests.test_recipes import run_recipe

SMALL = {
    "on_policy": ["teacher_steps=3", "start_nll=9", "steps=2", "rl_steps=2"],
    "off_policy": ["teacher_steps=3", "number=300", "steps=2"],
    "prompt": ["teacher_steps=3", "number=300", "steps=2"],
    "self_distillation": ["teacher_steps=3", "steps=2"],
}
LAST = {
    "on_policy": r"distill  seed 0 .* accuracy [\d.]+ -> [\d.]+\n.*\ncurves: .*on_policy.png",
    "off_policy": r"renormalised +[\d.]+ ",
    "prompt": r"with the prompt [\d.]+; without [\d.]+ -> [\d.]+",
    "self_distillation": r"without the solution: [\d.]+ -> [\d.]+",
}


def test_seeds_are_whole_numbers_by_comma() -> None:
    assert seeds_of("0,12") == [0, 12]
    with pytest.raises(ConfigError, match="seeds=0,x: whole numbers by comma are needed"):
        seeds_of("0,x")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variants", "names"),
    [
        ("algorithms", ("grpo", "dynamic sampling", "critic", "gspo, 4 steps a batch")),
        ("precision", ("float32", "8-bit moments", "bfloat16, stochastic rounding")),
        ("faults", ("as it should be", "the same, without their correction", "learning rate 10 times as high")),
    ],
)
def test_variants_beside_grpo(variants: str, names: tuple[str, ...], tmp_path: Path) -> None:
    small = [f"variants={variants}", "seeds=0", "warm_start_nll=9", "num_steps=2", f"log_path={tmp_path}/runs"]
    output = run_recipe("algorithms/beside_grpo", tmp_path, *small)
    for name in names:
        assert re.search(
            rf"^{re.escape(name)} +held-out accuracy [\d.]+ -> [\d.]+; sampled tokens [\d,]+$", output, re.M
        ), output
    assert (tmp_path / "runs" / f"{variants}.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_distillation_recipe_runs_from_nothing_to_its_figures(name: str, tmp_path: Path) -> None:
    output = run_recipe(f"distillation/{name}", tmp_path, *SMALL[name], f"log_path={tmp_path}/runs")
    assert re.search(LAST[name], output), output[-500:]
