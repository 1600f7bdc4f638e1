"""Supervised data: files, Hugging Face datasets and mixtures to batches of Datum. Rendered once,
when the dataset is built: malformed, empty and over-long examples are found before a model loads.
Left out: streaming from sets whose tokens, 8 bytes each, do not fit into memory.
"""

import json
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Literal

import chz
import numpy as np

from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.ranges import POSITIVE, WHOLE
from posttrain.backend.types import Datum
from posttrain.renderers import with_tools_as_json
from posttrain.renderers.turns import bos, decode, encode_text, eos
from posttrain.renderers.types import Message, Renderer, TrainOnWhat
from posttrain.tracking.datasets import ListDataset, held_out
from supervised.examples import Examples, Joined, Ordered, by_processes
from supervised.examples import datum_from_tokens_weights as datum_from_tokens_weights
from supervised.forms import customized, form_of, one_form, print_form, read_row
from supervised.names import DATASETS
from supervised.rows import (
    Fields,
    Row,
    after_system,
    called,
    checked_messages,
    checked_rows,
    conversation,
    exchange,
    system_of,
    tools_of,
)
from supervised.table_rows import BLOCK, file_rows, picked, table_rows
from supervised.types import SupervisedDataset, SupervisedDatasetBuilder, datasets_of

MOST_OF_AN_END = 16  # tokens; more are words


def conversation_to_datum(
    messages: Sequence[Message],
    renderer: Renderer,
    max_length: int | None = None,
    train_on_what: TrainOnWhat = TrainOnWhat.ALL_ASSISTANT_MESSAGES,
    reduction: str = "mean",
) -> Datum:
    """Renders and truncates to `max_length` tokens."""
    return datum_from_tokens_weights(*renderer.build_supervised_example(messages, train_on_what), max_length, reduction)


def render(
    conversations: Sequence[Sequence[Message]], renderer: Renderer, builder: SupervisedDatasetBuilder
) -> list[Datum]:
    """A Datum per conversation, by the builder's max_length, train_on_what and reduction."""
    max_length = builder.max_length or renderer.tokenizer.model_max_length
    how = (renderer, max_length, builder.train_on_what, builder.reduction)
    return [conversation_to_datum(messages, *how) for messages in conversations]


def offering(fields: Fields, renderer: Renderer) -> Renderer:
    """The renderer with the tools of a row."""
    tools = tools_of(fields)
    return with_tools_as_json(renderer, json.dumps(tools)) if tools else renderer


