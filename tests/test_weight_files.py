"""Weights written by several ranks are read whole."""

from pathlib import Path

import pytest
import torch

from posttrain.backend.ranks import Processes, local_rows
from posttrain.backend.weight_files import FileWeights, read_joined, write_shard


def test_what_ranks_write_is_joined(tmp_path: Path) -> None:
    """With fewer rows than ranks, a tensor of no dimension, a tied head."""
    folder, embedding = tmp_path / "weights", torch.randn(7, 3)
    whole = {"embedding": embedding, "bias": torch.randn(2), "scale": torch.tensor(2.0), "lm_head": embedding}
    for rank in (2, 0, 1):
        with pytest.raises(FileNotFoundError, match="lacks the weights of some ranks"):
            list(read_joined(folder))
        parts = {name: tensor[local_rows(len(tensor), Processes(rank, 3))] if tensor.ndim else tensor
                 for name, tensor in whole.items() if tensor.ndim or rank == 0}  # fmt: skip
        write_shard(folder, rank, 3, parts.items())
    weights = FileWeights(folder)
    for _ in range(2):
        assert {name: torch.equal(tensor, whole[name]) for name, tensor in weights} == dict.fromkeys(whole, True)
    del weights
    assert not folder.exists()
