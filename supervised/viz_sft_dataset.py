"""Prints examples of a supervised dataset, coloured by weight: what the model is trained on, and
what it only reads.

python supervised/viz_sft_dataset.py dataset=conversations.jsonl model_name=tiny num_examples=5
"""

# run as a file, this folder is first on the path, and its types.py would shadow the standard one
if not __package__:
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from itertools import groupby

import chz
from rich.console import Console
from rich.text import Text

from posttrain.backend.ranges import COUNT
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.types import Datum
from posttrain.renderers import get_renderer
from posttrain.renderers.turns import decode
from posttrain.renderers.types import Renderer, Tokenizer
from posttrain.tracking.command_line import by_name, run_command
from supervised.data import ChatDatasetBuilder
from supervised.names import DATASETS
from supervised.types import SupervisedDatasetBuilder


@chz.chz
class Config:
    """Shows which tokens of a dataset carry loss."""

    dataset: SupervisedDatasetBuilder = chz.field(
        default_factory=by_name(DATASETS["arithmetic"]), doc="builder of the dataset"
    )
    model_name: str = chz.field(default="tiny", doc="model of the tokenizer: a preset, a local folder or a hub name")
    renderer_name: str | None = chz.field(
        default=None, doc="role_colon, chat_template or plain; None = the model's own"
    )
    num_examples: int = chz.field(default=5, validator=COUNT, doc="examples to print")


def colored_example(datum: Datum, tokenizer: Tokenizer) -> Text:
    """The text with trained tokens in green, the rest dim, and visible line breaks. A new colour is
    a new weight."""
    targets = datum.loss_fn_inputs["target_tokens"].tolist()
    tokens = [*datum.model_input.to_ints()[:1], *targets]
    weights = [0.0, *datum.loss_fn_inputs["weights"].tolist()]
    text = Text()
    for weight, run in groupby(zip(tokens, weights, strict=True), key=lambda pair: pair[1]):
        piece = decode(tokenizer, [token for token, _ in run]).replace("\n", "⏎\n")
        text.append(piece, style="dim" if weight == 0 else "bold green" if weight > 0 else "bold red")
    return text


def weighted_share(data: list[Datum]) -> tuple[int, int]:
    """(tokens with weight, all tokens)."""
    weights = [datum.loss_fn_inputs["weights"].to_numpy() for datum in data]
    return sum(int((w != 0).sum()) for w in weights), sum(len(w) + 1 for w in weights)


def examples(builder: SupervisedDatasetBuilder, renderer: Renderer, count: int) -> list[Datum]:
    """The first `count`; of a file or a Hugging Face set only these are tokenized."""
    if isinstance(builder, ChatDatasetBuilder):
        return builder.first(renderer, count)
    # a set may have fewer examples than a batch
    dataset, _ = chz.replace(builder, batch_size=1)(renderer)
    return [datum for index in range(min(count, len(dataset))) for datum in dataset.get_batch(index)][:count]


def main(config: Config) -> None:
    tokenizer = load_tokenizer(config.model_name)
    renderer = get_renderer(config.renderer_name, tokenizer)
    console = Console()
    data = examples(config.dataset, renderer, config.num_examples)
    for i, datum in enumerate(data):
        weighted, total = weighted_share([datum])
        console.rule(f"example {i}: {weighted} of {total} tokens carry loss")
        console.print(colored_example(datum, tokenizer))
    weighted, total = weighted_share(data)
    console.rule()
    console.print(f"{weighted:,} of {total:,} tokens ({weighted / total:.0%}) of these {len(data)} examples carry loss")


if __name__ == "__main__":
    run_command(main, Config, {"dataset": DATASETS})
