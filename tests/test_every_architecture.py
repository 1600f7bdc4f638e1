"""Every causal language model that the installed transformers has is right, or refused with a reason:
open, logprobs of rows in a batch and alone, in passes that recompute their activations; the torch
sampler; adapters, merged and read by peft. Of types that read pictures or sound besides, the text model
in them gives the logprobs of the whole one. Left out: the checks of test_architectures.py that take
longer, and types with pictures or sound of whose text model transformers has no class of its own.

`POSTTRAIN_WRITE_DOCS=1 pytest tests/test_every_architecture.py` rewrites the list in
docs/architectures.md.
"""

# Trap: a model whose passes are wrong without a word: dropout and routers' noise in training mode, positions
# of padding, tied layers under adapters, states that a cache loses, logits with a factor of their own.

import copy
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from posttrain.backend.architectures import FULL_ATTENTION, WINDOWED_ATTENTION, vocabulary_of
from posttrain.backend.config import BackendConfig
from posttrain.backend.engine import SequenceRequest
from posttrain.backend.errors import ConfigError, ModelError
from posttrain.backend.fake_models import _tensors, cached_bytes
from posttrain.backend.lora_layers import add_lora
from posttrain.backend.merged_lora import base_weights, layer_updates, merged_weights
from posttrain.backend.models import model_config
from posttrain.backend.text_models import check_text_only, text_model_of
from posttrain.backend.tokenizers import character_tokenizer
from posttrain.backend.torch_sampler import TorchSampler
from posttrain.backend.trainer import Trainer
from posttrain.backend.types import LoraConfig, SamplingParams
from tests.architectures import CONTEXT, VOCABULARY, WINDOW
from tests.conftest import random_tokens
from tests.every_architecture import NOT_SHRUNK, OWN, random_model, save, shrunk
from tests.test_architectures import DOCS, datum_of, full_logprobs, of_targets

ATOL = 1e-3  # of a logprob in fp32
CPU = torch.device("cpu")
# Types with states that are not planned: their code reads numbers, which a fake pass has not.
UNPLANNED = ("qwen4_exp_text",)
# In the quick tests: a fault each that was silent or let a run fail.
QUICK = ("mixtral", "falcon", "bart", "llama4_text", "phi", "laguna", "nemotron_h")


TYPES = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
KINDS = [*TYPES, *(kind for kind in OWN if "+" in kind and kind.partition("+")[0] in TYPES)]


@dataclass(frozen=True)
class Verdict:
    """Reasons of refusals; empty where it is right."""

    trainer: str = ""
    lora: str = ""
    sampler: str = ""


@cache
def verdict(kind: str) -> Verdict:
    """AssertionError where the type is neither right nor refused."""
    if refused := _refused_by_its_config(kind):
        return Verdict(refused, refused, refused)
    model = random_model(kind)
    rng = np.random.default_rng(3)
    prompt = random_tokens(rng, WINDOW + 5)
    sequences = [*(prompt + random_tokens(rng, length) for length in (6, 9)), random_tokens(rng, 3 * WINDOW)]
    with TemporaryDirectory() as name:
        folder = save(model, Path(name) / "model")
        if refused := _reason(lambda: check_trainer(folder, model, sequences), kind, folder):
            return Verdict(refused, refused, refused)
        if contains_text_model(kind):  # which stands in the list by its own name
            return Verdict()
        return Verdict(
            "",
            _reason(lambda: check_adapter(model, sequences[0]), kind, folder),
            _reason(lambda: check_sampler(model, [sequences[0], sequences[2]]), kind, folder),
        )


def _refused_by_its_config(kind: str) -> str:
    if kind in NOT_SHRUNK:
        return f"not looked at: {NOT_SHRUNK[kind]}"
    with TemporaryDirectory() as name:
        shrunk(kind).save_pretrained(folder := Path(name))
        return _reason(lambda: check_text_only("it", model_config(str(folder))), kind, folder)


def contains_text_model(kind: str) -> bool:
    return kind not in NOT_SHRUNK and text_model_of(shrunk(kind)) is not None


def _reason(check: Any, kind: str, folder: Path) -> str:
    try:
        check()
    except ModelError as error:
        assert "\n" not in str(error)
        text = str(error).replace(f"'{folder}'", "it").replace(f"'{kind}'", "it")
        return text.removeprefix("it ").removeprefix(f"{kind} ")
    return ""


def check_trainer(folder: Path, model: PreTrainedModel, sequences: list[list[int]]) -> None:
    """A batch, in a pass with gradients, whose layers recompute their activations where they can. Two of it share a
    prompt that is longer than the windows: in one row, where the type's name says that it may be."""
    try:
        trainer = Trainer(str(folder), BackendConfig(gradient_checkpointing=True))
    except ConfigError as error:
        assert "cannot recompute" in str(error)
        trainer = Trainer(str(folder), BackendConfig())
    named = {*FULL_ATTENTION.split(), *WINDOWED_ATTENTION.split()}
    assert trainer.shares_prefixes or model.config.get_text_config().model_type not in named
    data_D = [datum_of(tokens, weightless=WINDOW) for tokens in sequences]
    # of one that also speaks; of Llama 4, whose whole model transformers 5.24 fails to pass text through
    model = getattr(model, "language_model" if model.config.model_type == "llama4" else "thinker", model)
    outputs = trainer.run(data_D, "cross_entropy").loss_fn_outputs
    for datum, output in zip(data_D, outputs, strict=True):
        expected = of_targets(full_logprobs(model, datum.model_input.to_ints()), datum)
        assert np.abs(output["logprobs"].array - expected).max() < ATOL
    assert all(torch.isfinite(p.grad).all() for p in trainer.named_trainable.values() if p.grad is not None)


