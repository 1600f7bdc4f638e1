"""Rollouts decoded for posttrain.tracking.transcripts, with advantages and errors. For reading
only.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from posttrain.renderers.turns import decode, token_text
from posttrain.renderers.types import Tokenizer
from posttrain.tracking.transcripts import TranscriptGroup, TranscriptMember, TranscriptTurn, write_transcripts
from rl.types import Trajectory, TrajectoryGroup, Transition


def write_rollouts(
    folder: Path,
    step: int,
    groups_P: Sequence[TrajectoryGroup],
    advantages_P_G: Sequence[np.ndarray] | None,
    tokenizer: Tokenizer,
) -> Path:
    """Writes `folder`/<step>.html and .jsonl, and the index. An evaluation has no advantages."""
    no_advantages = [None] * len(groups_P)
    pairs = zip(groups_P, no_advantages if advantages_P_G is None else advantages_P_G, strict=True)
    return write_transcripts(folder, step, [transcript_group(*pair, tokenizer) for pair in pairs])


def transcript_group(group: TrajectoryGroup, advantages_G: np.ndarray | None, tokenizer: Tokenizer) -> TranscriptGroup:
    shown_G = [None] * len(group.trajectories_G) if advantages_G is None else advantages_G.tolist()
    parts = (group.trajectories_G, group.get_total_rewards(), shown_G, group.final_rewards_G, group.metrics_G)
    members = [
        TranscriptMember(
            turns=_turns(trajectory, advantage, tokenizer),
            total_reward=reward,
            advantage=advantage,
            stop_reason=trajectory.stop_reason,
            final_reward=final_reward,
            metrics=metrics,
        )
        for trajectory, reward, advantage, final_reward, metrics in zip(*parts, strict=True)
    ]
    members += [TranscriptMember([], float("nan"), error=f"{type(error).__name__}: {error}") for error in group.errors]
    seats = group.builder is not None and not group.builder.members_are_independent
    num_seats = max(1, len(members) // group.builder.num_games) if group.builder is not None and seats else 0
    return TranscriptGroup(members, group.tags, group.num_retries, num_seats)


def _turns(trajectory: Trajectory, advantage: float | None, tokenizer: Tokenizer) -> list[TranscriptTurn]:
    return [
        _turn(turn, ob, continues, advantage, tokenizer)
        for turn, (ob, continues) in zip(trajectory.transitions, trajectory.new_observations(), strict=True)
    ]


def _turn(
    turn: Transition, new_ob: list[int], continues: bool, advantage: float | None, tokenizer: Tokenizer
) -> TranscriptTurn:
    tokens = turn.ac.tokens
    advantages = None
    if advantage is not None:
        token_advantages = turn.token_advantages or [0.0] * len(tokens)
        advantages = [advantage + token_advantage for token_advantage in token_advantages]
    return TranscriptTurn(
        prompt_text=decode(tokenizer, new_ob),
        tokens=[token_text(tokenizer, token) for token in tokens],
        advantages=advantages,
        logprobs=turn.ac.logprobs,
        reward=turn.reward,
        metrics=turn.metrics,
        logs=turn.logs,
        stop_reason=turn.ac.stop_reason,
        continues=continues,
    )
