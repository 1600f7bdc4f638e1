"""Evaluators of a run, from its configuration: `evaluators` with each evaluation, and
`infrequent_evaluators`, the expensive ones, at intervals of their own. rl/evaluators.py has
environments and benchmarks; names.py the short names.
"""

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import chz

from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import WHOLE
from posttrain.renderers.types import Renderer
from posttrain.tracking.metrics_log import Metrics
from posttrain.tracking.run_config import LanguageModelRunConfig

if TYPE_CHECKING:  # commands answer before torch is imported
    from posttrain.backend.sampling_client import SamplingClient
    from posttrain.backend.training_client import TrainingClient


class Evaluated:
    """The trained model during one evaluation."""

    def __init__(self, training_client: "TrainingClient", sampling_client: "SamplingClient | None" = None):
        self.training_client, self._sampling_client = training_client, sampling_client

    async def sampling_client(self) -> "SamplingClient":
        """A client of the present weights; the first call of an evaluation syncs the sampler."""
        if self._sampling_client is None:
            self._sampling_client = await self.training_client.save_weights_and_get_sampling_client_async()
        return self._sampling_client


CustomEvaluator = Callable[[Evaluated], Awaitable[Metrics]]


@chz.chz
class EvaluatorBuilder:
    """Configuration of an evaluator."""

    async def __call__(self, renderer: Renderer) -> CustomEvaluator:
        """Called once, before the model is loaded: reads the data, and raises for bad input."""
        raise NotImplementedError


class EvaluatorList:
    """Evaluators in order, each with the option that chose it. Empty is false."""

    def __init__(self, evaluators: Sequence[tuple[str, CustomEvaluator]] = ()):
        self._evaluators = evaluators

    def __len__(self) -> int:
        return len(self._evaluators)

    async def __call__(self, model: Evaluated, others: Metrics | None = None) -> Metrics:
        """`others` and the evaluators' metrics. ConfigError if two have the same name."""
        metrics = {**(others or {})}
        for option, evaluator in self._evaluators:
            added = await _awaited(option, evaluator(model))
            if not isinstance(added, Mapping):
                raise ConfigError(f"{option} returned {added!r:.100}, not a dict of metrics")
            for name, value in added.items():
                try:
                    float(value)
                except (TypeError, ValueError):
                    raise ConfigError(f"{option} returned the metric {name}={value!r:.100}: not a number") from None
            if twice := metrics.keys() & added.keys():
                raise ConfigError(
                    f"{option} returns the metric {min(twice)}, which is there already: set {option}.name"
                )
            metrics |= added
        return metrics


@dataclass(frozen=True)
class RunEvaluators:
    """`frequent` with each evaluation of the run, `infrequent` every `infrequent_every` steps."""

    frequent: EvaluatorList = field(default_factory=EvaluatorList)
    infrequent: EvaluatorList = field(default_factory=EvaluatorList)
    infrequent_every: int = 0


@chz.chz
class EvaluatedRunConfig(LanguageModelRunConfig):
    """A run of a language model that samples, with evaluators of the user's choice."""

    evaluators: list[EvaluatorBuilder] = chz.field(
        default_factory=list, doc="further evaluators, run every eval_every steps: evaluators.0=env, and so on"
    )
    infrequent_evaluators: list[EvaluatorBuilder] = chz.field(
        default_factory=list,
        doc="expensive evaluators, run every infrequent_eval_every steps: infrequent_evaluators.0=env",
    )
    infrequent_eval_every: int = chz.field(
        default=100,
        validator=WHOLE,
        doc="steps between runs of infrequent_evaluators; also at the start and the end; 0 = never",
    )

    async def build_evaluators(self, renderer: Renderer) -> RunEvaluators:
        """Without those whose interval is 0. Raises for bad input, before the model is loaded."""
        frequent = self.evaluators if self.eval_every else []
        infrequent = self.infrequent_evaluators if self.infrequent_eval_every else []
        return RunEvaluators(
            await _built("evaluators", frequent, renderer),
            await _built("infrequent_evaluators", infrequent, renderer),
            self.infrequent_eval_every,
        )


async def _built(option: str, builders: Sequence[EvaluatorBuilder], renderer: Renderer) -> EvaluatorList:
    names = [f"{option}.{i}" for i in range(len(builders))]
    return EvaluatorList(
        [(name, await _awaited(name, builder(renderer))) for name, builder in zip(names, builders, strict=True)]
    )


async def _awaited(option: str, result: Any) -> Any:
    if not inspect.isawaitable(result):
        raise ConfigError(f"{option} returned {result!r:.100} without being an `async def`")
    return await result