def check_adapter(model: PreTrainedModel, tokens: list[int]) -> None:
    """Merged it computes what it computes beside the weights; peft reads all its tensors again."""
    adapted: Any = add_lora(copy.deepcopy(model), "", LoraConfig(rank=2, alpha=4.0), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    saved = {
        name: tensor.clone() for name, tensor in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()
    }
    expected = full_logprobs(adapted, tokens)
    merged = copy.deepcopy(model)
    live, base = merged.state_dict(), adapted.get_base_model()
    for name, tensor in merged_weights(base_weights(base), layer_updates(base), torch.float32):
        live[name].copy_(tensor)
    assert (full_logprobs(merged, tokens) - expected).abs().max() < ATOL
    assert (full_logprobs(model, tokens) - expected).abs().max() > 10 * ATOL
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.zero_()
    set_peft_model_state_dict(adapted, saved)
    assert (full_logprobs(adapted, tokens) - expected).abs().max() < ATOL


def check_sampler(model: PreTrainedModel, prompts: list[list[int]]) -> None:
    """Groups of two whose prompts differ in length, and whose sequences end one after the other. Their cache is as
    large as is planned."""
    sampler = TorchSampler(copy.deepcopy(model), character_tokenizer(CONTEXT), CONTEXT, BackendConfig(), CPU)
    cache = sampler._prefill(prompts[:1])[2]
    tensors = [tensor for layer in cache.layers for tensor in _tensors(vars(layer)) if tensor.ndim]
    states, per_token = cached_bytes(model.config, itemsize=4)
    held = sum(tensor.nbytes for tensor in tensors)
    assert held <= states + len(prompts[0]) * per_token or model.config.model_type in UNPLANNED  # windows hold less
    for d, prompt in enumerate(prompts):
        for member in range(2):
            params = SamplingParams(max_tokens=3 + d + member, temperature=0.8, stop=[])
            sampler.add(SequenceRequest(prompt, params, 3 + d + member, seed=2 * d + member))
    answers = [answer for _ in prompts for answer in sampler.step()]
    assert len(answers) == 2 * len(prompts)
    for request, sampled in answers:
        tokens = sampled.sequence.tokens
        logprobs_TV = full_logprobs(model, [*request.prompt, *tokens], 0.8)[len(request.prompt) - 1 : -1]
        expected = logprobs_TV.gather(-1, torch.tensor(tokens)[:, None])[:, 0].numpy()
        assert np.abs(np.array(sampled.sequence.logprobs) - expected).max() < ATOL


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in KINDS]
)
def test_a_type_is_right_or_refused(kind: str) -> None:
    verdict(kind)


def listed() -> list[str]:
    """The lines of docs/architectures.md: types by what was found."""
    found: dict[str, list[str]] = defaultdict(list)
    for kind in KINDS:
        of = verdict(kind)
        if of.trainer:
            looked_at = not of.trainer.startswith("not looked at")
            found["refused: " * looked_at + _general(of.trainer)].append(kind)
            continue
        right = "right, as the text model in it" if contains_text_model(kind) else "right, with adapters"
        found[right if not of.lora else f"right; adapters refused: {_general(of.lora)}"].append(kind)
        if of.sampler:
            found[f"not sampled with torch: {_general(of.sampler)}"].append(kind)
    rows = [
        f"| {what} | {', '.join(f'`{kind}`' for kind in kinds)} |" for what, kinds in sorted(found.items(), key=_order)
    ]
    head = f"transformers {transformers.__version__}, {len(TYPES)} types:"
    return [head, "", "| what was found | `model_type` |", "| --- | --- |", *rows]


def _general(reason: str) -> str:
    """Without the numbers and names of one type."""
    reason = re.sub(r"^('?\w+'? )?cannot be used: transformers [\d.]+ (.*?) with .*", r"transformers \2", reason)
    reason = re.sub(r" \(\w+\)(?=[:,])|: a token's logprobs differ.*|: train all.*| \(relative\)", "", reason)
    reason = re.sub(r"(?<=^cannot be opened: )[\w.-]+ (?=reads|is not)| \(\d+, such as .*", "", reason).removeprefix(
        "'it' "
    )
    return re.sub(r"differ by [\d.e-]+", "differ", reason).removeprefix("cannot be sampled from with torch: ")


def _order(entry: tuple[str, list[str]]) -> tuple[int, int]:
    what, kinds = entry
    starts = ("right, with adapters", "right;", "not sampled", "right, as", "refused", "not looked")
    return starts.index(next(start for start in starts if what.startswith(start))), -len(kinds)


@pytest.mark.slow
def test_the_list_in_docs_says_what_was_found() -> None:
    before, after = DOCS.read_text().split("<!-- every type -->\n")[::2]
    written = "\n".join([*listed(), ""]).join(["<!-- every type -->\n"] * 2)
    if os.environ.get("POSTTRAIN_WRITE_DOCS"):
        DOCS.write_text(before + written + after)
    if f"transformers {transformers.__version__}," in DOCS.read_text():  # another has other types
        assert DOCS.read_text() == before + written + after, "POSTTRAIN_WRITE_DOCS=1 rewrites it"


def test_tokens_are_those_that_a_model_both_reads_and_writes() -> None:
    model = random_model("llama")
    assert vocabulary_of(model) == VOCABULARY
    model.set_output_embeddings(torch.nn.Linear(64, VOCABULARY - 8, bias=False))  # as Apertus 1.5's and Inkling 2's
    assert vocabulary_of(model) == VOCABULARY - 8
