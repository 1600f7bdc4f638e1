"""Options that are one of some names, or true or false, given from Python: a wrong value is an error that names the
option. It was taken for another choice, in silence.
"""

import os
from enum import Enum
from pathlib import Path
from typing import Any

import chz
import pytest

from posttrain.backend import Datum, LoraConfig, ModelInput, SamplingParams, ServiceClient
from posttrain.backend.choices import _allowed, _as_text, _needs, check_choices
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError, CookbookError, DataError
from posttrain.backend.ranges import RangeError
from posttrain.renderers import get_renderer
from posttrain.renderers.types import Message, TrainOnWhat
from posttrain.tracking.export import Config as Export
from posttrain.tracking.run_config import RunConfig
from preference.comparisons import ChosenRejectedBuilder
from rl.distill import Distillation
from rl.evaluate import Config as Evaluation
from rl.kl import KLPenalty
from rl.train import Config as RLConfig
from rl.types import RLDatasetBuilder
from supervised.data import FileBuilder, MixtureBuilder
from supervised.train import Config as SupervisedConfig
from tests.test_option_ranges import _configs

PROMPT = ModelInput.from_ints([1, 2])


def test_every_option_of_every_configuration_takes_its_default_and_no_other_name():
    checked, anything = 0, object()
    for kind in _configs():
        for name, field in chz.chz_fields(kind).items():
            if isinstance(field._default, str | bool):
                assert _needs(field.x_type, field._default) is None, (kind, name)
            if needs := _needs(field.x_type, anything):
                assert needs.endswith("None") or any(word in needs for word in ("a text", "one of", "True or False"))
                checked += 1
    assert checked > 900


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BackendConfig(engine="tocrh"), r"engine='tocrh' must be one of auto, vllm, torch"),  # type: ignore[arg-type]
        (lambda: BackendConfig(compile="false"), "compile='false' must be True or False"),  # type: ignore[arg-type]
        (lambda: FileBuilder(path="a.jsonl", train_on_what="assistant"), "train_on_what='assistant' must be one of"),  # type: ignore[arg-type]
        (lambda: FileBuilder(path="a.jsonl", overlong="cut"), "overlong='cut' must be one of drop, truncate, raise"),  # type: ignore[arg-type]
        (lambda: FileBuilder(path=5), "path=5 must be a text"),  # type: ignore[arg-type]
        (lambda: ChosenRejectedBuilder(path="a.jsonl", empty="keep"), "empty='keep' must be one of drop, raise"),  # type: ignore[arg-type]
        (lambda: _sft(lr_schedule="lineer"), "lr_schedule='lineer' must be one of linear, cosine, constant"),
        (lambda: _sft(tensorboard="false"), "tensorboard='false' must be True or False"),
        (lambda: _sft(wandb_project=7), "wandb_project=7 must be a text or None"),
        (lambda: Export(model="a", out="b", merge="false"), "merge='false' must be True or False"),  # type: ignore[arg-type]
        (lambda: _rl(loss_reduction="mean"), "loss_reduction='mean' must be one of sum, sequence_mean"),
        (lambda: _rl(kl=KLPenalty(where="loss")), r"kl\.where='loss' must be one of advantage, reward"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_name_is_an_error_with_its_path(make: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        make()


def _sft(**options: Any) -> SupervisedConfig:
    return SupervisedConfig(dataset=FileBuilder(path="a.jsonl"), **options)


def _rl(**options: Any) -> RLConfig:
    return RLConfig(env=RLDatasetBuilder(), **options)


def test_objects_within_lists_are_checked_and_paths_and_names_of_an_enum_are_taken():
    text = FileBuilder(path=Path("a.jsonl"), train_on_what="all_tokens")  # type: ignore[arg-type]
    check_choices(MixtureBuilder(builders=[text]))
    assert text.train_on_what == TrainOnWhat.ALL_TOKENS and os.fspath(text.path) == "a.jsonl"
    assert _needs(tuple[str, ...], "abc") == "a list, each a text" and _needs(tuple[str, ...], ["abc"]) is None
    assert _allowed(int, "abc") is None and _needs(int | str, object()) is None  # ranges.py checks numbers
    assert RunConfig(log_path=str(Path("runs/x"))).log_path == "runs/x"


class Colour(Enum):
    RED = "red"


@chz.chz
class _OfAUser(RLDatasetBuilder):
    colour: Colour = Colour.RED
    unnamed: str = None  # type: ignore[assignment]
    parts: list[str] = chz.field(x_type=str, munger=lambda _, value: value.split(","), default="")
    elsewhere: "Elsewhere | None" = None  # type: ignore[name-defined]  # noqa: F821  # under TYPE_CHECKING, or in a function


# Trap: these were refused or ended in a NameError, though chz takes them.
def test_a_builder_of_a_user_may_have_what_chz_takes():
    made = _OfAUser(colour=Colour.RED, unnamed=None, parts="a,b", elsewhere=object())  # type: ignore[arg-type]
    assert _OfAUser() and chz.replace(made, seed=1).parts == ["a", "b"]
    with pytest.raises(ConfigError, match="colour='red' must be one of"):
        _OfAUser(colour="red")  # type: ignore[arg-type]


# Trap: a teacher's Path ended in "no attribute 'split'", and an evaluation of one after its last problem: not JSON.
def test_a_path_is_the_text_that_its_option_is():
    path: Any = Path("runs/teacher")
    config = _rl(model_name=path, distill=Distillation(teacher=path, teachers={"sums": path}))
    assert (config.model_name, config.distill.paths()) == (
        "runs/teacher",
        {"": ["runs/teacher"], "sums": ["runs/teacher"]},
    )
    assert Evaluation(models=[path, "b"]).models == ["runs/teacher", "b"]
    assert _as_text(Path | str, path) is _as_text(Any, path) is path and _as_text(list, [path]) == [path]


def test_the_clients_name_what_they_cannot_take(torch_service: ServiceClient):
    service, optimizer = torch_service, "models are trained with AdamW here"
    client = service.create_training_client("micro")
    sampler = client.save_weights_and_get_sampling_client()
    inputs = {"target_tokens": [1, 2], "logprobs": [-1.0, -1.0], "advantages": [1.0, 1.0]}
    datum, misspelt = Datum(PROMPT, inputs), Datum(PROMPT, inputs | {"clip_low_treshold": [0.9, 0.9]})
    calls: list[tuple[Any, type[CookbookError], str]] = [
        (lambda: service.create_lora_training_client("micro", optimizer="sgd"), ConfigError, optimizer),
        (lambda: service.create_lora_training_client("micro", optimizer={"type": "muon"}), ConfigError, optimizer),
        (lambda: service.create_lora_training_client("micro", train_mlp="false"), RangeError, "train_mlp='false'"),  # type: ignore[arg-type]
        (lambda: service.create_training_client("micro", {"rank": 8}), ConfigError, "is no LoraConfig"),  # type: ignore[arg-type]
        (lambda: service.create_training_client("micro", None, "1"), RangeError, "seed='1'"),  # type: ignore[arg-type]
        (lambda: service.create_training_client(None), CookbookError, "None is no model"),  # type: ignore[arg-type]
        (lambda: service.create_sampling_client(model_path=""), CookbookError, "None is no model"),
        (lambda: service.create_training_client_from_state(5), CookbookError, "5 is no checkpoint"),  # type: ignore[arg-type]
        (lambda: ServiceClient({"engine": "torch"}), ConfigError, "is no BackendConfig"),  # type: ignore[arg-type]
        (lambda: client.forward_backward([datum], None).result(), ConfigError, "loss_fn=None is neither"),  # type: ignore[arg-type]
        (lambda: client.forward_backward_custom([datum], "ppo"), ConfigError, "loss_fn='ppo'"),  # type: ignore[arg-type]
        (lambda: client.forward([misspelt], "ppo").result(), DataError, "did you mean 'clip_low_threshold'"),
        (lambda: sampler.sample(PROMPT, 1, SamplingParams(stop=[10**6])), RangeError, "stop=1000000"),
        *(
            (lambda name=name: client.save_state(name), ConfigError, "no name of a checkpoint")
            for name in ("", ".", "..", 5, "a\0b")
        ),
    ]
    for call, kind, message in calls:
        with pytest.raises(kind, match=message):
            call()
    for named in ("adamw", {"type": "adamw"}, None):
        assert service.create_lora_training_client("micro", 4, optimizer=named).get_info().lora_rank == 4
    assert service.create_training_client("micro", LoraConfig(2)).get_info().is_lora


# Trap: an unknown name trained on all messages, the user's too.
def test_a_renderer_refuses_an_unknown_choice_of_messages(torch_service: ServiceClient):
    renderer = get_renderer("plain", torch_service.create_training_client("micro").get_tokenizer())
    messages = [Message(role="user", content="1+1="), Message(role="assistant", content="2")]
    with pytest.raises(ConfigError, match="train_on_what='assistant' must be one of last_assistant_message"):
        renderer.build_supervised_example(messages, "assistant")  # type: ignore[arg-type]
    named = renderer.build_supervised_example(messages, "all_assistant_messages")  # type: ignore[arg-type]
    assert named == renderer.build_supervised_example(messages)
