"""Each file of a checkpoint damaged in turn, met by every way of opening it: one line that names
the place, or the undamaged result.
"""

# Trap: a damaged file of a checkpoint.

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import CookbookError
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import AdamParams, Datum, LoraConfig, ModelInput
from posttrain.tracking.checkpointing import Checkpointer
from posttrain.tracking.run_folder import open_run_folder
from recipes.libraries.belief_state.files import load_belief_state
from recipes.libraries.belief_state.model import BeliefState, BeliefStateConfig
from recipes.libraries.belief_state.pairs import PairObjective
from recipes.libraries.belief_state.trainer import BeliefStateClient, BeliefStateTrainer, TokenBatch
from tests.conftest import policy_data

pytestmark = pytest.mark.slow
DATA = policy_data(2, longest=8)
TOKENS = ModelInput.from_ints([5, 6, 7, 8])
SCALAR_DATA = [Datum(datum.model_input, {"weights": np.ones(datum.model_input.length)}) for datum in DATA]
BATCH = TokenBatch(np.array([[1, 2, 3, 4, 0], [4, 3, 2, 1, 0]]))


def in_place_of(file: Path, make: Callable[[Path], object]) -> None:
    file.unlink()
    make(file)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3]),
    "garbage": lambda file: file.write_bytes(bytes(range(256)) * 40),
    "a list": lambda file: file.write_text("[1, 2]"),
    "an empty object": lambda file: file.write_text("{}"),
    "another file": lambda file: shutil.copy(Path(__file__), file),
    "a folder": lambda file: in_place_of(file, lambda path: path.mkdir()),
    "a dangling link": lambda file: in_place_of(file, lambda path: path.symlink_to("/nowhere/at/all")),
    "gone": lambda file: file.unlink(),
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    with ServiceClient(BackendConfig(engine="torch", max_length=64), tmp_path_factory.mktemp("damaged")) as service:
        yield service


def train_once(client) -> None:  # noqa: ANN001
    client.forward_backward(DATA, "importance_sampling")
    client.optim_step(AdamParams(1e-3)).result()


def policy_result(client) -> torch.Tensor:  # noqa: ANN001
    return torch.cat(
        [out["logprobs"].to_torch() for out in client.forward(DATA, "importance_sampling").result().loss_fn_outputs]
    )


def scalars(client) -> torch.Tensor:  # noqa: ANN001
    def loss(scalars_N, inputs):  # noqa: ANN001, ANN202
        return scalars_N, {}

    return torch.cat([out["scalars"].to_torch() for out in client.forward(SCALAR_DATA, loss).result().loss_fn_outputs])


def resumed(make: Callable[[], object], folder: Path, result: Callable[..., torch.Tensor]) -> torch.Tensor:
    run = open_run_folder(folder.parent / f"run_{folder.name}", "delete", None)
    copied = shutil.copytree(folder, run.checkpoints / "000001", symlinks=True)
    run.record_checkpoint("000001", 1, copied)
    client = make()
    assert Checkpointer(run, client, 0, None).start(None) == 1  # type: ignore[arg-type]
    return result(client)


def policy_ways(service: ServiceClient, lora: LoraConfig | None) -> dict[str, Callable[[Path], torch.Tensor]]:
    def fresh():  # noqa: ANN202
        return service.create_training_client("micro", lora)

    def load(path: Path, with_optimizer: bool) -> torch.Tensor:
        client = fresh()
        (client.load_state_with_optimizer if with_optimizer else client.load_state)(str(path)).result()
        return policy_result(client)

    def sample(path: Path) -> torch.Tensor:
        return torch.tensor(service.create_sampling_client(str(path)).compute_logprobs(TOKENS).result()[1:])

    return {
        "load_state": lambda path: load(path, False),
        "load_state_with_optimizer": lambda path: load(path, True),
        "sampling": sample,
        "from_state": lambda path: policy_result(service.create_training_client_from_state(str(path))),
        "with_optimizer": lambda path: policy_result(
            service.create_training_client_from_state_with_optimizer(str(path))
        ),
        "resume": lambda path: resumed(fresh, path, policy_result),
    }


