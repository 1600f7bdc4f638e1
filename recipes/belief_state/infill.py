"""Infills the middles of held-out stories with a trained model, for judge.py.

    python recipes/belief_state/infill.py run=runs/bst out=bst.jsonl  # greedy, from left to right
    python recipes/belief_state/infill.py run=runs/bst out=plan.jsonl method=plan direction=reverse
    python recipes/belief_state/infill.py run=runs/fim out=fim.jsonl  # a GPT: greedy, goal first

A GPT trained without fill-in-the-middle is given the prompt only.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import chz
import numpy as np
from transformers import PreTrainedTokenizerBase

from posttrain.backend.errors import CheckpointError, ConfigError, DataError
from posttrain.backend.ranges import COUNT, WHOLE
from posttrain.tracking.command_line import run_command
from posttrain.tracking.jsonl import write_jsonl
from posttrain.tracking.progress import TrainingProgress
from recipes.belief_state.text import task_name
from recipes.belief_state.text_data import TextData
from recipes.belief_state.tokenizer import encode_documents, open_tokenizer
from recipes.libraries.belief_state.decoding import (
    Direction,
    Infill,
    infill_beam,
    infill_greedy,
    infill_plan,
    next_token_greedy,
)
from recipes.libraries.belief_state.files import load_belief_state, load_next_token
from recipes.libraries.belief_state.model import BeliefState, NextToken


@chz.chz
class Config:
    """Infills the middle of held-out documents."""

    run: str = chz.field(
        doc="run folder of train.py with data=text", munger=lambda _, path: str(Path(path).expanduser())
    )
    out: str = chz.field(doc="JSONL file to write", munger=lambda _, path: str(Path(path).expanduser()))
    checkpoint: str = chz.field(default="final", doc="name of the checkpoint in the run folder")
    method: Literal["greedy", "beam", "plan"] = chz.field(
        default="greedy", doc="how a BST decodes; a GPT decodes greedily"
    )
    direction: Direction = chz.field(default="forward", doc="which end of the gap is decoded first")
    rollouts: int = chz.field(default=10, validator=COUNT, doc="proposals of beam and plan")
    top_k: int = chz.field(default=5, validator=WHOLE, doc="alternatives at each position of a proposal")
    relative: bool = chz.field(default=False, doc="plan: queue by log p(token) - log p(best)")
    num_documents: int = chz.field(default=100, validator=COUNT, doc="held-out documents, the first ones")
    prompt_tokens: int = chz.field(default=64, validator=COUNT, doc="tokens given of the beginning")
    goal_tokens: int = chz.field(default=64, validator=COUNT, doc="tokens given of the end")
    max_tokens: int | None = chz.field(
        default=None, validator=COUNT, doc="longest middle; None = what fits a training row"
    )


@dataclass(frozen=True)
class Gap:
    prompt: list[int]
    middle: list[int]
    goal: list[int]


def cut_out(tokens_T: np.ndarray, prompt_tokens: int, goal_tokens: int) -> Gap:
    """Prompt and goal of the given lengths if a token is left between them; else a quarter each."""
    if len(tokens_T) <= prompt_tokens + goal_tokens:
        prompt_tokens = goal_tokens = len(tokens_T) // 4
    tokens, end = tokens_T.tolist(), len(tokens_T) - goal_tokens
    return Gap(tokens[:prompt_tokens], tokens[prompt_tokens:end], tokens[end:])


def main(config: Config) -> None:
    """Writes a JSON line per document: prompt, goal, generated, original, sampling_method, score,
    greedy, greedy_score, top_n ([text, score], best first), complete (ended by EOS).
    """
    data, is_bst = trained_on(Path(config.run))
    tokenizer, documents = held_out_documents(config, data)
    checkpoint = Path(config.run) / "checkpoints" / config.checkpoint
    model = (load_belief_state if is_bst else load_next_token)(checkpoint, task_name(tokenizer))
    fim = len(tokenizer) if not is_bst and data.fill_in_the_middle else None
    lines = []
    with TrainingProgress(len(documents), description="infilling") as progress:
        for number, tokens_T in enumerate(documents):
            gap = cut_out(tokens_T, config.prompt_tokens, config.goal_tokens)
            room = config.max_tokens or data.block_size - len(gap.prompt) - len(gap.goal) - 2
            lines.append(_line(tokenizer, gap, config, *fill(model, gap, config, room, fim)))
            progress.update(number)
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(out, lines)
    complete = sum(line["complete"] for line in lines)
    print(f"{lines[0]['prompt']} [{lines[0]['generated']}] {lines[0]['goal']}")
    print(f"{len(lines)} stories in {out}; {complete} middles ended by EOS")


def trained_on(run: Path) -> tuple[TextData, bool]:
    """The data of the run's config.json, and whether the model is a BST."""
    try:
        saved = json.loads((run / "config.json").read_text())
        data: Any = {name: saved["data"][name] for name in chz.chz_fields(TextData)}
        is_bst = saved["model"] == "bst"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{run} is not a run of train.py with data=text (config.json: {error})") from error
    data["goal_range"] = tuple(data["goal_range"])
    return TextData(**data), is_bst


