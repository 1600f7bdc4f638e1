"""Rows of several sequences: packed and by FlexAttention (in its uncompiled form), as whole sequences,
and with a dense mask, give the same logprobs and gradients; what a machine or an architecture does
not allow is refused, or computed with the dense mask. Left out: what only a GPU can compute, which
benchmarks/gpu/attention.py and trainer.py compare there.
"""

# Trap: a window, softcap, scale or sink that a faster kernel leaves out.

import math
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from posttrain.backend import attention
from posttrain.backend.attention import check_setting, dense_mask, kernel_gap, set_packing, tree_mask
from posttrain.backend.batching import WIDTH_BUCKET, MicroBatch, Positions, micro_batches
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError, ModelError
from posttrain.backend.memory_plan import planned
from posttrain.backend.model_checks import MOST_KERNEL_GAP, pack_rows
from posttrain.backend.trainer import Trainer
from posttrain.backend.types import Datum, ModelInput
from tests.architectures import WINDOW, save_random_model
from tests.conftest import gradients, random_tokens, rounded
from tests.test_architectures import datum_of, mixed_data

CPU = torch.device("cpu")
LOGPROB_GAP = 2e-5  # of a logprob in fp32, after two layers computed in another order
GRADIENT_GAP = 1e-5  # relative
PACKED = ["Llama 3", "Qwen 2.5", "Qwen 3", "Mistral, window", "Gemma 2", "Gemma 3", "Phi 4-mini", "OLMo 2"]
PACKED += ["SmolLM 3", "Granite", "gpt-oss", "GPT-2"]
WHOLE = [family for family in PACKED if family not in ("Gemma 2", "gpt-oss")]  # no softcap, no sink


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses its backward pass on a CPU, and has it for checks of its own."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(attention, "FLEX_DEVICES", ("cpu", "cuda"))


def varlen_by_definition(
    q_TND: torch.Tensor,
    k_TND: torch.Tensor,
    v_TND: torch.Tensor,
    starts_N: torch.Tensor,
    _: torch.Tensor,
    longest: int,
    __: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """torch.nn.attention.varlen.varlen_attn of torch 2.11, sequence by sequence."""
    outputs, starts = [], starts_N.tolist()
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (q_TND, k_TND, v_TND))
        assert end - start <= longest and window_size[1] == 0
        places = torch.arange(end - start, device=q_TND.device)
        behind = places[:, None] - places
        seen = (behind >= 0) & ((behind <= window_size[0]) | (window_size[0] < 0))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def packed_trainer(folder: Path, whole: bool) -> Trainer:
    """Its first pass with a dense mask."""
    trainer = Trainer(str(folder), BackendConfig(engine="torch", attention="dense"))
    trainer.whole_sequences = whole
    return trainer


def compare(trainer: Trainer, data_D: list[Datum]) -> None:
    """Logprobs and gradients of packed rows with those of padded rows and a dense mask."""
    expected_D = trainer.run(data_D, "cross_entropy").loss_fn_outputs
    expected = gradients(trainer)
    trainer.zero_grad()
    trainer.packs = True
    set_packing(trainer.base, True)
    assert all(len(batch.tokens_BT) == 1 for batch in trainer._micro_batches(data_D, range(len(data_D))))
    outputs = trainer.run(data_D, "cross_entropy").loss_fn_outputs
    for ours, theirs in zip(outputs, expected_D, strict=True):
        assert np.abs(ours["logprobs"].array - theirs["logprobs"].array).max() < LOGPROB_GAP
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in gradients(trainer).items():
        assert (gradient - expected[name]).norm() < GRADIENT_GAP * (gradient.norm() + largest / 10), name


@pytest.mark.slow
@pytest.mark.parametrize("family", PACKED)
def test_packed_trees_by_flex_attention_are_the_dense_rows(family: str, flex_on_cpu: None, tmp_path: Path) -> None:
    trainer = packed_trainer(save_random_model(family, tmp_path), whole=False)
    assert trainer.shares_prefixes
    compare(trainer, mixed_data())


@pytest.mark.parametrize("family", WHOLE)
def test_packed_sequences_by_flash_attention_are_the_padded_rows(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_definition)
    trainer = packed_trainer(save_random_model(family, tmp_path), whole=True)
    trainer.shares_prefixes = False
    compare(trainer, mixed_data())


