"""backend.compile changes speed, not numbers; what cannot be compiled runs as it is."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from posttrain.backend.config import BackendConfig
from posttrain.backend.logprobs import _compiled
from posttrain.backend.trainer import Trainer
from tests.conftest import gradients, policy_data, rounded


def trainer(**settings: bool) -> Trainer:
    return Trainer("micro", BackendConfig(engine="torch", **settings))  # type: ignore[arg-type]


@pytest.mark.slow
def test_compiled_passes_have_the_same_logprobs_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    # the graphs are what is compiled; the code that Inductor makes of them takes a minute
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    _compiled.cache_clear()
    plain, compiled = trainer(), trainer(compile=True)
    for data in (policy_data(4), policy_data(7, seed=1, longest=60)):
        theirs, ours = (t.run(data, "importance_sampling").loss_fn_outputs for t in (plain, compiled))
        for a, b in zip(ours, theirs, strict=True):
            assert abs(a["logprobs"].array - b["logprobs"].array).max() < rounded(1e-5)
    assert compiled.compiles
    for name, gradient in gradients(plain).items():
        assert (gradients(compiled)[name] - gradient).norm() <= rounded(1e-4) * gradient.norm() + 1e-6, name
    _compiled.cache_clear()


def test_a_compiler_that_fails_is_switched_off_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    plain, failing = trainer(), trainer(compile=True)

    def fail(*_: object, **__: object) -> object:
        raise RuntimeError("no compiler\nhere")

    for layer in failing.base.get_decoder().layers:  # type: ignore[union-attr]
        layer._compiled_call_impl = fail  # type: ignore[union-attr]
    data = policy_data(4)
    ours, theirs = (t.run(data, "importance_sampling").loss_fn_outputs for t in (failing, plain))
    assert capsys.readouterr().out == "backend.compile fails and is switched off: no compiler here\n"
    # the first batch was padded for the compiler
    pairs = zip(ours, theirs, strict=True)
    assert all(abs(a["logprobs"].array - b["logprobs"].array).max() < rounded(1e-5) for a, b in pairs)
    assert not failing.compiles


def test_passes_may_be_compiled_for_more_shapes_than_torch_allows_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: an adapter or checkpointing needs more than 8 graphs, and torch goes on uncompiled. In torch 2.13 a
    setting made where the model is opened does not hold in the thread of its passes."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    monkeypatch.setattr("posttrain.backend.logprobs._compiled", lambda function: function)
    compiled, limits = trainer(compile=True), []
    layer = compiled.base.get_decoder().layers[0]  # type: ignore[union-attr,index]
    layer.register_forward_pre_hook(lambda *_: limits.append(torch._dynamo.config.recompile_limit))  # type: ignore[union-attr]
    with ThreadPoolExecutor() as thread:
        thread.submit(compiled.run, policy_data(2), "importance_sampling").result()
    assert min(limits) >= 64
