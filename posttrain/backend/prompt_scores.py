"""What else the tokens of a prompt can be asked for: logprobs of other tokens at its positions
(`target_prompt_logprobs` of the Tinker SDK), and tokens drawn there (`prompt_alt_tokens_k`). Both
need the whole distribution at each position.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from posttrain.backend.config import in_float64
from posttrain.backend.errors import DataError
from posttrain.backend.ranges import Range, RangeError
from posttrain.backend.types import PromptAltTokens, TensorData

MOST_SCORES = 2**22  # positions times targets or draws, in one call
ROWS = 4096  # most positions whose distribution is in memory at once
ELEMENTS = 2**26  # most of these times the vocabulary: with draws 2 GB


@dataclass(frozen=True)
class PromptScores:
    """`targets_TK`: token ids at positions 1 to T of the prompt, -1 for none. `draws`: tokens to draw
    at each of them at `temperature`, with a generator of `seed`."""

    targets_TK: np.ndarray | None
    draws: int
    temperature: float
    seed: int


@dataclass
class ScoredPrompt:
    """What `PromptScores` asked for, or None."""

    target_logprobs: TensorData | None = None
    alt_tokens: PromptAltTokens | None = None


def check_scores(length: int, vocabulary: int, targets: TensorData | None, draws: int) -> None:
    """DataError or RangeError for what cannot be scored at a prompt of `length` tokens."""
    if needs := Range(0, MOST_SCORES // max(length, 1), whole=True).needs(draws):
        raise RangeError("prompt_alt_tokens_k", draws, needs)
    if targets is None:
        return
    name = "target_prompt_logprobs"
    if targets.dtype != "int64" or len(targets.shape) != 2 or targets.shape[0] != length - 1:
        raise DataError(
            f"{name} is {targets.dtype} of shape {targets.shape}: int64 of ({length - 1}, K) is needed, a row for each "
            "token of the prompt but the first"
        )
    if targets.array.size > MOST_SCORES:
        raise DataError(f"{name} asks for {targets.array.size} logprobs: at most {MOST_SCORES} in one call")
    if targets.array.size and not -1 <= targets.array.min() <= targets.array.max() < vocabulary:
        raise DataError(f"{name} has a token outside the vocabulary of {vocabulary}; -1 asks for nothing")


def blocks(num_rows: int, vocabulary: int) -> Iterator[slice]:
    """Positions whose distributions are in memory at once."""
    size = min(ROWS, max(1, ELEMENTS // vocabulary))
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def score_prompt(
    wanted: PromptScores, num_rows: int, vocabulary: int, logprobs_of: Callable[[slice], torch.Tensor]
) -> ScoredPrompt:
    """`logprobs_of(rows)` is (T, V), at temperature 1, of positions 1 to `num_rows`."""
    targets_TK, scores, tokens, logprobs = wanted.targets_TK, [], [], []
    generator = torch.Generator().manual_seed(wanted.seed)
    for rows in blocks(num_rows, vocabulary):
        logprobs_TV = logprobs_of(rows)
        if targets_TK is not None:
            ids_TK = torch.from_numpy(targets_TK[rows]).to(logprobs_TV.device)
            scores.append(logprobs_TV.gather(-1, ids_TK.clamp(min=0)).where(ids_TK >= 0, 0.0).cpu().numpy())
        if wanted.draws:
            drawn = _draw(logprobs_TV, wanted.draws, wanted.temperature, generator)
            for values, found in zip((tokens, logprobs), drawn, strict=True):
                values.append(found.cpu().numpy())
    scored = ScoredPrompt()
    if targets_TK is not None:
        scored.target_logprobs = TensorData(_joined(scores, targets_TK.shape[1]), "float32")
    if wanted.draws:
        scored.alt_tokens = PromptAltTokens(
            TensorData(_joined(tokens, wanted.draws), "int64"), TensorData(_joined(logprobs, wanted.draws), "float32")
        )
    return scored


def _draw(
    logprobs_TV: torch.Tensor, draws: int, temperature: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, draws) tokens, and their logprobs under the tempered distribution."""
    if temperature == 0:
        best_T1 = logprobs_TV.argmax(-1, keepdim=True)
        return best_T1.expand(-1, draws), torch.zeros(len(best_T1), draws)
    tempered_TV = (logprobs_TV / temperature).log_softmax(-1)
    cdf_TV = in_float64(tempered_TV).exp().cumsum(-1)
    uniform_TK = torch.rand(len(cdf_TV), draws, generator=generator, dtype=torch.float64).to(cdf_TV.device)
    tokens_TK = torch.searchsorted(cdf_TV, uniform_TK * cdf_TV[:, -1:], right=True).clamp(max=cdf_TV.shape[1] - 1)
    return tokens_TK, tempered_TV.gather(-1, tokens_TK.to(tempered_TV.device))


def _joined(parts: list[np.ndarray], width: int) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros((0, width))