@pytest.mark.slow
def test_a_trainer_packs_where_it_is_told_to(flex_on_cpu: None) -> None:
    """And what it saves and samples is the model it was: only its passes change."""
    data_D = mixed_data()
    flex = Trainer("micro", BackendConfig(engine="torch", attention="flex", gradient_checkpointing=True))
    assert flex.packs and flex.shares_prefixes
    flex.run(data_D, "cross_entropy")
    dense = Trainer("micro", BackendConfig(engine="torch", attention="dense"))
    dense.run(data_D, "cross_entropy")
    for name, gradient in gradients(dense).items():
        assert (gradients(flex)[name] - gradient).norm() < rounded(1e-5) * gradient.norm(), name
    tokens = torch.tensor([random_tokens(np.random.default_rng(0), 30)])
    assert torch.equal(flex.base(tokens).logits, dense.base(tokens).logits)


@pytest.mark.slow
def test_packed_rows_are_checked_at_the_widths_of_passes(flex_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: of fewer than 128 columns torch takes another kernel, which no pass meets."""
    widths = []

    def noted(ends_BT: torch.Tensor, *rest: Any) -> attention.TreeMask:
        widths.append(ends_BT.shape[1])
        return tree_mask(ends_BT, *rest)

    monkeypatch.setattr("posttrain.backend.trainer.tree_mask", noted)
    monkeypatch.setattr("posttrain.backend.model_checks.kernel_gap", lambda *_: 0.0)
    assert Trainer("micro", BackendConfig(engine="torch", attention="flex")).packs
    assert widths and all(width % WIDTH_BUCKET == 0 for width in widths)


# --- masks ----------------------------------------------------------------------------------------


def trees(rng: np.random.Generator, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ends and positions of random prompts with answers, one after the other."""
    ends, positions = [], []
    while len(ends) < columns:
        prompt, answers = int(rng.integers(1, 200)), rng.integers(1, 150, int(rng.integers(0, 4)))
        start = len(ends)
        ends += [start + prompt + int(answers.sum())] * prompt
        positions += range(prompt)
        for answer in answers.tolist():
            ends += [len(ends) + answer] * answer
            positions += range(prompt, prompt + answer)
    return torch.tensor([ends[:columns]]).clamp(max=columns), torch.tensor([positions[:columns]])


@pytest.mark.parametrize("columns", [100, 128, 1000, 1024])
@pytest.mark.parametrize("window", [None, 1, 90, 300])
def test_blocks_cover_what_a_dense_mask_shows(columns: int, window: int | None) -> None:
    """No visible pair is in a block that is skipped, no hidden one in a block without a mask, and
    without windows no block is computed in vain."""
    for seed in range(5):
        ends_BT, positions_BT = trees(np.random.default_rng(seed), columns)
        seen_TT = dense_mask(ends_BT, positions_BT, window, torch.float32)[0, 0] == 0
        mask = tree_mask(ends_BT, positions_BT, window)
        blocks = -(-columns // attention.BLOCK)
        padded = torch.zeros(blocks * attention.BLOCK, blocks * attention.BLOCK, dtype=torch.bool)
        padded[:columns, :columns] = seen_TT
        by_block = padded.view(blocks, attention.BLOCK, blocks, attention.BLOCK)
        listed = torch.zeros(2, blocks, blocks, dtype=torch.bool)
        pairs = ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
        for kind, (counts, indices) in enumerate(pairs):
            assert counts is not None and indices is not None
            for query in range(blocks):
                listed[kind, query, indices[0, 0, query, : counts[0, 0, query]].long()] = True
        some, full = by_block.any(3).any(1), listed[1]
        assert not (listed[0] & listed[1]).any()
        assert ((listed[0] | listed[1]) >= some).all()
        assert window is not None or torch.equal(listed[0] | listed[1], some)
        ends = (torch.arange(blocks) + 1).mul(attention.BLOCK).clamp(max=columns) - torch.arange(blocks) * 128
        assert (by_block.sum((1, 3))[full] == (ends[:, None] * ends)[full]).all()
        q, k = torch.arange(columns)[:, None], torch.arange(columns)
        assert torch.equal(mask.mask_mod(torch.tensor(0), torch.tensor(0), q, k), seen_TT)


def test_packed_rows_hold_trees_beyond_1024_tokens() -> None:
    rng = np.random.default_rng(0)
    prompt = random_tokens(rng, 1500)
    data_D = [datum_of(prompt + random_tokens(rng, 300), weightless=1499) for _ in range(4)]

    def batches(**settings: Any) -> Sequence[MicroBatch]:
        return micro_batches(data_D, range(4), 4096, CPU, share=True, bucket=256, **settings)

    (batch,) = batches(packed=True)
    assert tuple(batch.tokens_BT.shape) == (1, 2816)  # 1500 + 4 x 300 - 4, in blocks of 256
    assert batch.starts_N is None
    assert [b.ends_BT for b in batches()] == [None, None]  # four rows of 1,799 tokens
    (dense,) = batches(row_tokens=4096)
    assert dense.ends_BT is not None and batch.ends_BT is not None
    assert torch.equal(dense.ends_BT, batch.ends_BT)


def test_packed_sequences_have_their_starts_and_no_more_tokens_than_the_budget() -> None:
    rng = np.random.default_rng(0)
    data_D = [datum_of(random_tokens(rng, length)) for length in (41, 31, 21, 11, 61)]
    first, second = micro_batches(data_D, range(5), 100, CPU, share=True, packed=True)
    assert first.starts_N is not None and first.starts_N.tolist() == [0, 60, 100] and first.longest == 60
    assert second.starts_N is not None and second.starts_N.tolist() == [0, 30, 50, 60]
    (padded,) = micro_batches(data_D, [2], 100, CPU, share=True, packed=True, bucket=64)
    assert padded.starts_N is not None and padded.starts_N.tolist() == [0, 20, 64] and padded.longest == 44


def test_padded_rows_fill_the_budget_and_no_more() -> None:
    data_D = [datum_of(random_tokens(np.random.default_rng(n), length)) for n, length in enumerate((6, 6, 6, 5, 16))]
    shapes = [tuple(batch.tokens_BT.shape) for batch in micro_batches(data_D, range(5), 10, CPU, share=False)]
    assert shapes == [(1, 15), (2, 5), (2, 5)]  # a longer row goes alone


@pytest.mark.parametrize(("length", "shared"), [(4, False), (12, True)])  # 24 tokens for 28 do not pay; 32 for 44 do
def test_a_prompt_is_shared_where_it_pays(length: int, shared: bool) -> None:
    prompt = list(range(2, 2 + length))
    data_D = [datum_of([*prompt, first, *range(60, 70)], weightless=length - 1) for first in (40, 50)]
    (batch,) = micro_batches(data_D, range(2), 100, CPU, share=True)
    assert (batch.ends_BT is not None) == shared


def seen_by(batch: MicroBatch, positions: Positions) -> list[tuple[int, int, list[int], int, list[int], float]]:
    """Of each position: datum, place there, the tokens it sees, its position id, targets and temperature."""
    tokens_BT, ends_BT, position_BT = batch.tokens_BT, batch.ends_BT, batch.positions_BT
    width, found = tokens_BT.shape[1], []
    for n, (d, place) in enumerate(zip(positions.datum_N.tolist(), positions.position_N.tolist(), strict=True)):
        m = n if positions.computed_N is None else int(positions.computed_N[n])
        b, t = divmod(int(positions.rows_M[m]), width)
        past = [c for c in range(t + 1) if ends_BT is None or ends_BT[b, c] > t]
        number = t if position_BT is None else int(position_BT[b, t])
        temperature = 1.0 if positions.temperature_M is None else float(positions.temperature_M[m])
        found.append((d, place, tokens_BT[b, past].tolist(), number, positions.targets_MK[m].tolist(), temperature))
    return found


# Trap: a position that sees another sequence, or stands twice, or on no rank; shown for any data, not for a model's.
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_every_position_is_there_once_with_its_own_past(share: bool, packed: bool) -> None:
    for seed in range(12):
        rng, budget, ranks, most = np.random.default_rng(seed), 60, 1 + seed % 3, 40
        prompts = [rng.integers(0, 3, 9).tolist(), rng.integers(0, 3, 6).tolist()]
        data_D: list[Datum] = []
        for member in range(14):
            answer = rng.integers(0, 2, int(rng.integers(1, 9))).tolist()
            tokens = [*prompts[member % 5 == 0], *answer]
            mask_T = (np.arange(len(tokens)) >= len(tokens) - len(answer) - 1).astype(np.float32)
            inputs: dict[str, Any] = {"target_tokens": rng.integers(0, 2, len(tokens)), "weights": mask_T}
            if seed % 2 and member > 6:
                inputs["temperature"] = rng.choice([0.5, 2.0], len(tokens)).astype(np.float32)
            data_D.append(Datum(ModelInput.from_ints(tokens), inputs))
        chosen = [d for d in range(14) if d != 5]
        options: dict[str, Any] = {"share": share, "packed": packed, "ranks": ranks, "row_tokens": most, "bucket": 4}
        batches_R = [micro_batches(data_D, chosen, budget, CPU, rank=rank, **options) for rank in range(ranks)]
        assert len({len(batches) for batches in batches_R}) == 1
        found, shared, used_R = [], False, []
        for batches in batches_R:
            used_R.append(0)
            for batch in batches:  # also those that only keep ranks in step
                places = [positions.rows_M for positions in (batch.loss, batch.others)]
                used_R[-1] += len(torch.cat(places).unique())
                shared |= batch.ends_BT is not None and batch.starts_N is None
                height, width = batch.tokens_BT.shape
                assert width % 4 == 0 and height * width <= budget + (4 * height if not packed else 4)
                assert packed or not share or width < most + 4
                weighted = [data_D[d].loss_fn_inputs["weights"].array[p] for d, p, *_ in seen_by(batch, batch.loss)]
                assert all(weighted)
                found += seen_by(batch, batch.loss) + seen_by(batch, batch.others)
        expected = []
        for d in chosen:
            tokens, inputs = data_D[d].model_input.to_ints(), data_D[d].loss_fn_inputs
            temperature_T = inputs["temperature"].array if "temperature" in inputs else np.ones(len(tokens))
            for p, target in enumerate(inputs["target_tokens"].array.tolist()):
                expected.append((d, p, tokens[: p + 1], p, [target], float(temperature_T[p])))
        assert sorted(found) == sorted(expected) and shared == share
        assert max(used_R) - min(used_R) <= most  # no rank has a row more than another
        if share:
            (whole,) = micro_batches(data_D, chosen, 10_000, CPU, share=True, packed=packed, row_tokens=10_000)
            nodes = {(d % 5 == 0, *seen) for d, _, seen, *_ in expected}  # of the prefix tree of each prompt
            assert len(torch.cat([whole.loss.rows_M, whole.others.rows_M]).unique()) == len(nodes)


def test_a_micro_batch_is_made_when_its_turn_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 512 sequences of 32k tokens would hold 670 MB of them."""
    made: list[weakref.ref[MicroBatch]] = []
    logprobs, alive = Trainer._logprobs, []

    def counted(self: Trainer, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        made.append(weakref.ref(batch))
        alive.append(sum(ref() is not None for ref in made))
        return logprobs(self, batch)

    trainer = Trainer("tiny", BackendConfig(micro_batch_tokens=40))
    data_D = [datum_of(random_tokens(np.random.default_rng(n), 30)) for n in range(6)]
    monkeypatch.setattr(Trainer, "_logprobs", counted)
    trainer.run(data_D, "cross_entropy")
    trainer.run_custom(data_D, lambda data, logprobs_D: (torch.cat(logprobs_D).sum(), {}))
    assert len(alive) == 18 and max(alive) <= 2


# --- what a machine or a model does not have --------------------------------------------------------


@pytest.mark.parametrize("setting", ["flex", "varlen"])
def test_a_setting_that_this_machine_lacks_is_refused_before_a_model_is_loaded(setting: Any) -> None:
    with pytest.raises(ConfigError, match=f"backend.attention={setting} needs a GPU.*take dense"):
        Trainer("no such model is looked for", BackendConfig(device="cpu", attention=setting, max_length=64))


def test_flash_attention_has_no_float32() -> None:
    check_setting("varlen", torch.device("cuda"), torch.bfloat16)
    with pytest.raises(ConfigError, match="dtype=bfloat16"):
        check_setting("varlen", torch.device("cuda"), torch.float32)


@pytest.fixture
def tiny_trainer() -> Iterator[Trainer]:
    trainer = Trainer("micro", BackendConfig(engine="torch"))
    yield trainer
    assert not trainer.packs and trainer.base.config._attn_implementation == "sdpa"


def fails(*_: object) -> float:
    raise RuntimeError("no triton\nhere")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (fails, "RuntimeError: no triton here"),
        (lambda *_: 0.5, "differ by 0.5"),
        (lambda *_: math.nan, "differ by nan"),
    ],
)
def test_a_kernel_that_fails_or_is_wrong_is_left_out_with_one_line(
    kernel: Any, reason: str, tiny_trainer: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("posttrain.backend.model_checks.kernel_gap", kernel)
    tiny_trainer.device = torch.device("cuda")
    pack_rows(tiny_trainer)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("rows are padded, not packed (backend.attention=auto): ") and reason in line
    tiny_trainer.config = BackendConfig(attention="flex")
    with pytest.raises(ModelError, match=f"backend.attention=flex: the rows of 'micro' cannot be packed: .*{reason}"):
        pack_rows(tiny_trainer)


def test_a_layer_that_ignores_the_mask_is_found(tiny_trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an architecture would that does not hand it to its kernel."""
    monkeypatch.setattr("posttrain.backend.model_checks.kernel_gap", lambda *_: 0.0)
    monkeypatch.setattr("posttrain.backend.trainer.tree_mask", lambda *_: None)
    monkeypatch.setattr(Trainer, "_masks", lambda self, batch: None)
    tiny_trainer.config = BackendConfig(attention="flex")
    with pytest.raises(ModelError, match="logprobs differ by"):
        pack_rows(tiny_trainer)


@pytest.mark.parametrize("family", ["Qwen 3.5", "LFM 2"])
def test_a_family_with_other_layers_is_refused_by_name(family: str, tmp_path: Path) -> None:
    trainer = Trainer(str(save_random_model(family, tmp_path)), BackendConfig(engine="torch"))
    trainer.config = BackendConfig(attention="flex")
    with pytest.raises(ModelError, match="cannot be packed: its config does not say that all layers are causal"):
        pack_rows(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_of_the_kernels_passes_and_finds_a_wrong_window(
    dtype: torch.dtype, flex_on_cpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainer = Trainer(str(save_random_model("Gemma 2", tmp_path)), BackendConfig(engine="torch"))
    assert trainer.windows == {"sliding_attention": WINDOW, "full_attention": None}
    assert trainer.windows is not None
    gap = kernel_gap(trainer.hf_config, trainer.windows, CPU, dtype, False)
    assert gap < MOST_KERNEL_GAP[dtype] / 3
    monkeypatch.setattr(attention, "tree_mask", lambda ends, positions, window: tree_mask(ends, positions, None))
    wrong = kernel_gap(trainer.hf_config, trainer.windows, CPU, dtype, False)
    assert wrong > 3 * MOST_KERNEL_GAP[dtype]


@pytest.mark.slow
def test_rows_of_4096_shared_tokens_need_no_mask_of_all_pairs(flex_on_cpu: None) -> None:
    """What a forward pass keeps for its backward, and the plan."""
    rng = np.random.default_rng(0)
    prompt = random_tokens(rng, 256)
    data_D = [datum_of(prompt + random_tokens(rng, 257), weightless=255) for _ in range(15)]
    trainer = Trainer("micro", BackendConfig(engine="torch", shared_row_tokens=4096))
    columns: dict[bool, int] = {}
    largest, planned_bytes = {}, {}
    for packed in (False, True):
        trainer.packs = packed
        set_packing(trainer.base, packed)
        (batch,) = trainer._micro_batches(data_D, range(15))
        assert len(batch.tokens_BT) == 1
        columns[packed] = batch.tokens_BT.shape[1]
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: (kept.append(x), x)[1], lambda x: x):
            trainer._hidden(batch)
        largest[packed] = max(x.untyped_storage().nbytes() for x in kept)
        config = BackendConfig(attention="flex" if packed else "dense", shared_row_tokens=4096)
        planned_bytes[packed] = planned("micro", config, None).plan.training.get("masks of shared prefixes", 0)
    # two answers begin alike; packed rows are padded to blocks of 256
    assert columns == {False: 4095, True: 4096}
    # the mask; the MLP's activations
    assert largest == {False: 4095 * 4095 * 4, True: 4096 * 384 * 4}
    assert planned_bytes == {False: 16384 * 4096 * 5, True: 0}
