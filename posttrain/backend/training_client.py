"""TrainingClient: the trainer with futures, under Tinker's names. One thread executes all calls in
the order of submission, so a loop may submit forward_backward and optim_step together and sample
meanwhile. Of the `_async` twins: awaiting the twin means queued, awaiting its result means done.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from transformers import PreTrainedTokenizerBase

from posttrain.backend.base_models import SharedBase
from posttrain.backend.engine import EngineThread
from posttrain.backend.engines import Engines
from posttrain.backend.errors import ConfigError, CookbookError, ModelError, PassCancelledError
from posttrain.backend.futures import APIFuture, InOrder, Ready, accepted
from posttrain.backend.loss_terms import LossTerm
from posttrain.backend.losses import LossFn
from posttrain.backend.models import checkpoint_folder
from posttrain.backend.sampler_pool import SamplerPool
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.sdk_keywords import ignore
from posttrain.backend.trainer import CustomLoss, Trainer
from posttrain.backend.trainer_group import TrainerGroup
from posttrain.backend.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    LoadWeightsResponse,
    OptimStepResponse,
    SaveWeightsResponse,
)
from posttrain.backend.vllm_settings import samples_with_vllm
from posttrain.backend.weight_copies import SampledModel
from posttrain.backend.weight_versions import WeightVersion

T = TypeVar("T")
SAMPLER_FOLDER = Path("sampler_weights")


class TrainingClient(Ready):
    def __init__(
        self,
        trainer: Trainer | TrainerGroup,
        tokenizer: PreTrainedTokenizerBase,
        engines: Engines,
        checkpoint_dir: Path,
    ):
        self._trainer, self._tokenizer = trainer, tokenizer
        self._engines, self._checkpoint_dir = engines, checkpoint_dir
        self._thread = InOrder("training")
        self._engine: EngineThread | SamplerPool | None = None
        self._policy = engines.new_policy()
        self._before_end = weakref.finalize(self, self._policy.before_end, trainer.sampled)
        self._before_end.atexit = False
        self._weights_version = 0  # counts changes of the trainer's weights
        # sampler folders written, and their weights version
        self._exported: dict[str, int] = {}
        self._failed: BaseException | None = None

    @property
    def vocabulary(self) -> int:
        """The number of the model's token ids, padding included."""
        return self._trainer.vocabulary

    # --- training --------------------------------------------------------------------------------

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: str | LossFn,
        loss_fn_config: dict[str, Any] | None = None,
        *,
        without_adapter: bool = False,
        all_logprobs: bool = True,
    ) -> APIFuture[ForwardBackwardOutput]:
        """Loss and logprobs, no gradient. `without_adapter`: those of a LoRA model's base. Without
        `all_logprobs` tokens that carry no loss get NaN, which takes less time."""
        if without_adapter:
            return self._thread.submit(self._trainer.run_without_adapter, data, loss_fn, loss_fn_config, all_logprobs)
        return self._thread.submit(self._trainer.run, data, loss_fn, loss_fn_config, False, all_logprobs)

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: str | LossFn,
        loss_fn_config: dict[str, Any] | None = None,
        *,
        all_logprobs: bool = True,
    ) -> APIFuture[ForwardBackwardOutput]:
        """Adds the gradient of the summed loss to the gradients since the last optim_step.
        `all_logprobs` as in `forward`."""
        return self._submit_pass(self._trainer.run, data, loss_fn, loss_fn_config, True, all_logprobs)

    def forward_terms(self, terms: Sequence[LossTerm], keep: bool = False) -> APIFuture[list[ForwardBackwardOutput]]:
        """As `forward`, for several losses in one pass. `keep`: the next forward_backward of these
        data needs no forward."""
        return self._thread.submit(self._trainer.run_terms, terms, backward=False, keep=keep)

    def forward_backward_terms(self, terms: Sequence[LossTerm]) -> APIFuture[list[ForwardBackwardOutput]]:
        """As `forward_backward`, for several losses in one pass."""
        return self._submit_pass(self._trainer.run_terms, terms)

    def forward_backward_custom(
        self, data: Sequence[Datum], loss_fn: CustomLoss, *, loss_type_input: Literal["logprobs"] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """`loss_fn(data, logprobs_D) -> (loss, metrics)`, differentiated in one pass; its tensors are on the CPU."""
        if loss_type_input not in (None, "logprobs"):
            raise ConfigError(f"loss_type_input={loss_type_input!r}: a custom loss is given logprobs")
        if not callable(loss_fn):
            raise ConfigError(f"loss_fn={loss_fn!r:.80}: a custom loss is a function of data and logprobs")
        return self._submit_pass(self._trainer.run_custom, data, loss_fn)

    def refuse_pass(self, error: CookbookError) -> APIFuture[Any]:
        """A pass that fails with `error` in its turn, for a caller that refused the data itself."""

        def refuse() -> None:
            raise error

        return self._submit_pass(refuse)

    def optim_step(
        self, optim_params: AdamParams | None = None, *, adam_params: AdamParams | None = None
    ) -> APIFuture[OptimStepResponse]:
        """One AdamW step on the accumulated gradient, which is then dropped.

        After a failed or cancelled forward_backward it raises that failure (PassCancelledError),
        drops the gradient and changes nothing. Cancelling the step drops the gradient, too.
        """
        params = adam_params if optim_params is None else optim_params
        if not isinstance(params, AdamParams) or None not in (optim_params, adam_params):
            raise ConfigError(
                f"optim_step takes one AdamParams, not optim_params={optim_params}, adam_params={adam_params}"
            )
        return self._thread.submit(self._optim_step, params, if_cancelled=self._drop_gradient)

    def _submit_pass(self, run: Callable[..., T], *args: Any) -> APIFuture[T]:
        return self._thread.submit(self._pass, run, *args, if_cancelled=self._pass_cancelled)

    def _pass(self, run: Callable[..., T], *args: Any) -> T:
        try:
            if self._engines.config.sleep_while_training and isinstance(self._engine, EngineThread):
                self._engine.sleep()
            return run(*args)
        except BaseException as error:
            self._pass_failed(error)
            raise

    def _pass_failed(self, error: BaseException) -> None:
        """No step may follow an incomplete gradient."""
        self._failed = self._failed or error
        self._trainer.zero_grad()

    def _pass_cancelled(self) -> None:
        self._pass_failed(
            PassCancelledError("a forward_backward of this step was cancelled before its turn: no step was taken")
        )

    def _drop_gradient(self) -> None:
        self._failed = None
        self._trainer.zero_grad()

    def _optim_step(self, adam_params: AdamParams) -> OptimStepResponse:
        try:
            if self._failed is not None:
                raise self._failed
            with self._changing_weights():
                return self._trainer.optim_step(adam_params)
        finally:
            self._drop_gradient()

    @contextmanager
    def _changing_weights(self) -> Iterator[None]:
        """Marks the weights as changed, so that the next sync runs, unless the error denies it.
        Copies them first if a sampling client keeps them."""
        self._policy.before_change(self._trainer.sampled)
        try:
            yield
        except CookbookError:
            raise
        except BaseException:
            self._weights_version += 1
            raise
        self._weights_version += 1

    # --- weights ---------------------------------------------------------------------------------

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
        *,
        extra: dict[str, Any] | None = None,
    ) -> APIFuture[SaveWeightsResponse]:
        """Weights and optimizer, with `extra` (JSON) for the loop; atomic, replaces a checkpoint of
        this name. NonFiniteError if a weight or an optimizer state is not finite."""
        ignore(ttl_seconds=ttl_seconds, overwrite=overwrite, user_metadata=user_metadata)
        return self._thread.submit(self._save_state, _folder(self._checkpoint_dir, name), extra or {})

    def load_state(self, path: str, weights_access_token: str | None = None) -> APIFuture[LoadWeightsResponse]:
        """Loads weights only; the optimizer starts afresh, and accumulated gradients are dropped."""
        ignore(weights_access_token=weights_access_token)
        return self._thread.submit(self._load_state, path, False)

    def load_state_with_optimizer(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        ignore(weights_access_token=weights_access_token)
        return self._thread.submit(self._load_state, path, True)

    def save_weights_for_sampler(
        self, name: str, ttl_seconds: int | None = None, user_metadata: dict[str, str] | None = None
    ) -> APIFuture[SaveWeightsResponse]:
        """A Hugging Face folder (or peft adapter) in the sampler's dtype, in the folder
        sampler_weights: apart from a state of the same name, as in the SDK. NonFiniteError as in
        `save_state`."""
        ignore(ttl_seconds=ttl_seconds, user_metadata=user_metadata)
        return self._thread.submit(self._save_for_sampler, _folder(self._checkpoint_dir / SAMPLER_FOLDER, name))

    def save_weights_external(
        self, name: str, ttl_seconds: int | None = None, age_encryption_recipients: list[str] | None = None
    ) -> APIFuture[SaveWeightsResponse]:
        """As `save_weights_for_sampler`, whose folders are in Hugging Face's form."""
        if age_encryption_recipients:
            raise ConfigError("age_encryption_recipients: weights are written as they are, not encrypted")
        return self.save_weights_for_sampler(name, ttl_seconds)

    def save_weights_and_get_sampling_client(
        self,
        name: str | None = None,
        retry_config: object = None,
        record_stability_info: bool = False,
        kind: Literal["snapshot", "inflight"] = "snapshot",
        *,
        follow: bool = False,
        keep: bool = True,
    ) -> SamplingClient:
        """Syncs the weights to the sampler in memory. The client answers with these weights however
        many steps follow; with `follow` (kind="inflight" in the SDK) with the newest synced ones.

        While such a snapshot is held, the next optim_step copies the weights first (an adapter's
        alone); a loop that always uses the newest saves the copy by keep=False, and its earlier
        clients raise StaleSamplerError. NonFiniteError if a weight is not finite."""
        return self._submit_sync(name, retry_config, record_stability_info, kind, follow, keep).result()

    async def save_weights_and_get_sampling_client_async(
        self,
        name: str | None = None,
        retry_config: object = None,
        record_stability_info: bool = False,
        kind: Literal["snapshot", "inflight"] = "snapshot",
        *,
        follow: bool = False,
        keep: bool = True,
    ) -> SamplingClient:
        return await self._submit_sync(name, retry_config, record_stability_info, kind, follow, keep)

    def _submit_sync(
        self,
        name: str | None,
        retry_config: object,
        record_stability_info: bool,
        kind: str,
        follow: bool,
        keep: bool = True,
    ) -> APIFuture[SamplingClient]:
        ignore(name=name, retry_config=retry_config, record_stability_info=record_stability_info)
        if kind not in ("snapshot", "inflight"):
            raise ConfigError(f"kind={kind!r} is neither 'snapshot' nor 'inflight'")
        return self._thread.submit(self._sync, follow or kind == "inflight", keep)

    def create_sampling_client(
        self, model_path: str, retry_config: object = None, record_stability_info: bool = False
    ) -> SamplingClient:
        """A snapshot: of the live sampler if the folder holds the current weights, else of the
        folder."""
        ignore(retry_config=retry_config, record_stability_info=record_stability_info)
        return self._thread.submit(self._create_sampling_client, model_path).result()

    async def create_sampling_client_async(
        self, model_path: str, retry_config: object = None, record_stability_info: bool = False
    ) -> SamplingClient:
        ignore(retry_config=retry_config, record_stability_info=record_stability_info)
        return await self._thread.submit(self._create_sampling_client, model_path)

    def _create_sampling_client(self, model_path: str) -> SamplingClient:
        if self._exported.get(model_path) == self._weights_version:
            return self._sync()
        return self._engines.open_saved(model_path)

    def _save_state(self, path: Path, extra: dict[str, Any]) -> SaveWeightsResponse:
        self._trainer.check_finite()
        self._trainer.save_state(self._tokenizer, path, extra)
        return SaveWeightsResponse(str(path))

    def _load_state(self, path: str, with_optimizer: bool) -> LoadWeightsResponse:
        with self._changing_weights():
            self._trainer.load_state(checkpoint_folder(path), with_optimizer)
            self._drop_gradient()  # of the previous weights
        return LoadWeightsResponse(path)

    def _save_for_sampler(self, path: Path) -> SaveWeightsResponse:
        self._check_can_sample()
        self._trainer.check_finite()
        self._trainer.save_policy(self._tokenizer, path)
        self._exported[str(path)] = self._weights_version
        return SaveWeightsResponse(str(path))

    def _check_can_sample(self) -> None:
        if self._trainer.scalar_head is not None:
            raise ModelError(
                "a scalar model has no vocabulary to sample from: keep its checkpoints by save_state, read its scalars "
                "by forward"
            )

    def _sync(self, follow: bool = False, keep: bool = True) -> SamplingClient:
        self._check_can_sample()
        trainer, policy, source = self._trainer, self._policy, self._trainer.sampled
        with self._base_aside():
            if self._engine is None or (self._engines.shares and self._engine.has_stopped):
                rank = trainer.lora.rank if trainer.lora else 0
                self._engine = self._engines.open(trainer.hf_config, self._tokenizer, trainer.max_length, rank)
                self._let_go = self._engine.hold(self)
            if policy.newest is None or policy.newest.number != self._weights_version:
                # moments and fp32 copies are 12 bytes for each 2 of these, or offloaded; as the norm of every step's
                # gradient was finite, no moment is infinite
                trainer.check_finite(moments=False)
                version = WeightVersion(self._weights_version, source.sampler_weights)
                if self._engines.shares:
                    version.keep(source, self._engines.memory)  # other policies may take the engine at any time
                    policy.publish(version)
                else:
                    self._engine.sync(policy, version)
            else:
                policy.newest.lives_in(source)
        length, vocabulary, name = trainer.max_length, trainer.vocabulary, trainer.model_name
        return SamplingClient(self._engine, policy, self._tokenizer, length, vocabulary, follow, name, keep)

    def _base_aside(self) -> AbstractContextManager[None]:
        """With backend.lora=shared, while vLLM opens, which is to hold the base for both."""
        config, source = self._engines.config, self._trainer.sampled
        base = source.owner if isinstance(source, SampledModel) else None
        waits = self._engine is None and config.lora == "shared" and samples_with_vllm(config)
        return base.aside() if waits and isinstance(base, SharedBase) else nullcontext()

    # --- the rest --------------------------------------------------------------------------------

    def get_info(self) -> GetInfoResponse:
        return self._trainer.info()

    def checkpoint_bytes(self) -> int:
        """Approximate size of a save_state."""
        return self._trainer.checkpoint_bytes()

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    def close(self) -> None:
        """Ends the training thread, and an unused engine. Queued calls fail with ClosedError;
        sampling clients keep their weights."""
        self._thread.close()
        self._before_end()
        if self._engine is not None:
            self._let_go()
            self._engine.close_if_unheld()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- twins -----------------------------------------------------------------------------------

    forward_async = accepted(forward)
    forward_backward_async = accepted(forward_backward)
    forward_terms_async = accepted(forward_terms)
    forward_backward_terms_async = accepted(forward_backward_terms)
    forward_backward_custom_async = accepted(forward_backward_custom)
    optim_step_async = accepted(optim_step)
    save_state_async = accepted(save_state)
    load_state_async = accepted(load_state)
    load_state_with_optimizer_async = accepted(load_state_with_optimizer)
    save_weights_for_sampler_async = accepted(save_weights_for_sampler)
    save_weights_external_async = accepted(save_weights_external)
    get_info_async = accepted(get_info)


def _folder(parent: Path, name: str) -> Path:
    """A checkpoint's, by its name or path. ConfigError for a name that stands for `parent` or a folder around it."""
    if not isinstance(name, str | PathLike) or Path(name).name in ("", "..") or "\0" in str(name):
        raise ConfigError(f"name={name!r:.80} is no name of a checkpoint: give a text, as step_100")
    return parent / name
