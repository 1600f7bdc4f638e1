"""A model for one game: a byte-level BPE tokenizer trained on the game's text, and a small GPT-2
with that vocabulary.

A row of the board is one token, as is a move, and a position of 450 characters takes 10 to 18
tokens. With a token per cell the model learns lines late (README). Left out: other games.
"""

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from envs.opponents import listed_moves, minimax_move
from envs.textarena import TextArenaBuilder
from posttrain.backend.models import PRESETS
from posttrain.backend.random_state import drawn_from

# a move, alone or in the list of legal moves; a row of the board
PIECES = r"'?\[\d\]'?(?:, )?| [\dXO] \| [\dXO] \| [\dXO] "
SPECIAL_TOKENS = ["<|pad|>", "<|endoftext|>"]
TOKENIZER_GAMES = 200


def random_game(task: TextArenaBuilder, seed: list[int], skill: float = 0.0) -> Iterator[tuple[str, str]]:
    """Observations and moves of one game. A move is perfect with probability `skill`, else a random
    legal one.
    """
    rng = np.random.default_rng(seed)
    game = task.open_game(int(rng.integers(2**31)))
    while not game.over:
        moves = listed_moves(game.text)
        move = minimax_move(game, rng) if rng.random() < skill else moves[rng.integers(len(moves))]
        yield game.text, move
        game.move(move)


def game_tokenizer(task: TextArenaBuilder, max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer trained on random games with fixed seeds, so it is always the same."""
    texts = [text + move for i in range(TOKENIZER_GAMES) for text, move in random_game(task, [i])]
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(byte_level.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[1],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def save_model(path: Path, task: TextArenaBuilder, seed: int) -> None:
    """Writes a Hugging Face folder with random weights given by `seed`, for `model_name=path`."""
    config = copy.deepcopy(PRESETS["gpt2-tiny"])
    tokenizer = game_tokenizer(task, config.max_position_embeddings)
    config.vocab_size, config.bos_token_id, config.pad_token_id, config.eos_token_id = len(tokenizer), None, 0, 1
    config.n_layer = 2  # one to gather the rows, one to compare them
    with drawn_from(seed):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
