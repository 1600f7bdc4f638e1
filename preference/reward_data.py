"""The interface of both kinds of reward model to training: comparisons in; examples, a client and
an objective out.
"""

from collections.abc import Sequence
from itertools import chain

import chz

from posttrain.backend.errors import DataError
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import Datum, LoraConfig
from posttrain.renderers.types import Renderer
from preference.reward_types import PreferenceModel
from preference.types import ComparisonDatasetBuilder, LabeledComparison
from supervised.examples import by_processes
from supervised.train import Objective
from supervised.types import SupervisedDataset, SupervisedDatasetBuilder


@chz.chz
class RewardExamplesBuilder(SupervisedDatasetBuilder):
    """Comparisons to train a reward model on. `batch_size` counts comparisons, of a label model in one order."""

    comparisons: ComparisonDatasetBuilder = chz.field(doc="builder of the comparisons")

    def examples(self, renderer: Renderer, labeled_D: Sequence[LabeledComparison]) -> SupervisedDataset:
        """Training examples of comparisons that fit the context."""
        raise NotImplementedError

    def length(self, renderer: Renderer, labeled: LabeledComparison) -> int:
        """Tokens of the longest sequence the model reads for this comparison."""
        raise NotImplementedError

    def create_client(
        self, service: ServiceClient, model_name: str, lora: LoraConfig | None, seed: int
    ) -> TrainingClient:
        """The model at the start of training."""
        raise NotImplementedError

    def model(self, client: TrainingClient, renderer: Renderer) -> PreferenceModel:
        """The model in training, to evaluate in one order of the sides at a time."""
        raise NotImplementedError

    def objective(self) -> Objective[list[Datum]]:
        raise NotImplementedError

    def load(self, renderer: Renderer) -> tuple[list[LabeledComparison], list[LabeledComparison]]:
        """Training and held-out comparisons that fit; one printed line counts the dropped."""
        train_D, test_D = self.comparisons()
        for labeled in (*train_D, *test_D):
            if labeled.comparison.tools:
                raise DataError(f"{labeled.where}: a field 'tools', which reward models do not read; leave it out")
        limit = self.max_length or renderer.tokenizer.model_max_length
        kept_train_D = self._fitting(renderer, train_D, limit, "comparisons")
        kept_test_D = self._fitting(renderer, test_D, limit, "held-out comparisons")
        total, kept = len(train_D) + len(test_D), len(kept_train_D) + len(kept_test_D)
        if not kept_train_D or (test_D and not kept_test_D):
            raise DataError(
                f"of {total:,} comparisons {kept} fit into {limit} tokens: raise max_length, or take a larger model"
            )
        if kept < total:
            print(
                f"{type(self).__name__}: {total - kept:,} of {total:,} comparisons are longer than {limit} tokens; "
                "dropped"
            )
        return kept_train_D, kept_test_D

    def _fitting(
        self, renderer: Renderer, labeled_D: Sequence[LabeledComparison], limit: int, kind: str
    ) -> list[LabeledComparison]:
        def fitting(part_D: Sequence[LabeledComparison]) -> list[bool]:
            return [self.length(renderer, labeled) <= limit for labeled in part_D]

        fit_D = chain.from_iterable(by_processes(fitting, labeled_D, f"measuring {kind}"))
        return [labeled for labeled, fits in zip(labeled_D, fit_D, strict=True) if fits]

    def __call__(self, renderer: Renderer) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        train_D, test_D = self.load(renderer)
        return self.examples(renderer, train_D), self.examples(renderer, test_D) if test_D else None
