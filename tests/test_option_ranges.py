"""Every numeric option of every configuration has a range, and what is outside it is an error of
one line before anything is opened.
"""

import dataclasses
import importlib
import math
import pkgutil
import re
from types import SimpleNamespace
from typing import Any

import chz
import numpy as np
import pytest

from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, SEED, SHARE, TEMPERATURE, Range, RangeError
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import AdamParams, LoraConfig, SamplingParams
from posttrain.tracking.command_line import parse
from recipes.star_graph.train import Config as StarGraphConfig
from rl.names import ENVS
from rl.train_cli import CLIConfig as RLConfig
from supervised.names import DATASETS
from supervised.train_cli import CLIConfig as SupervisedConfig
from tests.conftest import ROOT

PACKAGES = ("posttrain", "supervised", "preference", "rl", "envs", "recipes")
WITH_AN_EXTRA = {"envs.verifiers_host", "envs.verifiers_classic"}
PROBES = (-1, 0, math.nan, math.inf, -math.inf, 10**30, -(10**30), 10**400, 1.5, True, "7")


def _configs() -> list[type]:
    names = [m.name for package in PACKAGES for m in pkgutil.walk_packages([str(ROOT / package)], f"{package}.")]
    modules = [
        importlib.import_module(name) for name in names if name not in WITH_AN_EXTRA and not name.endswith("__main__")
    ]
    found = {
        kind for module in modules for kind in vars(module).values() if isinstance(kind, type) and chz.is_chz(kind)
    }
    return sorted(
        (kind for kind in found if kind.__module__.split(".")[0] in PACKAGES), key=lambda kind: kind.__qualname__
    )


def _numeric_fields(kind: type) -> dict[str, Range | None]:
    fields = {name: field for name, field in chz.chz_fields(kind).items() if _is_numeric(field)}
    return {name: next((v for v in field._validator if isinstance(v, Range)), None) for name, field in fields.items()}


def _is_numeric(field: Any) -> bool:
    kind = str(field.x_type)
    return "Callable[" not in kind and bool(re.search(r"\b(int|float)\b", kind))  # a function is no number


def test_every_numeric_option_declares_its_range():
    configs = _configs()
    missing = [
        f"{kind.__module__}:{kind.__qualname__}.{name}"
        for kind in configs
        for name, r in _numeric_fields(kind).items()
        if r is None
    ]
    assert len(configs) > 100 and not missing


def test_values_outside_a_range_are_an_error_of_one_line_that_names_the_option():
    checked = 0
    for kind in _configs():
        for name, accepted in _numeric_fields(kind).items():
            assert accepted is not None
            for value in PROBES:
                if accepted.needs(value) is None:
                    assert not isinstance(value, bool | str)
                    assert value == accepted.also or accepted.low <= value <= accepted.high
                    continue
                with pytest.raises(ConfigError, match=rf"^{name}=.* must be .+$") as error:
                    accepted(SimpleNamespace(**{name: value}), name)
                assert "\n" not in str(error.value)
                checked += 1
    assert checked > 2000


@pytest.mark.parametrize(
    "accepted, inside, outside",
    [
        (COUNT, (1, 2**31 - 1), (0, -1, 2**31, 1.0)),
        (SEED, (0, 2**53), (-1, 2**54)),
        (SHARE, (0, 1, 0.5), (-0.01, 1.01, math.nan)),
        (TEMPERATURE, (0, 0.01, 2), (0.005, -0.0001, 2.01)),
        (Range(0, 0.5, below=True), (0, 0.49), (0.5,)),
        (Range(0, 1, above=True), (1e-9, 1), (0,)),
    ],
)
def test_the_ends_of_ranges(accepted: Range, inside: tuple[float, ...], outside: tuple[float, ...]):
    assert [accepted.needs(value) for value in inside] == [None] * len(inside)
    assert all(accepted.needs(value) for value in outside)


@pytest.mark.parametrize("kind", [AdamParams, SamplingParams, LoraConfig])
def test_numbers_given_in_python_are_checked_when_the_object_is_built(kind: type):
    named = {field.name: str(field.type) for field in dataclasses.fields(kind) if field.name != "stop"}
    fields = [name for name, annotation in named.items() if re.search(r"\b(int|float)\b", annotation)]
    assert len(fields) >= 2
    for name in fields:
        for value in (-5, math.nan, math.inf, 10**30, True, "7", [1], (1,)):
            with pytest.raises(RangeError, match=rf"^{name}=.* must be .+$"):
                kind(**{name: value})