def held_out_documents(config: Config, data: TextData) -> tuple[PreTrainedTokenizerBase, list[np.ndarray]]:
    """The run's tokenizer, and the held-out documents that fit its rows."""
    tokenizer = open_tokenizer(str(Path(config.run) / "tokenizer"))
    documents = encode_documents(tokenizer, data.texts()[1])
    fitting = [tokens_T for tokens_T in documents if 4 <= len(tokens_T) <= data.block_size - 2][: config.num_documents]
    if not fitting:
        raise DataError(f"no held-out document of {data.source} has 4 to {data.block_size - 2} tokens")
    return tokenizer, fitting


def fill(
    model: BeliefState | NextToken, gap: Gap, config: Config, max_tokens: int, fim: int | None
) -> tuple[list[Infill], Infill]:
    """All infills, best first, and the greedy infill."""
    if isinstance(model, NextToken):
        if config.method != "greedy" or config.direction != "forward":
            raise ConfigError(
                f"method={config.method} direction={config.direction}: a GPT decodes greedily from left to right"
            )
        goal_first = [] if fim is None else [*gap.goal, fim]
        greedy = next_token_greedy(model, [model.config.eos_id, *goal_first, *gap.prompt], max_tokens)
        return [greedy], greedy
    ends = (gap.prompt, gap.goal, max_tokens, config.direction)
    greedy = infill_greedy(model, *ends)
    if config.method == "greedy":
        return [greedy], greedy
    if config.method == "beam":
        infills = infill_beam(model, *ends, config.rollouts, config.top_k)
    else:
        infills = infill_plan(model, *ends, config.rollouts, config.top_k, config.relative)
    # the greedy infill with this method's score
    return infills, next(infill for infill in infills if infill.tokens == greedy.tokens)


def _line(
    tokenizer: PreTrainedTokenizerBase, gap: Gap, config: Config, infills: Sequence[Infill], greedy: Infill
) -> dict[str, Any]:
    def text(tokens: Sequence[int]) -> str:
        # a GPT may generate <|fim|>, which the tokenizer does not have
        return str(tokenizer.decode([token for token in tokens if token < len(tokenizer)]))

    best = infills[0]
    return {
        "prompt": text(gap.prompt),
        "goal": text(gap.goal),
        "sampling_method": config.method if config.direction == "forward" else f"reverse_{config.method}",
        "generated": text(best.tokens),
        "score": best.score,
        "complete": best.complete,
        "greedy": text(greedy.tokens),
        "greedy_score": greedy.score,
        "top_n": [[text(infill.tokens), infill.score] for infill in infills],
        "original": text([*gap.prompt, *gap.middle, *gap.goal]),
    }


if __name__ == "__main__":
    run_command(main, Config)
