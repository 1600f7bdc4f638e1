"""LaTRO's tasks as supervised data, for SFT, a preset's warm start and the diagnostic."""

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

# answer: the answer alone. rationale: the gold rationale, if any, and the answer.
# demonstrations: the data set's own mixture of rationales, each with the answer that it supports.
Target = Literal["answer", "rationale", "demonstrations"]


def targets(builder: TaskBuilder, tasks: Sequence[Task], target: Target) -> list[tuple[Task, str]]:
    """Tasks, each with the rationale between question and answer ("" for none)."""
    if target == "demonstrations":
        return builder.demonstrations(tasks)
    return [(task, (task.solution or "") if target == "rationale" else "") for task in tasks]


def example(renderer: Renderer, task: Task, rationale: str, answer_only: bool = False) -> Datum:
    """Weight 1 on everything after the question, or on the answer only."""
    context, thought = prompt_tokens(renderer, task), encode(renderer.tokenizer, rationale)
    answer = answer_tokens(renderer, task.answer)
    return answer_datum([*context, *thought], answer) if answer_only else answer_datum(context, [*thought, *answer])


@chz.chz
class TaskExamples(SupervisedDatasetBuilder):
    """Supervised examples of the training split, with the validation split held out."""

    tasks: TaskBuilder = chz.field(doc="the data set")
    target: Target = chz.field(
        default="answer",
        doc="text after the question: the answer, the gold rationale and the answer, or demonstrations",
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