# Trap: an engine that meets such a stop ends, for all its clients; numpy's numbers would never stop.
@pytest.mark.parametrize("stop", ["", [""], ["a", ""], 5, [1.5], [[5]], [None], [True], [np.int64(5)]])
def test_stops_that_no_engine_can_read_are_refused(stop: Any):
    with pytest.raises(RangeError, match=r"^stop=.* must be a text, or a list of texts or token ids"):
        SamplingParams(stop=stop)


def test_stops_that_engines_read():
    stops: list[Any] = [None, [], "a", ["a", "b"], [0, 5], ("a", 5)]
    for stop in stops:
        assert SamplingParams(stop=stop).stop == stop


@pytest.mark.parametrize(
    ("kind", "inside", "outside"),
    [
        (
            AdamParams,
            {"learning_rate": 0.0, "beta1": 0.0, "grad_clip_norm": 0.0, "weight_decay": 10.0},
            {"learning_rate": None, "beta1": 1.0, "beta2": 1.0, "eps": 0.0},
        ),
        (
            SamplingParams,  # vLLM would sample at 0.01 where 0.005 is asked for, and not say so
            {"temperature": 0, "top_p": np.float32(1), "top_k": 0, "max_tokens": None, "seed": 2**63 - 1},
            {"temperature": 0.005, "top_p": 0.0, "top_k": -2, "max_tokens": 0, "seed": -1},
        ),
        (LoraConfig, {"rank": np.int64(1), "alpha": None, "seed": 0}, {"rank": 0, "alpha": 0.0, "seed": -1}),
    ],
)
def test_the_ends_of_the_ranges_of_objects(kind: type, inside: dict[str, Any], outside: dict[str, Any]):
    assert {name: getattr(kind(**inside), name) for name in inside} == inside
    for name, value in outside.items():
        with pytest.raises(RangeError, match=rf"^{name}={value!r} must be .+$"):
            kind(**{name: value})


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "1e30", "99999999999999999999"])
@pytest.mark.parametrize(
    "config, arguments, names",
    [(RLConfig, ["env=arithmetic"], {"env": ENVS}), (SupervisedConfig, ["dataset=arithmetic"], {"dataset": DATASETS})],
)
def test_a_command_line_names_the_whole_path(config: type, arguments: list[str], names: dict, value: str):
    """Whole numbers and others, of the configuration itself and of the objects in it."""
    builder = arguments[0].split("=")[0]
    for option in ("learning_rate", "num_epochs", "backend.max_num_seqs", f"{builder}.n_batches"):
        with pytest.raises(ConfigError, match=rf"^{option}=\S+(:| must be) ") as error:
            parse(config, [*arguments, f"{option}={value}"], names)
        assert "\n" not in str(error.value)


# Trap: a run of seed=np.arange(3)[1] trained until its first checkpoint, which JSON refused, and was lost.
def test_numbers_of_numpy_become_pythons():
    three: Any = np.int64(3)
    config = RLConfig(seed=three, lora_rank=three, learning_rate=np.float32(0.5), max_steps=None)  # type: ignore[arg-type]
    adapter = LoraConfig(rank=three, seed=three, alpha=np.float64(16))
    numbers = config.seed, config.lora_rank, config.learning_rate, adapter.rank, adapter.seed, adapter.alpha
    assert numbers == (3, 3, 0.5, 3, 3, 16) and [type(n) for n in numbers] == [int, int, float, int, int, float]
    seeds = StarGraphConfig(seeds=[three, three]).seeds
    assert seeds == [3, 3] and all(type(seed) is int for seed in seeds)


def test_the_seed_of_a_model_may_be_numpys(torch_service: ServiceClient):
    client = torch_service.create_training_client("micro", seed=np.int64(3))  # type: ignore[arg-type]
    assert client.save_state("saved").result().path


def test_help_shows_the_range(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse(RLConfig, ["env=arithmetic", "--help"], {"env": ENVS})
    shown = capsys.readouterr().out
    assert re.search(r"max_tokens +int >= 1 \| None ", shown) and re.search(r"env.n_batches +int >= 1 ", shown)
    assert re.search(r" temperature +float 0.01..2 ", shown)
