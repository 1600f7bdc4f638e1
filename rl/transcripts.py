"""Rollouts decoded for posttrain.tracking.transcripts, with advantages and errors. For reading
only.
"""

from collections.abc import Mapping, Sequence
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
    token_advantages_P: Sequence[Mapping[int, np.ndarray]] | None = None,
) -> Path:
    """Writes `folder`/<step>.html and .jsonl, and the index. An evaluation has no advantages."""
    no_advantages = [None] * len(groups_P)
    of_tokens = token_advantages_P or [{}] * len(groups_P)
    parts = zip(groups_P, no_advantages if advantages_P_G is None else advantages_P_G, of_tokens, strict=True)
    shown = [transcript_group(group, of_members, tokenizer, tokens) for group, of_members, tokens in parts]
    return write_transcripts(folder, step, shown)


def transcript_group(
    group: TrajectoryGroup,
    advantages_G: np.ndarray | None,
    tokenizer: Tokenizer,
    token_advantages: Mapping[int, np.ndarray] | None = None,
) -> TranscriptGroup:
    """`token_advantages`: member -> advantages of its sampled tokens, where they are not its own alone."""
    shown_G = [None] * len(group.trajectories_G) if advantages_G is None else advantages_G.tolist()
    parts = (group.trajectories_G, group.get_total_rewards(), shown_G, group.final_rewards_G, group.metrics_G)
    members = [
        TranscriptMember(
            turns=_turns(trajectory, advantage, (token_advantages or {}).get(g), tokenizer),
            total_reward=reward,
            advantage=advantage,
            stop_reason=trajectory.stop_reason,
            final_reward=final_reward,
            metrics=metrics,
        )
        for g, (trajectory, reward, advantage, final_reward, metrics) in enumerate(zip(*parts, strict=True))
    ]
    members += [TranscriptMember([], float("nan"), error=f"{type(error).__name__}: {error}") for error in group.errors]
    seats = group.builder is not None and not group.builder.members_are_independent
    num_seats = max(1, len(members) // group.builder.num_games) if group.builder is not None and seats else 0
    return TranscriptGroup(members, group.tags, group.num_retries, num_seats)


def _turns(
    trajectory: Trajectory, advantage: float | None, advantages_N: np.ndarray | None, tokenizer: Tokenizer
) -> list[TranscriptTurn]:
    turns, ends = trajectory.transitions, np.cumsum([len(turn.ac.tokens) for turn in trajectory.transitions])
    of_turns = [None] * len(turns) if advantages_N is None or not turns else np.split(advantages_N, ends[:-1])
    return [
        TranscriptTurn(
            prompt_text=decode(tokenizer, new_ob),
            tokens=[token_text(tokenizer, token) for token in turn.ac.tokens],
            advantages=_advantages(turn, advantage, of_turn),
            logprobs=turn.ac.logprobs,
            reward=turn.reward,
            metrics=turn.metrics,
            logs=turn.logs,
            stop_reason=turn.ac.stop_reason,
            continues=continues,
        )
        for turn, (new_ob, continues), of_turn in zip(turns, trajectory.new_observations(), of_turns, strict=True)
    ]


def _advantages(turn: Transition, advantage: float | None, of_turn: np.ndarray | None) -> list[float] | None:
    if advantage is None:
        return None
    if of_turn is not None:
        return [float(f"{number:.7g}") for number in of_turn]  # fp32 has no more digits
    return [advantage + token_advantage for token_advantage in turn.token_advantages or [0.0] * len(turn.ac.tokens)]
