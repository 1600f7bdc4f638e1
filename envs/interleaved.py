"""Several RL data sets in one: every batch has groups of each, in proportion to the weights. A set
that is used up begins its next epoch, so an epoch of all is that of the longest. Metrics of each
set are under its tag (env/gsm8k/...).

python -m rl.train_cli env=interleaved env.builders.0=gsm8k env.builders.1=arithmetic env.weights=3,1
"""

from collections.abc import Sequence

import chz
import numpy as np

from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import POSITIVE
from posttrain.renderers.types import Renderer
from posttrain.tracking.datasets import held_out
from rl import step_checks
from rl.evaluators import all_groups
from rl.names import ENVS
from rl.types import EnvGroupBuilder, RLDataset, RLDatasetBuilder


class InterleavedDataset(RLDataset):
    def __init__(self, sources: Sequence[RLDataset]):
        self.sources = sources

    def __len__(self) -> int:
        return max(len(source) for source in self.sources)

    def get_batch(self, index: int) -> list[EnvGroupBuilder]:
        return [group for source in self.sources for group in source.get_batch(index)]


def shares(batch_size: int, weights: Sequence[float]) -> list[int]:
    """Groups of each set in a batch, by largest remainder. ConfigError where a set has none."""
    exact = np.array(weights) / sum(weights) * batch_size
    counts = np.floor(exact).astype(int)
    for i in np.argsort(counts - exact, kind="stable")[: batch_size - counts.sum()]:
        counts[i] += 1
    if 0 in counts:
        raise ConfigError(
            f"batch_size={batch_size}, weights {list(weights)}: data set {counts.tolist().index(0)} has no group in a "
            "batch; raise batch_size or its weight"
        )
    return counts.tolist()


@chz.chz
class InterleavedBuilder(RLDatasetBuilder):
    """Several environments in one, with its batch_size, group_size and seed."""

    builders: list[RLDatasetBuilder] = chz.field(
        doc="the environments: builders.0=NAME, builders.0.field=..., and so on"
    )
    weights: list[float] | None = chz.field(
        default=None, validator=POSITIVE, doc="share of each environment in a batch; None = equal"
    )

    short_names = {"builders.*": ENVS}

    def recommended_max_tokens(self) -> int:
        return max(builder.recommended_max_tokens() for builder in self.builders)

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        weights = self.weights or [1.0] * len(self.builders)
        if not self.builders or len(weights) != len(self.builders):
            raise ConfigError(f"{len(self.builders)} builders with weights {self.weights}: give one weight for each")
        common = {name: getattr(self, name) for name in chz.chz_fields(RLDatasetBuilder)}
        train, tests = [], []
        for i, (builder, count) in enumerate(zip(self.builders, shares(self.batch_size, weights), strict=True)):
            for name, value in common.items():
                if (given := getattr(builder, name)) not in (chz.chz_fields(builder)[name]._default, value):
                    raise ConfigError(f"builders.{i}.{name}={given}: set env.{name} instead: it holds for all")
            of_this = chz.replace(builder, **{**common, "batch_size": count})
            dataset, test = await step_checks.datasets(of_this, renderer)
            train.append(dataset)
            tests += all_groups(test) if test else []
        return InterleavedDataset(train), held_out(tests, self.batch_size)
