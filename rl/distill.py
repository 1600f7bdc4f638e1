"""On-policy distillation (Agarwal et al. 2023, Gu et al. 2023): the policy samples, a teacher scores
its tokens. With `context` the teacher reads more than the policy: prompt distillation,
self-distillation. Left out: the KL over the whole vocabulary, of which the mean of d is an estimate.

  A_t += coef * (mean of d - d_t), or minus the discounted future sum of d    d = log policy - log teacher
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import chz
import numpy as np

from posttrain.backend.errors import ConfigError, ContextLengthError
from posttrain.backend.ranges import NON_NEGATIVE, SHARE
from posttrain.backend.tokenizers import check_vocabulary
from posttrain.backend.types import ModelInput
from posttrain.renderers.types import Tokenizer
from rl import step_checks
from rl.data_processing import Row
from rl.kl import Reference, mean_difference, other_model
from rl.types import EnvGroupBuilder, Metrics, TrajectoryGroup

if TYPE_CHECKING:  # commands answer before torch is imported
    from posttrain.backend.service_client import ServiceClient
    from posttrain.backend.training_client import TrainingClient

POLICY = "policy"


@chz.chz
class Distillation:
    teacher: str | None = chz.field(
        default=None,
        doc="the teacher: a checkpoint or a model with the policy's vocabulary; several with commas (their logprobs are "
        f"averaged), or {POLICY}: the trained policy itself; None = none",
    )
    teachers: dict[str, str] | None = chz.field(
        default=None,
        doc="teachers of single data sets, by tag: distill.teachers.gsm8k=PATH; distill.teacher is for all others",
    )
    coef: float = chz.field(default=1.0, validator=NON_NEGATIVE, doc="weight of the reverse KL in the advantage")
    discount: float = chz.field(
        default=0.0, validator=SHARE, doc="discount per token of the KL of later tokens of the rollout; 0 = own KL only"
    )
    centre: bool = chz.field(
        default=True,
        doc="subtract the mean KL of the minibatch: same expected gradient, less noise; not with a discount",
    )
    context: str | None = chz.field(
        default=None,
        doc="a system message that only the teacher reads; {question}, {solution} and {gold} are the problem's",
    )

    def paths(self) -> dict[str, list[str]]:
        """Tag -> teachers; "" for data without a tag of their own."""
        named = ({"": self.teacher} if self.teacher else {}) | (self.teachers or {})
        return {tag: [path.strip() for path in paths.split(",")] for tag, paths in named.items()}

    def check(self, tokenizer: Tokenizer) -> None:
        """ConfigError for a teacher with another vocabulary, before any model is loaded."""
        for tag, paths in self.paths().items():
            option = f"distill.teachers.{tag}" if tag else "distill.teacher"
            for path in paths:
                if path != POLICY:
                    check_vocabulary(f"{option}={path}", path, tokenizer)
                elif not self.context:
                    raise ConfigError(
                        f"{option}={POLICY} needs distill.context: without it the teacher is the policy itself"
                    )

    def check_groups(self, builders_P: Sequence[EnvGroupBuilder]) -> None:
        """ConfigError for groups without a teacher or without a prompt for it, before any model is loaded;
        DataError for a problem that lacks what `context` asks for. Without either option, nothing is looked at."""
        for builder in builders_P if self.context or self.teachers else ():
            self.tag_of(step_checks.tags(builder, builder.logging_tags()))
            if self.context:
                _teacher_prompt(builder, self.context)

    def tag_of(self, tags: Sequence[str]) -> str:
        """Of the group's tags the first with a teacher, "" for that of all others."""
        known = self.paths()
        for tag in (*tags, ""):
            if tag in known:
                return tag
        raise ConfigError(
            f"no teacher for a group with the tags {[*tags]}: distill.teachers has {', '.join(known)}; "
            "set distill.teacher for all others"
        )


@runtime_checkable
class HasTeacherPrompt(Protocol):
    """The interface of a group's builder that `context` needs."""

    def teacher_prompt(self, context: str) -> ModelInput:
        """The first observation as the teacher reads it."""
        ...