def belief_state_client() -> BeliefStateClient:
    model = BeliefState(BeliefStateConfig(5, 0, 1, 2, 16), seed=0)
    return BeliefStateClient(BeliefStateTrainer(model, PairObjective(min_gap=2, context_length=1)))


def belief_state_result(client: BeliefStateClient) -> torch.Tensor:
    return torch.tensor([client.trainer.evaluate(BATCH)["loss"]])


def belief_state_ways() -> dict[str, Callable[[Path], torch.Tensor]]:
    def load(path: Path) -> torch.Tensor:
        client = belief_state_client()
        client.load_state(str(path)).result()
        return belief_state_result(client)

    def opened(path: Path) -> torch.Tensor:
        trainer = BeliefStateTrainer(load_belief_state(path), PairObjective(min_gap=2, context_length=1))
        return torch.tensor([trainer.evaluate(BATCH)["loss"]])

    return {
        "load_state": load,
        "load_belief_state": opened,
        "resume": lambda path: resumed(belief_state_client, path, belief_state_result),
    }


def saved(service: ServiceClient, kind: str) -> tuple[Path, dict[str, Callable[[Path], torch.Tensor]]]:
    """A checkpoint of the kind, and the ways to open it."""
    if kind == "belief state":
        client = belief_state_client()
        client.forward_backward(BATCH)
        client.optim_step(AdamParams(1e-3)).result()
        path = str(service._checkpoint_dir / kind)
        return Path(client.save_state(path, extra={"next_step": 1}).result().path), belief_state_ways()
    if kind == "scalar":
        client = service.create_scalar_client("micro")
        client.forward_backward_custom(SCALAR_DATA, lambda data, s: (torch.cat(s).sub(1).square().sum(), {}))
        client.optim_step(AdamParams(1e-2)).result()
        ways = {"scalar_from_state": lambda path: scalars(service.create_scalar_client_from_state(str(path)))}
        return Path(client.save_state(kind).result().path), ways
    lora = LoraConfig(2) if kind == "adapter" else None
    client = service.create_training_client("micro", lora)
    train_once(client)
    return Path(client.save_state(kind, extra={"next_step": 1}).result().path), policy_ways(service, lora)


@pytest.mark.parametrize("kind", ["full", "adapter", "scalar", "belief state"])
def test_each_file_damaged_in_turn(service: ServiceClient, kind: str, tmp_path: Path) -> None:
    whole, ways = saved(service, kind)
    files = sorted(str(file.relative_to(whole)) for file in whole.rglob("*") if file.is_file())
    assert len(files) >= 4
    expected = {name: way(whole) for name, way in ways.items()}
    refused = set()
    wrong = []
    for file in files:
        for damage, apply in DAMAGES.items():
            folder = tmp_path / f"{file.replace('/', '_')} {damage}"
            shutil.copytree(whole, folder)
            apply(folder / file)
            for name, way in ways.items():
                try:
                    found = way(folder)
                except CookbookError as error:
                    refused.add(file)
                    if "\n" in str(error) or (str(folder) not in str(error) and f"run_{folder.name}" not in str(error)):
                        wrong.append((file, damage, name, str(error)[:300]))
                except Exception as error:
                    wrong.append((file, damage, name, f"{type(error).__name__}: {str(error)[:300]}"))
                else:
                    if not torch.equal(found, expected[name]):
                        wrong.append((file, damage, name, "another result, and nothing said"))
            shutil.rmtree(folder)
    assert not wrong, "\n".join(map(str, wrong))
    needed = {
        "adapter": {"adapter_config.json", "adapter_model.safetensors"},
        "belief state": {"belief_state.json", "model.safetensors"},
    }
    assert refused >= needed.get(kind, {"config.json", "model.safetensors"})
