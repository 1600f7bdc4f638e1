"""What the tests share: no network, one vLLM engine for all of them (it takes ten seconds to
start), small ragged data.
"""

import gc
import io
import os
import random
import re
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# Ray would kill its processes for the memory that others take on this machine.
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import envs.sandbox
import posttrain.backend.config
from posttrain.backend.alarms import BF16_LIMIT, LIMITS
from posttrain.backend.cluster import Cluster
from posttrain.backend.config import BackendConfig
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import Datum, ModelInput, SampledSequence, SampleResponse, SamplingParams
from posttrain.backend.vllm_settings import vllm_is_installed
from rl.data_processing import rows_of, with_advantages
from rl.types import TrajectoryGroup
from tests.heap import UNFREEZE, freeze_for_good

ROOT = Path(__file__).parent.parent
VOCABULARY = 260
NO_VLLM = "vLLM is not installed"
SAVEFIG = Figure.savefig
# The same examples in every run, however slow the machine is.
hypothesis.settings.register_profile(
    "suite", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")
# The suite computes in fp32 on every device: its tolerances are fp32's, and here they are scaled to the
# device. bf16 is tested where a test asks for it.
posttrain.backend.config.AUTO_DTYPES["cuda"] = "float32"
DEVICE = posttrain.backend.config.training_device().type


def rounded(on_cpu: float) -> float:
    """The largest difference, or share, that the order of fp32 sums explains; on a CPU it is `on_cpu`. On a GPU,
    where nobody has seen it, a guess."""
    return on_cpu * {"cpu": 1, "cuda": 10}[DEVICE]


# Two fp32 computations of one gradient in different orders, relative to it. Kernels differ by
# processor: up to 2.2e-6 was seen with AVX-512.
ROUNDING = rounded(3e-6)
# |dlogp| of any sampler and the trainer: on a GPU vLLM's attention multiplies fp32 in tf32.
SAMPLER_GAP = {"cpu": 1e-4, "cuda": LIMITS["cuda", "float32"].mean}[DEVICE]
# Mean |dlogp| of sampler and trainer in a command's process, which computes in bf16 on a GPU.
GAP_OF_A_COMMAND = {"cpu": 1e-4, "cuda": BF16_LIMIT.mean}[DEVICE]
# vLLM has no kernels for adapters beside fp32 weights on a GPU: the settings of a test of them, and the largest |dlogp|.
BESIDE_VLLM: dict[str, Any] = {"cpu": {}, "cuda": {"dtype": "bfloat16"}}[DEVICE]
GAP_BESIDE_VLLM = {"cpu": SAMPLER_GAP, "cuda": 0.5}[DEVICE]  # the latter a guess: of random models the mean is 0.01


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what cannot run here. First comes what takes longest, so that the workers end together."""
    skipped = {"cpu_only": "a CPU's bits, or what its vLLM refuses"} if torch.cuda.is_available() else {}
    skipped |= {} if vllm_is_installed() else {"needs_vllm": NO_VLLM}
    skipped |= {"cluster": reason} if (reason := too_few_gpus(4)) else {}
    for item in items:
        for marker, reason in skipped.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    items.sort(key=lambda item: (_unit(item.path.name) not in ENGINES, item.path.name not in LONG))


def too_few_gpus(processes: int) -> str | None:
    """Why so many processes that compute beside each other cannot: each has a GPU, or all have the CPU."""
    found = torch.cuda.device_count()
    return f"its processes need {processes} GPUs, or none: this machine has {found}" if 0 < found < processes else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker gets whole files, so that their fixtures are made once; and all that use vLLM, or the
    fork server of commands.py, so that each of these two starts once. (With pytest 9.2, xdist 3.8's
    own loadgroup groups nothing.)"""
    from xdist.scheduler import LoadScopeScheduling

    class FilesByEngine(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _unit(Path(nodeid.split("::")[0]).name)

    return FilesByEngine(config, log)


ENGINES = {
    "vllm": r"\b(vllm_client|vllm_service|families_service|packing_off)\b|\bimport vllm\.",
    "commands": r"\btests(\.| import )(commands|test_recipes|test_resume)\b",
}
LONG = ("test_serve_sdk.py", "test_damaged_checkpoints.py")  # minutes each


@cache
def _unit(file: str) -> str:
    """The unit of work that a test file is part of."""
    text = (ROOT / "tests" / file).read_text(encoding="utf-8")
    return next((name for name, pattern in ENGINES.items() if re.search(pattern, text)), file)


def pytest_collection_finish() -> None:
    freeze_for_good()


def pytest_runtest_setup() -> None:
    """The same random numbers in a test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_runtest_teardown() -> None:
    if "vllm.v1.engine.llm_engine" in sys.modules:  # some test has imported it
        _freeze_vllm()


@cache
def _freeze_vllm() -> None:
    gc.collect()
    freeze_for_good()


def pytest_sessionfinish() -> None:
    UNFREEZE()


@pytest.fixture(scope="session", autouse=True)
def unrendered() -> Iterator[None]:
    """Pictures are built and not rendered, which would be half of a small run's time; `rendered`
    has the real thing, as commands have.
    """
    patch = pytest.MonkeyPatch()
    patch.setattr(Figure, "savefig", lambda _, out, **__: out.write("<svg/>" if isinstance(out, io.StringIO) else b""))
    yield
    patch.undo()


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", SAVEFIG)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Ray, started once: the clients of a process share it."""
    cluster = Cluster(BackendConfig(engine="torch", sampler_replicas=2), tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def vllm_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    if not vllm_is_installed():
        pytest.skip(NO_VLLM)
    config = BackendConfig(engine="vllm", max_num_seqs=128)
    with ServiceClient(config, tmp_path_factory.mktemp("checkpoints")) as service:
        yield service


@pytest.fixture(scope="session")
def vllm_client(vllm_service: ServiceClient) -> TrainingClient:
    """A `tiny` whose live sampler is vLLM. Tests may train it; nobody relies on its weights."""
    return vllm_service.create_training_client("tiny")


@pytest.fixture
def torch_service(tmp_path: Path) -> Iterator[ServiceClient]:
    with ServiceClient(BackendConfig(engine="torch"), tmp_path / "checkpoints") as service:
        yield service


class Scripted(SamplingClient):
    """A policy whose answer is a function of the prompt's tokens; `prompts` are those it got."""

    def __init__(self, answer: Callable[[list[int]], list[int]], max_length: int = 4096):
        self.answer, self.max_length = answer, max_length
        self.prompts: list[list[int]] = []

    async def sample_async(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
    ) -> SampleResponse:
        self.prompts.append(prompt.to_ints())
        tokens = self.answer(self.prompts[-1])
        return SampleResponse([SampledSequence(tokens, [-0.5] * len(tokens), "stop")])


def trainer_of(client: TrainingClient) -> Any:
    """The trainer in this process, for tests that look inside."""
    return client._trainer


def random_tokens(rng: np.random.Generator, length: int) -> list[int]:
    return rng.integers(4, VOCABULARY, length).tolist()


def prompt_of(length: int, seed: int = 0) -> ModelInput:
    return ModelInput.from_ints(random_tokens(np.random.default_rng([seed, length]), length))


def policy_data(count: int, seed: int = 0, longest: int = 30) -> list[Datum]:
    """Ragged data for the policy losses: a random mask, sampler logprobs near those of an untrained
    model.
    """
    rng = np.random.default_rng(seed)
    data = []
    for length in rng.integers(3, longest, count):
        tokens = random_tokens(rng, length + 1)
        mask = (rng.random(length) < 0.6).astype(np.float32)
        mask[0] = 1
        inputs = {
            "target_tokens": np.array(tokens[1:]),
            "logprobs": rng.normal(-5.5, 0.4, length).astype(np.float32) * mask,
            "advantages": rng.normal(0, 1, length).astype(np.float32) * mask,
            "mask": mask,
        }
        data.append(Datum(ModelInput.from_ints(tokens[:-1]), inputs))
    return data


def full_logits(model: torch.nn.Module, tokens: Sequence[int]) -> torch.Tensor:
    """(T, V) by transformers' own forward: no batch, no mask, no cache, no chunks. Differentiable, on the CPU."""
    ids = torch.tensor([list(tokens)], device=next(model.parameters()).device)
    return model(input_ids=ids, use_cache=False).logits[0].float().cpu()


def gradients(trainer) -> dict[str, torch.Tensor]:  # noqa: ANN001
    return {name: p.grad.clone() for name, p in trainer.named_trainable.items() if p.grad is not None}


def training_data(groups_P: Sequence[TrajectoryGroup], advantages_P_G: Sequence[np.ndarray]) -> list[Datum]:
    """All rows of the groups as Datums, with their members' advantages and nothing else."""
    return [row.datum() for row in with_advantages(rows_of(groups_P), advantages_P_G)]


@pytest.fixture
def patient_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right programs are not timed out, however busy the machine is."""
    supervised = envs.sandbox._supervised

    async def patiently(request: dict[str, Any], seconds: float) -> dict[str, Any]:
        return await supervised(request | {"limits": request["limits"] | {"wall_seconds": 500.0}}, 600.0)

    monkeypatch.setattr(envs.sandbox, "_supervised", patiently)


@pytest.fixture
def packing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM keeps its matrices as they were loaded, as on a GPU."""
    import vllm.model_executor.layers.utils as layers

    from posttrain.backend import vllm_settings, vllm_weights

    def unpacked(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setattr(layers, "dispatch_cpu_unquantized_gemm", unpacked)
    monkeypatch.setattr(vllm_weights, "_is_on_cpu", lambda model: False)
    monkeypatch.setattr(vllm_settings, "check_shared", lambda config: None)
