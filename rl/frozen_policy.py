"""A second, frozen policy: an opponent, an answerer, a judge. Configuration, and a client in
messages. Its engine runs beside the live one until its client has no references. Failures are
RolloutErrors, never rewards. Left out: policies on a network, an engine shared by several
FrozenPolicy objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import chz

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError, CookbookError
from posttrain.backend.ranges import COUNT, SEED, TEMPERATURE
from posttrain.backend.types import SamplingParams
from posttrain.renderers import get_renderer
from posttrain.renderers.types import Message, Renderer
from posttrain.tracking.model_source import ModelSource, find_model
from posttrain.tracking.seeds import sampling_seed
from rl.types import RolloutError

if TYPE_CHECKING:  # commands answer before torch is imported
    from posttrain.backend.sampling_client import SamplingClient


class FrozenPolicyError(RolloutError):
    """A frozen policy failed or was truncated; the cause is chained."""


@dataclass(frozen=True)
class MessageCompleter:
    """Messages in, one message out. A reply's seed is a function of `seed` and the prompt: equal
    prompts get equal replies."""

    client: "SamplingClient"
    renderer: Renderer
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0

    async def __call__(self, messages: Sequence[Message]) -> Message:
        """Raises FrozenPolicyError if there is no reply, or a truncated one."""
        prompt = self.renderer.build_generation_prompt(messages)
        seed = sampling_seed([self.seed, *prompt.to_ints()])
        params = SamplingParams(self.max_tokens, seed, self.renderer.get_stop_sequences(), self.temperature)
        try:
            response = await self.client.sample_async(prompt, 1, params)
        except CookbookError as error:
            raise FrozenPolicyError(f"the frozen policy failed with {type(error).__name__}: {error}") from error
        message, stopped = self.renderer.parse_response(response.sequences[0].tokens)
        if not stopped:
            text = message["content"]
            raise FrozenPolicyError(
                f"the frozen policy had not finished after {self.max_tokens} tokens: {text[-60:]!r}"
            )
        return message


@chz.chz
class FrozenPolicy:
    """A model that does not learn, from `model_path` or `base_model`."""

    model_path: str | None = chz.field(
        default=None, doc="a run folder (its last checkpoint), a checkpoint, a model folder or an adapter"
    )
    base_model: str | None = chz.field(default=None, doc="a preset or a Hugging Face hub name")
    renderer_name: str | None = chz.field(
        default=None,
        doc="role_colon, chat_template or plain; None = that of the run at model_path, else the model's own",
    )
    max_tokens: int = chz.field(default=64, validator=COUNT, doc="most tokens of a reply")
    temperature: float = chz.field(default=0.0, validator=TEMPERATURE, doc="sampling temperature; 0 = greedy")
    seed: int = chz.field(default=0, validator=SEED, doc="seed of its sampling, and of a preset's weights")
    backend: BackendConfig = chz.field(
        default_factory=BackendConfig, doc="how this machine samples from it; its engine needs memory of its own"
    )

    @chz.validate
    def _one_model(self) -> None:
        if (self.model_path is None) == (self.base_model is None):
            raise ConfigError(
                f"model_path={self.model_path}, base_model={self.base_model}: a frozen policy needs one of the two"
            )

    def open(self) -> "SamplingClient":
        """Loads the model and starts its engine."""
        from posttrain.backend.service_client import ServiceClient

        service, run = ServiceClient(self.backend), self._run()
        path = str(run.folder) if run and run.folder else self.model_path
        return service.create_sampling_client(path, self.base_model, seed=self.seed)

    def find_renderer_name(self) -> str | None:
        run = self._run()
        return self.renderer_name or (run.renderer_name if run else None)

    def _run(self) -> ModelSource | None:
        return find_model(self.model_path) if self.model_path else None

    def open_completer(self) -> MessageCompleter:
        client = self.open()
        renderer = get_renderer(self.find_renderer_name(), client.get_tokenizer())
        return MessageCompleter(client, renderer, self.max_tokens, self.temperature, self.seed)
