"""TrainingClient: the trainer behind futures, in Tinker's names.

Every call is carried out on one thread in submission order, so a loop can submit forward_backward and optim_step back to back and roll out
meanwhile. Each method has an `_async` twin; awaiting the twin means accepted in order, awaiting what it returns means done.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import PreTrainedTokenizerBase

from backend import checkpoints
from backend.atomic_folder import atomic_folder
from backend.engine import EngineThread
from backend.errors import CookbookError, ModelError
from backend.futures import APIFuture, InOrder
from backend.loss_terms import LossTerm
from backend.losses import LossFn
from backend.sampling_client import SamplingClient
from backend.trainer import CustomLoss, Trainer
from backend.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    LoadWeightsResponse,
    OptimStepResponse,
    SaveWeightsResponse,
)

if TYPE_CHECKING:
    from backend.service_client import ServiceClient

T = TypeVar("T")


class TrainingClient:
    def __init__(self, service: "ServiceClient", trainer: Trainer, tokenizer: PreTrainedTokenizerBase):
        self._service, self._trainer, self._tokenizer = service, trainer, tokenizer
        self._thread = InOrder("training")
        self._engine: EngineThread | None = None
        self._weights_version = 0  # counts changes of the trainer's weights
        self._exported: dict[str, int] = {}  # sampler folders written, with the weights version they hold
        self._failed: CookbookError | None = None

    # --- training ---------------------------------------------------------------------------------------------------------------

    def forward(
        self, data: Sequence[Datum], loss_fn: str | LossFn, loss_fn_config: dict[str, Any] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Loss and logprobs, no gradient."""
        return self._thread.submit(self._trainer.run, data, loss_fn, loss_fn_config, backward=False)

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: str | LossFn, loss_fn_config: dict[str, Any] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Adds the gradient of the summed loss to what has accumulated since the last optim_step."""
        return self._thread.submit(self._guarded, self._trainer.run, data, loss_fn, loss_fn_config)

    def forward_terms(self, terms: Sequence[LossTerm], keep: bool = False) -> APIFuture[list[ForwardBackwardOutput]]:
        """As `forward`, several losses in one pass. `keep`: the next forward_backward of these data need not go forward again."""
        return self._thread.submit(self._trainer.run_terms, terms, backward=False, keep=keep)

    def forward_backward_terms(self, terms: Sequence[LossTerm]) -> APIFuture[list[ForwardBackwardOutput]]:
        """As `forward_backward`, several losses in one pass."""
        return self._thread.submit(self._guarded, self._trainer.run_terms, terms)

    def forward_backward_custom(self, data: Sequence[Datum], fn: CustomLoss) -> APIFuture[ForwardBackwardOutput]:
        """`fn(data, logprobs_D) -> (loss, metrics)`, differentiated through in one pass."""
        return self._thread.submit(self._guarded, self._trainer.run_custom, data, fn)

    def optim_step(self, adam_params: AdamParams) -> APIFuture[OptimStepResponse]:
        """One AdamW step. After a forward_backward that failed, it raises that failure and changes nothing."""
        return self._thread.submit(self._optim_step, adam_params)

    def _guarded(self, run: Callable[..., T], *args: Any) -> T:
        try:
            return run(*args)
        except CookbookError as error:
            self._failed = self._failed or error
            raise

    def _optim_step(self, adam_params: AdamParams) -> OptimStepResponse:
        if self._failed is not None:
            failure, self._failed = self._failed, None
            self._trainer.zero_grad()
            raise failure
        response = self._trainer.optim_step(adam_params)
        self._weights_version += 1
        return response

    # --- weights ----------------------------------------------------------------------------------------------------------------

    def save_state(
        self, name: str, ttl_seconds: int | None = None, extra: dict[str, Any] | None = None
    ) -> APIFuture[SaveWeightsResponse]:
        """Weights and optimizer, with `extra` (JSON) for the loop; atomic, replacing one of the same name. `ttl_seconds` is ignored."""
        return self._thread.submit(self._save_state, self._service.checkpoint_path(name), extra or {})

    def load_state(self, path: str) -> APIFuture[LoadWeightsResponse]:
        """Weights only; the optimizer starts afresh."""
        return self._thread.submit(self._load_state, path, False)

    def load_state_with_optimizer(self, path: str) -> APIFuture[LoadWeightsResponse]:
        return self._thread.submit(self._load_state, path, True)

    def save_weights_for_sampler(self, name: str, ttl_seconds: int | None = None) -> APIFuture[SaveWeightsResponse]:
        """A Hugging Face folder (or peft adapter) in the sampler's dtype."""
        return self._thread.submit(self._save_for_sampler, self._service.checkpoint_path(name))

    def save_weights_and_get_sampling_client(self, name: str | None = None, follow: bool = False) -> SamplingClient:
        """Syncs the weights into the sampler in memory. Snapshots taken earlier become stale; `follow` makes a client that does not."""
        return self._thread.submit(self._sync, follow).result()

    def create_sampling_client(self, model_path: str) -> SamplingClient:
        """The live sampler if the folder holds the present weights, else an engine of its own."""
        return self._thread.submit(self._create_sampling_client, model_path).result()

    def _create_sampling_client(self, model_path: str) -> SamplingClient:
        if self._exported.get(model_path) == self._weights_version:
            return self._sync(follow=False)
        return self._service.create_sampling_client(model_path=model_path)

    def _save_state(self, path: Path, extra: dict[str, Any]) -> SaveWeightsResponse:
        checkpoints.save_state(self._trainer, self._tokenizer, path, extra)
        return SaveWeightsResponse(str(path))

    def _load_state(self, path: str, with_optimizer: bool) -> LoadWeightsResponse:
        checkpoints.load_state(self._trainer, Path(path).expanduser(), with_optimizer)
        self._weights_version += 1
        return LoadWeightsResponse(path)

    def _save_for_sampler(self, path: Path) -> SaveWeightsResponse:
        self._check_can_sample()
        with atomic_folder(path) as folder:
            checkpoints.save_policy(self._trainer, self._tokenizer, folder, self._trainer.compute_dtype)
        self._exported[str(path)] = self._weights_version
        return SaveWeightsResponse(str(path))

    def _check_can_sample(self) -> None:
        if self._trainer.scalar_head is not None:
            raise ModelError(
                "a scalar model has no vocabulary to sample from: keep its checkpoints by save_state, read its scalars by forward"
            )

    def _sync(self, follow: bool) -> SamplingClient:
        self._check_can_sample()
        if self._engine is None:
            self._engine = self._service.open_engine(self._trainer.hf_config, self._tokenizer, self._trainer.max_length)
        if self._engine.version != self._weights_version:
            self._engine.sync(self._trainer.sampler_weights, self._weights_version)
        return SamplingClient(self._engine, self._tokenizer, self._trainer.max_length, self._trainer.vocabulary, follow)

    # --- the rest ---------------------------------------------------------------------------------------------------------------

    def get_info(self) -> GetInfoResponse:
        return self._trainer.info()

    def checkpoint_bytes(self) -> int:
        """About what one save_state takes on the disk."""
        return checkpoints.checkpoint_bytes(self._trainer)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    def close(self) -> None:
        self._thread.close()

    # --- twins ------------------------------------------------------------------------------------------------------------------

    async def forward_async(self, data: Sequence[Datum], loss_fn: str | LossFn, loss_fn_config: dict[str, Any] | None = None):
        return self.forward(data, loss_fn, loss_fn_config)

    async def forward_backward_async(
        self, data: Sequence[Datum], loss_fn: str | LossFn, loss_fn_config: dict[str, Any] | None = None
    ):
        return self.forward_backward(data, loss_fn, loss_fn_config)

    async def forward_terms_async(self, terms: Sequence[LossTerm], keep: bool = False):
        return self.forward_terms(terms, keep)

    async def forward_backward_terms_async(self, terms: Sequence[LossTerm]):
        return self.forward_backward_terms(terms)

    async def forward_backward_custom_async(self, data: Sequence[Datum], fn: CustomLoss):
        return self.forward_backward_custom(data, fn)

    async def optim_step_async(self, adam_params: AdamParams):
        return self.optim_step(adam_params)

    async def save_state_async(self, name: str, ttl_seconds: int | None = None, extra: dict[str, Any] | None = None):
        return self.save_state(name, ttl_seconds, extra)

    async def load_state_async(self, path: str):
        return self.load_state(path)

    async def load_state_with_optimizer_async(self, path: str):
        return self.load_state_with_optimizer(path)

    async def save_weights_for_sampler_async(self, name: str, ttl_seconds: int | None = None):
        return self.save_weights_for_sampler(name, ttl_seconds)

    async def save_weights_and_get_sampling_client_async(self, name: str | None = None, follow: bool = False) -> SamplingClient:
        return await self._thread.submit(self._sync, follow)

    async def create_sampling_client_async(self, model_path: str) -> SamplingClient:
        return await self._thread.submit(self._create_sampling_client, model_path)

    async def get_info_async(self) -> GetInfoResponse:
        return self.get_info()
