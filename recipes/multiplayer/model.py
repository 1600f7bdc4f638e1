"""A model for one game: a tokenizer trained on the game's own text, and a small GPT-2 with that
vocabulary, saved as a folder.

The tokenizer is a byte-level BPE, so any text round-trips. A row of the board and a move are cut
out first and are tokens of their own; what lies between them is the same in every game and becomes
one token each: a position of 450 characters takes 10 to 18 tokens. A row is a token because lines
are what the game is about: with a token for each cell, the layers have first to learn which cell is
where, and see lines late (figures in the README). GPT-2, because its learned positions say which
row is which. Left out: other games, whose boards are not rows of three.
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

# a move, alone or in the list of legal ones; a row of the board
PIECES = r"'?\[\d\]'?(?:, )?| [\dXO] \| [\dXO] \| [\dXO] "
SPECIAL_TOKENS = ["<|pad|>", "<|endoftext|>"]
TOKENIZER_GAMES = 200


def random_game(task: TextArenaBuilder, seed: list[int], skill: float = 0.0) -> Iterator[tuple[str, str]]:
    """What the player to move sees, and its move, to the end of the game: with probability `skill`
    a perfect one, else a legal one drawn at random."""
    rng = np.random.default_rng(seed)
    game = task.open_game(int(rng.integers(2**31)))
    while not game.over:
        moves = listed_moves(game.text)
        move = minimax_move(game, rng) if rng.random() < skill else moves[rng.integers(len(moves))]
        yield game.text, move
        game.move(move)


def game_tokenizer(task: TextArenaBuilder, max_length: int) -> PreTrainedTokenizerFast:
    """Trained on random games with fixed seeds: always the same."""
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
    """A Hugging Face folder with random weights that depend on `seed` alone; `model_name=path`
    opens it.
    """
    config = copy.deepcopy(PRESETS["gpt2-tiny"])
    tokenizer = game_tokenizer(task, config.max_position_embeddings)
    config.vocab_size, config.bos_token_id, config.pad_token_id, config.eos_token_id = len(tokenizer), None, 0, 1
    config.n_layer = 2  # one to gather the rows, one to compare them
    with drawn_from(seed):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
