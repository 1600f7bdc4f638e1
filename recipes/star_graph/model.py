"""The policy of the star-graph recipes: a small GPT-2 (0.1M parameters) with random weights and the
numeral tokenizer, as a Hugging Face folder. Its config records the graphs' size.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from envs.star_graph import StarGraph
from envs.star_graph_tokens import numeral_tokenizer
from posttrain.backend.atomic_folder import atomic_folder
from posttrain.backend.errors import CheckpointError
from posttrain.backend.random_state import drawn_from
from posttrain.tracking.stages import Stage, run_stages

INIT_STD = 0.08  # with GPT-2's 0.02 a narrow model takes several times as long to learn look-ups
SIZES = {"num_layers": 2, "num_heads": 4, "hidden": 64}


async def make_model(graph: StarGraph, path: str | Path, seed: int = 0, **sizes: int) -> Path:
    """Writes the folder, unless it exists with the same settings, and returns its path."""
    stage = model_stage(graph, Path(path), seed, sizes)
    await run_stages([stage])
    return stage.path


def model_stage(graph: StarGraph, path: Path, seed: int, sizes: Mapping[str, int] = {}, name: str = "model") -> Stage:
    """`sizes`: those that are not SIZES."""
    settings: dict[str, Any] = {"graph": graph, "seed": seed, **SIZES, **sizes}
    return Stage(name, path, settings, partial(_write_model, path=path, **settings))


def _write_model(path: Path, graph: StarGraph, seed: int, num_layers: int, num_heads: int, hidden: int) -> None:
    config = GPT2Config(
        vocab_size=graph.vocab_size,
        n_positions=graph.length + 1,
        n_layer=num_layers,
        n_head=num_heads,
        n_embd=hidden,
        initializer_range=INIT_STD,
        eos_token_id=graph.eos,
        bos_token_id=None,
        pad_token_id=graph.pad,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    config.star_graph = [graph.num_paths, graph.path_length, graph.num_nodes]  # type: ignore[attr-defined]
    with drawn_from(seed):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with atomic_folder(path) as folder:
        model.save_pretrained(folder)
        numeral_tokenizer(graph).save_pretrained(folder)


def check_model(path: str | Path, graph: StarGraph) -> None:
    """CheckpointError if the folder is no model, or a model of graphs of another size."""
    if not (Path(path) / "config.json").exists():
        raise CheckpointError(f"{path} has no config.json: it is not a checkpoint of a model")
    made_for = getattr(AutoConfig.from_pretrained(path), "star_graph", None)
    if made_for is None:
        raise CheckpointError(f"{path} was not made for star graphs: make one with recipes/star_graph/model.py")
    if StarGraph(*made_for) != graph:
        d, length, nodes = made_for
        raise CheckpointError(
            f"{path} was trained on G({d},{length}) over {nodes} nodes, not on {graph.name} over {graph.num_nodes}: "
            "choose the same size, or another checkpoint"
        )
