"""Rollouts as tracking.transcripts wants them: decoded, with advantages and errors. Decoding is for reading only; nothing trains on it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from renderers.types import Tokenizer
from rl.types import TrajectoryGroup, Transition
from tracking.transcripts import TranscriptGroup, TranscriptMember, TranscriptTurn, write_transcripts


def write_rollouts(
    folder: Path,
    step: int,
    groups_P: Sequence[TrajectoryGroup],
    advantages_P_G: Sequence[np.ndarray] | None,
    tokenizer: Tokenizer,
) -> Path:
    """Writes `folder`/<step>.html and .jsonl. `advantages_P_G` None: an evaluation, which has none."""
    shown = [
        _group(group, [None] * len(group.trajectories_G) if advantages_P_G is None else advantages_P_G[p].tolist(), tokenizer)
        for p, group in enumerate(groups_P)
    ]
    return write_transcripts(folder, step, shown)


def _group(group: TrajectoryGroup, advantages_G: Sequence[float | None], tokenizer: Tokenizer) -> TranscriptGroup:
    members = [
        TranscriptMember([_turn(turn, advantage, tokenizer) for turn in trajectory.transitions], reward, advantage)
        for trajectory, reward, advantage in zip(group.trajectories_G, group.get_total_rewards(), advantages_G, strict=True)
    ]
    members += [TranscriptMember([], float("nan"), error=f"{type(error).__name__}: {error}") for error in group.errors]
    return TranscriptGroup(members, group.tags)


def _turn(turn: Transition, advantage: float | None, tokenizer: Tokenizer) -> TranscriptTurn:
    return TranscriptTurn(
        prompt_text=str(tokenizer.decode(turn.ob.to_ints())),
        tokens=[str(tokenizer.decode([token])) for token in turn.ac.tokens],
        advantages=None if advantage is None else [advantage] * len(turn.ac.tokens),
        logprobs=turn.ac.logprobs,
        reward=turn.reward,
        metrics=turn.metrics,
        logs=turn.logs,
        stop_reason=turn.ac.stop_reason,
    )