class MixtureDataset(ListDataset[Datum]):
    """Sources spread over an epoch by weight. The epoch ends when every source was seen whole; a
    source that runs out earlier begins again, reshuffled."""

    def __init__(self, sources: Sequence[Sequence[Datum]], weights: Sequence[float], batch_size: int, seed: int = 0):
        self.sizes = [len(source) for source in sources]
        shares = np.asarray(weights) / sum(weights)
        length = max(size / share for size, share in zip(self.sizes, shares, strict=True))
        self.counts = [max(size, round(length * share)) for size, share in zip(self.sizes, shares, strict=True)]
        super().__init__(Joined(sources), batch_size, seed)

    def order(self, epoch: int) -> np.ndarray:
        indices, times, offset = [], [], 0
        for source, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            passes = [
                np.random.default_rng([self.seed, epoch, source, again]).permutation(size)
                for again in range(-(-count // size))
            ]
            indices.append(offset + np.concatenate(passes)[:count])
            # when in the epoch this source has its k-th turn
            times.append((np.arange(count) + 0.5) / count)
            offset += size
        return np.concatenate(indices)[np.argsort(np.concatenate(times), kind="stable")]


@chz.chz
class ChatDatasetBuilder(SupervisedDatasetBuilder):
    """The options that all sets of conversations share: split, rendering, length limit."""

    test_size: int = chz.field(
        default=0, validator=WHOLE, doc="examples held out from the training data, drawn by seed; 0 = none"
    )
    overlong: Literal["drop", "truncate", "raise"] = chz.field(
        default="drop",
        doc="examples longer than max_length are dropped, cut at the right, or an error; the count is printed",
    )

    def rows(self) -> tuple[Sequence[Row], Sequence[Row]]:
        """Training rows and held-out rows ([] if there are none)."""
        raise NotImplementedError

    def messages(self, fields: Fields) -> list[Message]:
        """The conversation in a row. Raises DataError without the row's place."""
        raise NotImplementedError

    def example(self, fields: Fields, renderer: Renderer) -> tuple[list[int], list[float]]:
        """Tokens of a row and their weights: a function of the row, as several processes share a large set."""
        given = checked_messages(f"what {type(self).__name__}.messages returned", called(self, "messages", fields))
        messages, what = customized(given, self.train_on_what)
        return offering(fields, renderer).build_supervised_example(messages, what)

    def __call__(self, renderer: Renderer) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        train_rows, test_rows = self._split()
        train = self._render(train_rows, renderer)
        test = self._render(test_rows, renderer, " held out") if test_rows else Examples(self.reduction)
        if seen := test.count_in(train):
            print(f"WARNING {seen:,} of the {len(test):,} held-out examples are trained on, too", flush=True)
        return ListDataset(train, self.batch_size, self.seed), held_out(test, self.batch_size)

    def first(self, renderer: Renderer, count: int) -> list[Datum]:
        """Up to `count` training examples in their first order, that of a set from which none is
        dropped. Only their rows are tokenized."""
        train, _ = self._split()
        data, limit = Examples(self.reduction), self._limit(renderer)
        for i in np.random.default_rng([self.seed, 0]).permutation(len(train)):
            data.extend(self._tokenized(renderer, limit, [train[i]])[0])
            if len(data) == count:
                break
        return [*data]

    def _split(self) -> tuple[Sequence[Row], Sequence[Row]]:
        train, test = checked_rows(self, self.rows())
        if not self.test_size:
            return train, test
        if test:
            raise ConfigError(f"test_size={self.test_size} and a held-out set: give one of them")
        if not 0 < self.test_size < len(train):
            raise DataError(f"test_size={self.test_size} of {len(train):,} examples: it must leave some to train on")
        chosen = set(np.random.default_rng(self.seed).permutation(len(train))[: self.test_size].tolist())
        return picked(train, [i for i in range(len(train)) if i not in chosen]), picked(train, sorted(chosen))

    def _limit(self, renderer: Renderer) -> int:
        return int(self.max_length or min(renderer.tokenizer.model_max_length, 1 << 30))

    def _render(self, rows: Sequence[Row], renderer: Renderer, kind: str = "") -> Examples:
        """Prints one line: the number of examples, dropped and truncated."""
        data, overlong, emptied, wordless, limit = Examples(self.reduction), 0, 0, 0, self._limit(renderer)
        tokenize = partial(self._tokenized, renderer, limit)
        for part, *counts in by_processes(tokenize, rows, f"tokenizing{kind} examples"):
            data.extend(part)
            overlong, emptied, wordless = overlong + counts[0], emptied + counts[1], wordless + counts[2]
        line = f"{rows[0][0].rsplit(':', 1)[0]}: {len(rows):,}{kind} examples"
        if overlong:
            line += f", {overlong:,} longer than {limit} tokens {'dropped' if self.overlong == 'drop' else 'truncated'}"
        if emptied:
            line += f" ({emptied:,} of them dropped: nothing to train on was left)"
        if wordless:
            line += f"; WARNING {wordless:,} have an empty answer, of which the end alone is trained on"
        if not data:
            raise DataError(f"{line}: none is left; raise max_length or check the data")
        print(line, flush=True)
        return data

    def _tokenized(self, renderer: Renderer, limit: int, rows: Sequence[Row]) -> tuple[Examples, int, int, int]:
        """The examples, how many were longer than `limit` tokens, how many of these have nothing to
        train on left, and how many have no words to train on."""
        data, overlong, emptied, wordless = Examples(self.reduction), 0, 0, 0
        for where, fields in rows:
            try:
                tokens, weights = self.example(fields, renderer)
                if len(tokens) > limit:
                    overlong += 1
                    if self.overlong == "raise":
                        raise DataError(
                            f"{len(tokens)} tokens, more than max_length={limit}; overlong=drop leaves it out"
                        )
                    if self.overlong == "drop":
                        continue
                    if not any(weights[1:limit]):
                        emptied += 1
                        continue
                data.append(tokens, weights, limit)
                wordless += _is_wordless(renderer, tokens, weights)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
        return data, overlong, emptied, wordless


def _is_wordless(renderer: Renderer, tokens: Sequence[int], weights: Sequence[float]) -> bool:
    """Whether all that is trained on is white space and the end of a turn."""
    stops = [*renderer.get_stop_sequences(), *eos(renderer.tokenizer)]
    words = (token for token, weight in zip(tokens, weights, strict=True) if weight and token not in stops)
    trained = list(islice(words, MOST_OF_AN_END + 1))
    ends = {"", *(stop.strip() for stop in stops if isinstance(stop, str))}
    return len(trained) <= MOST_OF_AN_END and decode(renderer.tokenizer, trained).strip() in ends


@chz.chz
class JsonLinesBuilder(ChatDatasetBuilder):
    """Rows from JSONL, JSON and Parquet files."""

    path: str = chz.field(doc="file to train on: JSONL, a JSON list, either compressed by gzip, or Parquet")
    test_path: str | None = chz.field(default=None, doc="held-out file of the same form")

    def rows(self) -> tuple[Sequence[Row], Sequence[Row]]:
        return file_rows(self.path), file_rows(self.test_path) if self.test_path else []


@chz.chz
class FileBuilder(JsonLinesBuilder):
    """A file of any form in supervised/forms.py, recognised by its rows' fields. A plain text is
    trained on whole, between BOS and EOS."""

    def rows(self) -> tuple[Sequence[Row], Sequence[Row]]:
        train, test = super().rows()
        rows = Joined((train, test))
        form = one_form(rows, form_of)
        print_form(self.path, form, rows, form.also)
        return train, test

    def example(self, fields: Fields, renderer: Renderer) -> tuple[list[int], list[float]]:
        return example_of_any_form(fields, renderer, self.train_on_what)


def example_of_any_form(
    fields: Fields, renderer: Renderer, train_on_what: TrainOnWhat
) -> tuple[list[int], list[float]]:
    """Tokens and weights of a row in a form of supervised/forms.py."""
    read = read_row(fields)
    if not isinstance(read, str):
        return offering(fields, renderer).build_supervised_example(*customized(read, train_on_what))
    tokens, end = encode_text(renderer.tokenizer, read), eos(renderer.tokenizer)
    tokens += [] if tokens[-1:] == end else end  # a text may have been written with its EOS
    start = bos(renderer.tokenizer)
    return tokens, [0.0] * len(start) + [1.0] * (len(tokens) - len(start))


@chz.chz
class ConversationFileBuilder(JsonLinesBuilder):
    """JSONL with messages in each line: {"messages": [{"role": "user", "content": "hi"}, ...]}."""

    def messages(self, fields: Fields) -> list[Message]:
        return after_system(system_of(fields), conversation(fields, "messages"))


@chz.chz
class PromptCompletionFileBuilder(JsonLinesBuilder):
    """JSONL with a prompt and a completion in each line. GSM8K: prompt_field=question
    completion_field=answer."""

    prompt_field: str = chz.field(default="prompt", doc="field with the user's message")
    completion_field: str = chz.field(default="completion", doc="field with the assistant's answer")
    prompt_template: str = chz.field(default="{prompt}", doc="the user's message; {prompt} stands for the prompt field")

    def messages(self, fields: Fields) -> list[Message]:
        messages = exchange(fields, self.prompt_field, self.completion_field, self.prompt_template)
        return after_system(system_of(fields), messages)


@chz.chz
class HuggingFaceBuilder(ChatDatasetBuilder):
    """A dataset of the hub, a data file, a folder of them, or a folder written by `save_to_disk`. Without
    a field "messages" the form of its rows is found by their fields, as a JSONL file's."""

    name: str = chz.field(doc="hub name, local folder or file (Parquet, CSV, JSON)")
    subset: str | None = chz.field(default=None, doc="configuration of the hub dataset, e.g. main")
    split: str = chz.field(default="train", doc="split to train on")
    test_split: str | None = chz.field(default=None, doc="split held out")
    messages_field: str = chz.field(
        default="messages", doc="field with the messages; unused when prompt_field is given"
    )
    prompt_field: str | None = chz.field(
        default=None, doc="field with the user's message; None = messages_field, or the form that the fields have"
    )
    completion_field: str = chz.field(default="completion", doc="field with the assistant's answer")
    prompt_template: str = chz.field(default="{prompt}", doc="the user's message; {prompt} stands for the prompt field")

    def messages(self, fields: Fields) -> list[Message]:
        if self.prompt_field is None:
            messages = conversation(fields, self.messages_field)
        else:
            messages = exchange(fields, self.prompt_field, self.completion_field, self.prompt_template)
        return after_system(system_of(fields), messages)

    def example(self, fields: Fields, renderer: Renderer) -> tuple[list[int], list[float]]:
        if self._is_of_a_form(fields):
            return example_of_any_form(fields, renderer, self.train_on_what)
        return super().example(fields, renderer)

    def _is_of_a_form(self, fields: Fields) -> bool:
        return self.prompt_field is None and self.messages_field == "messages" and "messages" not in fields

    def rows(self) -> tuple[Sequence[Row], Sequence[Row]]:
        train = table_rows(self.name, self.subset, self.split)
        return train, table_rows(self.name, self.subset, self.test_split) if self.test_split else []

    def _split(self) -> tuple[Sequence[Row], Sequence[Row]]:
        train, test = super()._split()
        first = train[:BLOCK]
        if self._is_of_a_form(first[0][1]):
            form = one_form(first[:1], form_of)
            print_form(self.name, form, first, form.also)
        return train, test


@chz.chz
class MixtureBuilder(SupervisedDatasetBuilder):
    """Several datasets in one, with its batch_size, max_length, train_on_what, reduction, seed."""

    builders: list[SupervisedDatasetBuilder] = chz.field(
        doc="the datasets: builders.0=..., builders.0.path=..., and so on"
    )
    weights: list[float] | None = chz.field(
        default=None, validator=POSITIVE, doc="share of each dataset in a batch; None = by size"
    )
    short_names = {"builders.*": DATASETS}

    def __call__(self, renderer: Renderer) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        if not self.builders or (self.weights is not None and len(self.weights) != len(self.builders)):
            raise ConfigError(
                f"a mixture of {len(self.builders)} builders with weights {self.weights}: give one weight for each"
            )
        train, test = zip(
            *(self._examples(i, builder, renderer) for i, builder in enumerate(self.builders)), strict=True
        )
        dataset = MixtureDataset(train, self.weights or [len(source) for source in train], self.batch_size, self.seed)
        return dataset, held_out(Joined(test), self.batch_size)

    def _examples(
        self, i: int, builder: SupervisedDatasetBuilder, renderer: Renderer
    ) -> tuple[Sequence[Datum], Sequence[Datum]]:
        common = {name: getattr(self, name) for name in chz.chz_fields(SupervisedDatasetBuilder)}
        default = SupervisedDatasetBuilder()
        for name, value in common.items():
            if getattr(builder, name) not in (getattr(default, name), value):
                raise ConfigError(
                    f"builders.{i}.{name}={getattr(builder, name)}: set {name} on the mixture: it holds for all"
                )
        train, test = datasets_of(chz.replace(builder, **{**common, "batch_size": 1}), renderer)
        return _in_order(train), _in_order(test) if test else []


def _in_order(dataset: SupervisedDataset) -> Sequence[Datum]:
    """The examples of its first epoch, of a data set that does not make batches of its own without a copy."""
    if type(dataset) in (ListDataset, MixtureDataset):
        return Ordered(dataset.items, dataset.order(0))  # type: ignore[attr-defined]
    return [datum for index in range(len(dataset)) for datum in dataset.get_batch(index)]