@dataclass
class Teachers:
    """The opened teachers. Equal paths are opened once."""

    config: Distillation
    service: "ServiceClient"
    policy: "TrainingClient"
    opened: dict[str, Reference] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in {path: None for paths in self.config.paths().values() for path in paths}:
            is_policy = path == POLICY
            client = self.policy if is_policy else other_model(self.service, path, self.policy, "distill.teacher")
            self.opened[path] = Reference(client)

    async def difference(
        self, groups_P: Sequence[TrajectoryGroup], rows: Sequence[Row]
    ) -> tuple[list[np.ndarray], Metrics]:
        """d, (T,) per row, 0 outside the mask; and its mean per sampled token, of all and by tag."""
        places: dict[str, list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            places[self.config.tag_of(groups_P[row.origin[0]].tags)].append(i)
        read = teacher_rows(groups_P, rows, self.config.context) if self.config.context else list(rows)
        if self.config.context:
            _check_room(rows, read, self.policy.get_info().max_length)
        difference_D = [np.zeros_like(row.logprobs_T) for row in rows]
        for tag, chosen in places.items():
            paths = self.config.paths()[tag]
            for path in paths:
                logprobs_D = await self.opened[path].logprobs([read[i].datum() for i in chosen])
                for i, teacher_T in zip(chosen, logprobs_D, strict=True):
                    difference_D[i] += _difference(rows[i], read[i], teacher_T) / len(paths)
        metrics: Metrics = {"teacher_kl": mean_difference(rows, difference_D)}
        if self.config.teachers:
            by_tag = {tag: ([rows[i] for i in at], [difference_D[i] for i in at]) for tag, at in places.items()}
            metrics |= {f"teacher_kl/{tag or 'rest'}": mean_difference(*part) for tag, part in by_tag.items()}
        return difference_D, metrics


def teacher_rows(groups_P: Sequence[TrajectoryGroup], rows: Sequence[Row], context: str) -> list[Row]:
    """The rows with the teacher's prompt in place of the policy's."""
    if len({row.origin for row in rows}) < len(rows):
        raise ConfigError("distill.context: a rollout has several token sequences, and only the first has the prompt")
    prompts = {p: _teacher_prompt(groups_P[p].builder, context) for p in {row.origin[0] for row in rows}}
    out = []
    for row in rows:
        p, g = row.origin
        length = groups_P[p].trajectories_G[g].transitions[0].ob.length
        out.append(_with_prompt(row, length, prompts[p]))
    return out


def _check_room(rows: Sequence[Row], read: Sequence[Row], context: int) -> None:
    """ContextLengthError for a row that the policy could write and the teacher, whose prompt is longer, cannot read."""
    longest = max(len(row.tokens) for row in read) - 1  # of a row the last token is only predicted
    if longest > context:
        more = max(len(theirs.tokens) - len(row.tokens) for row, theirs in zip(rows, read, strict=True))
        raise ContextLengthError(
            f"distill.context: the teacher would read {longest} tokens, {more} more than the policy, and its context "
            f"has {context}: lower max_tokens, so that answers leave it room, or raise backend.max_length"
        )


def _teacher_prompt(builder: object, context: str) -> list[int]:
    if not isinstance(builder, HasTeacherPrompt):
        raise ConfigError(f"distill.context: {type(builder).__name__} has no teacher_prompt(context)")
    return builder.teacher_prompt(context).to_ints()


def _with_prompt(row: Row, length: int, prompt: list[int]) -> Row:
    """`prompt` in place of the first `length` tokens. Tracks are shifted: position t predicts t + 1."""

    def moved(track_T: np.ndarray, filler: float) -> np.ndarray:
        return np.concatenate([np.full(len(prompt) - 1, filler, np.float32), track_T[length - 1 :]])

    return replace(
        row,
        tokens=prompt + row.tokens[length:],
        logprobs_T=moved(row.logprobs_T, 0.0),
        advantages_T=moved(row.advantages_T, 0.0),
        mask_T=moved(row.mask_T, 0.0),
        temperature_T=None if row.temperature_T is None else moved(row.temperature_T, 1.0),
    )


def _difference(row: Row, read: Row, teacher_T: np.ndarray) -> np.ndarray:
    """The sampled tokens are the same and in the same order, wherever they stand in `read`."""
    d_T = np.zeros_like(row.logprobs_T)
    d_T[row.mask_T > 0] = row.logprobs_T[row.mask_T > 0] - teacher_T[read.mask_T > 0]
    return d_T
