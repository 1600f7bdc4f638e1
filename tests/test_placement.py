"""Layouts that cannot work are refused before a process starts, with the arithmetic."""

import os
import sys
from pathlib import Path

import pytest
import torch

from posttrain.backend import extras
from posttrain.backend.cluster import Cluster
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.models import PRESETS
from posttrain.backend.placement import check_gpus, check_heads, check_placement, gpus_needed, uses_cluster
from posttrain.backend.ranks import check_own_gpus
from posttrain.backend.ray_process import gpus_left_to_ray


def refused(check, *arguments) -> str:  # noqa: ANN001
    with pytest.raises(ConfigError) as raised:
        check(*arguments)
    text = str(raised.value)
    assert "\n" not in text
    return text


def test_one_process_needs_no_cluster() -> None:
    imported = "ray" in sys.modules  # by another test
    assert not uses_cluster(BackendConfig())
    check_placement(BackendConfig())
    assert ("ray" in sys.modules) == imported


@pytest.mark.parametrize(
    ("config", "gpus_of_nodes", "text"),
    [
        (
            BackendConfig(trainer_processes=4, sampler_replicas=2, tensor_parallel=4),
            [8],
            "4 trainer processes and 2 replicas of 4 GPUs need 12 GPUs; this cluster has 8",
        ),
        (
            BackendConfig(sampler_replicas=1),
            [1],
            "1 trainer process and 1 replica need 2 GPUs; this cluster has 1. backend.replicas_share_gpu=true puts the "
            "replicas beside the trainer",
        ),
        (BackendConfig(trainer_processes=8), [4, 2], "8 trainer processes need 8 GPUs; this cluster has 6"),
        (
            BackendConfig(trainer_processes=2, sampler_replicas=1, tensor_parallel=8),
            [4, 4, 4],
            "a replica of 8 GPUs (backend.tensor_parallel) does not fit a node: the largest has 4",
        ),
    ],
)
def test_too_few_gpus(config: BackendConfig, gpus_of_nodes: list[int], text: str) -> None:
    assert refused(check_gpus, config, gpus_of_nodes) == text


def test_two_ranks_on_one_gpu_are_refused() -> None:
    check_own_gpus(["GPU-1", "GPU-2"])
    text = refused(check_own_gpus, ["GPU-1", "GPU-1"])
    assert "2 training processes were started on 1 GPU, and each needs one of its own" in text


def test_replicas_beside_the_trainer_see_its_gpu_and_ray_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cluster = object.__new__(Cluster)
    cluster.config = BackendConfig(sampler_replicas=2, replicas_share_gpu=True)
    for visible, own, trainers in (("", "1", "0"), ("3,1", "1", "3")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with gpus_left_to_ray(BackendConfig(sampler_replicas=1)):
            assert os.environ["CUDA_VISIBLE_DEVICES"] == own
        with gpus_left_to_ray(cluster.config):
            assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
        assert os.environ["CUDA_VISIBLE_DEVICES"] == visible
        assert cluster._environment()["CUDA_VISIBLE_DEVICES"] == trainers


@pytest.mark.parametrize(
    ("config", "needed", "gpus_of_nodes"),
    [
        (BackendConfig(trainer_processes=4, sampler_replicas=4), 8, [8]),
        (BackendConfig(sampler_replicas=4, replicas_share_gpu=True), 1, [1]),
        (BackendConfig(trainer_processes=4, sampler_replicas=4), 8, [0]),  # on CPUs processes share the cores
    ],
)
def test_layouts_that_fit(config: BackendConfig, needed: int, gpus_of_nodes: list[int]) -> None:
    assert gpus_needed(config) == needed
    check_gpus(config, gpus_of_nodes)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cluster": "auto"}, "backend.cluster=auto is for several processes"),
        ({"sync_dir": "/shared"}, "backend.sync_dir=/shared is for several processes"),
        ({"tensor_parallel": 2}, "set backend.sampler_replicas"),
        ({"tensor_parallel": 2, "sampler_replicas": 1, "engine": "torch"}, "leave backend.engine=torch out"),
        ({"sampler_replicas": 1, "share_engines": True}, "backend.share_engines=true is for engines in this process"),
        ({"replicas_share_gpu": True}, "set backend.sampler_replicas, and leave"),
        (
            {"replicas_share_gpu": True, "sampler_replicas": 2, "trainer_processes": 2},
            "beside a trainer in this process",
        ),
        ({"trainer_processes": 2, "moments": "8bit"}, "set backend.trainer_sharding=replicate"),
    ],
)
def test_options_that_contradict_each_other(options: dict, text: str) -> None:
    assert text in refused(check_placement, BackendConfig(**options))


def test_without_ray_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "is_installed", lambda package: False)
    text = refused(check_placement, BackendConfig(trainer_processes=2))
    command = "pip install -e '.[cluster]' in the project's folder"
    assert text == f"a run in several processes needs ray, which is not installed: {command}"


def test_attention_heads_are_divided_evenly() -> None:
    heads = PRESETS["tiny"].num_attention_heads
    check_heads(BackendConfig(tensor_parallel=2, sampler_replicas=1), PRESETS["tiny"])
    text = refused(check_heads, BackendConfig(tensor_parallel=3, sampler_replicas=1), PRESETS["tiny"])
    assert text == f"backend.tensor_parallel=3 does not divide the model's {heads} attention heads"


def test_only_two_files_import_ray() -> None:
    root = Path(extras.__file__).parents[2]
    importers = {
        str(path.relative_to(root))
        for top in ("posttrain", "rl", "supervised", "preference", "envs", "recipes")
        for path in (root / top).rglob("*.py")
        if any(line.strip().startswith(("import ray", "from ray")) for line in path.read_text().splitlines())
    }
    assert importers == {"posttrain/backend/cluster.py", "posttrain/backend/ray_process.py"}
