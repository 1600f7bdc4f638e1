"""Every family of tests/architectures.py is right in all passes, full and with LoRA, or refused
with its reason; the table in docs says which.

The measure is the logits of transformers' own forward of one sequence. `POSTTRAIN_WRITE_DOCS=1
pytest tests/test_architectures.py` rewrites the table in docs/architectures.md. Left out: vLLM,
whose column is that of tests/test_vllm_architectures.py.
"""

# Trap: a family whose windows, recurrent layers, experts or softcaps make a pass wrong.

import asyncio
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ModelError
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.trainer import Trainer
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams
from tests.architectures import FAMILIES, NOT_WITH_VLLM, WINDOW, save_random_model
from tests.conftest import ROOT, full_logits, gradients, random_tokens

DOCS = ROOT / "docs" / "architectures.md"
ATOL = 2e-4  # of a logprob in fp32, after two layers computed in another order
ADAPTERS = {"full": None, "lora": LoraConfig(rank=4)}
# Whatever is not listed here must say True: no recurrent or convolution layer.
UNSHARED = {"Qwen 3.5", "LFM 2"}


@dataclass(frozen=True)
class Verdict:
    shared: bool
    adapted: str  # the ends of the names of the layers that LoRA was put on


@cache
def verdict(family: str, kind: str) -> Verdict | str:
    """What was found, or the reason why the family is refused; AssertionError where it is neither
    right nor refused.
    """
    with (
        TemporaryDirectory() as name,
        ServiceClient(BackendConfig(engine="torch"), Path(name) / "checkpoints") as service,
    ):
        folder = save_random_model(family, Path(name) / "model")
        try:
            client = service.create_training_client(str(folder), ADAPTERS[kind])
        except ModelError as error:
            return str(error).replace(str(folder), "it")
        move_every_weight(client)
        trainer: Any = client._trainer
        data_D = mixed_data()
        expected_D = [full_logprobs(trainer.base, datum.model_input.to_ints()) for datum in data_D]
        check_passes(trainer, data_D, expected_D)
        check_gradients(trainer, data_D[:4])
        sampler = client.save_weights_and_get_sampling_client()
        check_sampler(sampler, trainer.base, data_D)
        check_checkpoint(client, service, folder, data_D[0], expected_D[0])
        return Verdict(trainer.shares_prefixes, adapted_layers(trainer))


