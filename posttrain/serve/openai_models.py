"""The server's models for its OpenAI endpoint: public names and tinker:// paths."""

from collections.abc import Sequence
from functools import lru_cache, partial

from starlette.requests import Request

from posttrain.backend.errors import ConfigError
from posttrain.renderers import get_renderer
from posttrain.serve.openai_api import ServedModel
from posttrain.serve.state import State
from posttrain.serve.store import UnknownPathError


class PublicModels:
    """Listed are the models by name; checkpoints are served by their path. `renderer` None follows
    each model's chat template."""

    def __init__(self, state: State, renderer: str | None = None):
        self._state = state
        self._renderer = lru_cache(maxsize=32)(partial(get_renderer, renderer))  # of a tokenizer

    def names(self) -> Sequence[str]:
        return [*self._state.bases]

    async def open(self, name: str, request: Request) -> ServedModel | None:
        is_path = name.startswith("tinker://")
        if not is_path and name not in self._state.bases:
            return None
        try:
            client = await self._state.sampling_client(name)
        except (UnknownPathError, ConfigError):
            return None
        return ServedModel(client, self._renderer(client.get_tokenizer()))
