"""The same tasks as supervised data: for the SFT baseline, for the warm start of a preset, and for
the diagnostic.
"""

from collections.abc import Sequence
from typing import Literal

import chz

from posttrain.backend.types import Datum
from posttrain.renderers.turns import encode
from posttrain.renderers.types import Renderer
from posttrain.tracking.datasets import ListDataset
from recipes.latro.env import answer_tokens, prompt_tokens
from recipes.latro.tasks import Task, TaskBuilder
from rl.likelihood_reward import answer_datum
from supervised.types import SupervisedDataset, SupervisedDatasetBuilder

# answer: the answer right behind the question. rationale: the gold rationale, where there is one,
# and the answer. demonstrations: the data set's own mixture of rationales, with the answers they
# support.
Target = Literal["answer", "rationale", "demonstrations"]


def targets(builder: TaskBuilder, tasks: Sequence[Task], what: Target) -> list[tuple[Task, str]]:
    """Tasks and the rationale that stands between question and answer."""
    if what == "demonstrations":
        return builder.demonstrations(tasks)
    return [(task, (task.solution or "") if what == "rationale" else "") for task in tasks]


def example(renderer: Renderer, task: Task, rationale: str, answer_only: bool = False) -> Datum:
    """Weight 1 on what follows the question, or on the answer only."""
    context, thought, answer = (
        prompt_tokens(renderer, task),
        encode(renderer.tokenizer, rationale),
        answer_tokens(renderer, task.answer),
    )
    return answer_datum([*context, *thought], answer) if answer_only else answer_datum(context, [*thought, *answer])


@chz.chz
class TaskExamples(SupervisedDatasetBuilder):
    """Supervised examples of the training split, with the validation split held out."""

    tasks: TaskBuilder = chz.field(doc="the data set")
    target: Target = chz.field(
        default="answer", doc="what follows the question: the answer, the gold rationale too, or demonstrations"
    )

    def __call__(self, renderer: Renderer) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        train, validation = (self._examples(tasks, renderer) for tasks in self.tasks.split())
        size = min(self.batch_size, len(train))
        return ListDataset(train, size, self.seed), ListDataset(validation, size, shuffle=False)

    def _examples(self, tasks: Sequence[Task], renderer: Renderer) -> list[Datum]:
        limit = min(self.max_length or renderer.tokenizer.model_max_length, renderer.tokenizer.model_max_length)
        data = [example(renderer, task, rationale) for task, rationale in targets(self.tasks, tasks, self.target)]
        kept = [datum for datum in data if datum.model_input.length <= limit]
        if len(kept) < len(data):
            print(f"{len(data) - len(kept)} of {len(data)} examples are longer than {limit} tokens: dropped")
        return kept