def move_every_weight(client: TrainingClient) -> None:
    """By hand, as experts that no token meets have no gradient; then by a step, as loops do."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        trainer: Any = client._trainer
        for parameter in trainer.named_trainable.values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    client.forward_backward([datum_of(random_tokens(np.random.default_rng(5), 40))], "cross_entropy").result()
    client.optim_step(AdamParams(1e-3)).result()


def datum_of(tokens: list[int], weightless: int = 0) -> Datum:
    weights = np.ones(len(tokens) - 1, dtype=np.float32)
    weights[:weightless] = 0
    return Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": np.array(tokens[1:]), "weights": weights})


def mixed_data() -> list[Datum]:
    """Three continuations of one prompt, and sequences that stand alone: all longer than a window,
    one much longer.
    """
    rng = np.random.default_rng(3)
    prompt = random_tokens(rng, 2 * WINDOW + 5)
    shared = [datum_of(prompt + random_tokens(rng, length), weightless=len(prompt) - 1) for length in (9, 14, 20)]
    return [*shared, *(datum_of(random_tokens(rng, length)) for length in (WINDOW + 8, 4 * WINDOW))]


@torch.no_grad()
def full_logprobs(model: PreTrainedModel | PeftModel, tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    return (full_logits(model, tokens) / temperature).log_softmax(-1)


def of_targets(logprobs_TV: torch.Tensor, datum: Datum) -> np.ndarray:
    targets_T = datum.loss_fn_inputs["target_tokens"].to_torch()
    return logprobs_TV.gather(-1, targets_T[:, None])[:, 0].numpy()


def check_passes(trainer: Trainer, data_D: list[Datum], expected_D: list[torch.Tensor]) -> None:
    """Alone, padded, and with shared prefixes, where that is allowed; positions of weight 0 as
    well.
    """
    shares = trainer.shares_prefixes
    alone = [trainer.run([datum], "cross_entropy", backward=False).loss_fn_outputs[0] for datum in data_D]
    packs = trainer.packs  # on a GPU: then every row has ends
    trainer.shares_prefixes = False
    padded = trainer.run(data_D, "cross_entropy", backward=False).loss_fn_outputs
    assert packs or all(batch.ends_BT is None for batch in trainer._micro_batches(data_D, range(len(data_D))))
    trainer.shares_prefixes = shares
    shared = trainer.run(data_D, "cross_entropy", backward=False).loss_fn_outputs
    assert packs or shares == any(
        batch.ends_BT is not None for batch in trainer._micro_batches(data_D, range(len(data_D)))
    )
    for name, outputs in (("alone", alone), ("padded", padded), ("shared", shared)):
        for datum, output, expected_TV in zip(data_D, outputs, expected_D, strict=True):
            gap = np.abs(output["logprobs"].array - of_targets(expected_TV, datum)).max()
            assert gap < ATOL, f"{name}: {gap:.2g}"


def check_gradients(trainer: Trainer, data_D: list[Datum]) -> None:
    """Of the pass that training does, against autograd through the full logits."""
    trainer.zero_grad()
    trainer.run(data_D, "cross_entropy")
    found = gradients(trainer)
    trainer.zero_grad()
    for datum in data_D:
        logits_TV = full_logits(trainer.base, datum.model_input.to_ints())
        weights_T, targets_T = (datum.loss_fn_inputs[key].to_torch() for key in ("weights", "target_tokens"))
        (nn.functional.cross_entropy(logits_TV, targets_T, reduction="none") * weights_T).sum().backward()
    expected = gradients(trainer)
    trainer.zero_grad()
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        other = found.get(name, torch.zeros_like(gradient))
        assert (other - gradient).norm() < 1e-3 * gradient.norm() + 1e-5 * largest, name


def check_sampler(sampler: SamplingClient, model: PreTrainedModel | PeftModel, data_D: list[Datum]) -> None:
    """Prompts of all lengths in one batch, so padded on the left; rows end one after the other;
    decoded through the cache.
    """

    async def sample() -> list:
        return await asyncio.gather(
            *(
                sampler.sample_async(
                    datum.model_input, 2, SamplingParams(max_tokens=4 + 5 * d, seed=d, temperature=0.8, stop=[]), True
                )
                for d, datum in enumerate(data_D)
            )
        )

    for datum, response in zip(data_D, asyncio.run(sample()), strict=True):
        prompt = datum.model_input.to_ints()
        for sequence in response.sequences:
            logprobs_TV = full_logprobs(model, prompt + sequence.tokens, 0.8)[len(prompt) - 1 : -1]
            expected = logprobs_TV.gather(-1, torch.tensor(sequence.tokens)[:, None])[:, 0].numpy()
            assert np.abs(np.array(sequence.logprobs) - expected).max() < ATOL, "sampled"
        expected = of_targets(full_logprobs(model, prompt), datum)[:-1]
        assert np.abs(np.array(response.prompt_logprobs[1:]) - expected).max() < ATOL, "prompt"


def check_checkpoint(
    client: TrainingClient, service: ServiceClient, base: Path, datum: Datum, expected_TV: torch.Tensor
) -> None:
    """transformers, or peft on the base model, reads what was saved; so do a new trainer and a new
    sampler of ours.
    """
    trainer: Any = client._trainer
    path, tokens = client.save_state("saved").result().path, datum.model_input.to_ints()
    # Trap: SDPA, transformers' default, leaves out the softcap of Gemma 2's scores.
    theirs = AutoModelForCausalLM.from_pretrained(
        base if trainer.lora else path, dtype=torch.float32, attn_implementation="eager"
    )
    if trainer.lora:
        theirs = PeftModel.from_pretrained(theirs, path)
    assert (full_logprobs(theirs.eval(), tokens) - expected_TV).abs().max() < ATOL
    again = service.create_training_client_from_state_with_optimizer(path)
    output = again.forward([datum], "cross_entropy").result().loss_fn_outputs[0]
    assert np.abs(output["logprobs"].array - of_targets(expected_TV, datum)).max() < ATOL
    frozen = service.create_sampling_client(model_path=client.save_weights_for_sampler("sampler").result().path)
    logprobs = frozen.compute_logprobs(datum.model_input).result()
    assert np.abs(np.array(logprobs[1:]) - of_targets(expected_TV, datum)[:-1]).max() < ATOL


def adapted_layers(trainer: Trainer) -> str:
    names = {name.rsplit(".", 1)[-1] for name, module in trainer.base.named_modules() if hasattr(module, "lora_A")}
    return ", ".join(sorted(names))


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_right_in_every_pass_or_refused(family: str, kind: str) -> None:
    found = verdict(family, kind)
    assert isinstance(found, Verdict), found
    assert found.shared == (family not in UNSHARED)


def table() -> list[str]:
    """The rows of docs/architectures.md, from what was found."""
    rows = [
        "| family | `model_type` | full | LoRA on | prefixes shared | torch sampler | vLLM on a CPU |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for family, config in FAMILIES.items():
        full, lora = verdict(family, "full"), verdict(family, "lora")
        cells = [
            "yes" if isinstance(full, Verdict) else full,
            lora.adapted if isinstance(lora, Verdict) else lora,
            "yes" if isinstance(full, Verdict) and full.shared else "no",
            # a verdict is given only where it is right
            "yes" if isinstance(full, Verdict) else "no",
            f"no: {NOT_WITH_VLLM[family]}" if family in NOT_WITH_VLLM else "yes",
        ]
        rows.append(f"| {family} | `{config().model_type}` | {' | '.join(cells)} |")
    return rows


def test_the_table_in_docs_says_what_was_found() -> None:
    before, after = DOCS.read_text().split("<!-- table -->\n")[::2]
    written = "\n".join([*table(), ""]).join(["<!-- table -->\n"] * 2)
    if os.environ.get("POSTTRAIN_WRITE_DOCS"):
        DOCS.write_text(before + written + after)
    assert DOCS.read_text() == before + written + after, "POSTTRAIN_WRITE_DOCS=1 rewrites it"
