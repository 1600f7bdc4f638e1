"""Alarms: compare two computations of the same logprobs, and stop the run if they disagree by more
than rounding explains (`Alarms` lists the checks). The checks use the clients' public methods only,
so they share no code with what they check. Left out: logprobs of weight 0.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from posttrain.backend.config import AlarmAction
from posttrain.backend.errors import LogprobGapError
from posttrain.backend.model_checks import TEXT
from posttrain.backend.routing import sampling_group
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import Datum, GetInfoResponse, ModelInput, SampledSequence, SamplingParams

PROBE_SEED = 20260101  # of compared tokens, apart from the run's seeds
PROBE_SAMPLES, PROBE_TOKENS = 4, 2  # after a sync; of one token each, logprobs that are shifted would be right
# More tokens at the start than a block of vLLM's prefix cache (128 on a CPU, 16 on a GPU).
START_TOKENS = {"cpu": 192, "cuda": 1000, "mps": 192}
TAIL = 16  # the last of these are compared; the tokens before are shared


@dataclass(frozen=True)
class Limit:
    """Nats per token that rounding may explain: the mean, and the largest."""

    mean: float
    largest: float


# Measured at temperature 1: mean 5e-7 in fp32 on a CPU; 0.01 to 0.04 in bf16 on an H100 (0.5B,
# random weights), where a single unlikely token can be far off.
LIMITS = {
    ("cpu", "float32"): Limit(1e-3, 0.05),
    ("cuda", "float32"): Limit(0.01, 0.5),  # a kernel may multiply in tf32
    ("mps", "float32"): Limit(0.01, 0.5),  # not measured
}
BF16_LIMIT = Limit(0.05, float("inf"))


@dataclass(frozen=True)
class Gap:
    """|difference| of the logprobs of the same tokens, in nats."""

    mean: float
    largest: float

    @classmethod
    def between(cls, first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> "Gap":
        """Over all tokens of all sequences; 0 without tokens."""
        pairs = list(zip(first, second, strict=True))
        gap = np.concatenate([np.abs(a.astype(np.float64) - b) for a, b in pairs]) if pairs else np.zeros(0)
        return cls(float(gap.mean()), float(gap.max())) if len(gap) else cls(0.0, 0.0)


class Alarms:
    """Judges gaps, counts those above the limit, and stops the run or warns. `compare` records and
    `decide` raises, so that a step's metrics are logged before.

      | kind | compared | when | finds |
      | --- | --- | --- | --- |
      | batch | a batch, and each sequence alone | start | padding, layers that mix the sequences of a row |
      | sampler | sampler and trainer at temperature 1 | start, each sync | weights that did not arrive |
      | sampled | the same, at the run's temperature | start, each sync | temperature, stale prefix cache, shifts |
      | rollouts | on-policy rollouts and trainer (rl/) | each step | all of these, on the training data |
    """

    def __init__(self, info: GetInfoResponse, action: AlarmAction):
        self.limit = LIMITS.get((info.device.split(":")[0], info.dtype), BF16_LIMIT)
        self._action = action
        self._counts: Counter[str] = Counter()
        self._noted: list[str] = []

    def compare(self, kind: str, gap: Gap, pair: str, causes: str, temperature: float = 1.0) -> None:
        """`kind` is the name in `alarms/...`; `pair` and `causes` are for the message. Below
        `temperature` 1 logits and their rounding are multiplied by 1 / temperature."""
        more = 1 / min(temperature, 1.0)
        # NaN is not within
        if gap.mean <= more * self.limit.mean and gap.largest <= more * self.limit.largest:
            return
        self._counts[kind] += 1
        self._noted.append(
            f"{pair} differ by {gap.mean:.3g} nats per token (largest {gap.largest:.3g}; rounding explains "
            f"{more * self.limit.mean:.2g}). Likely causes: {causes}"
        )

    def metrics(self) -> dict[str, float]:
        """Count of each alarm in this process; `alarms/total` always."""
        return {"alarms/total": float(self._counts.total())} | {
            f"alarms/{kind}": float(n) for kind, n in self._counts.items()
        }

    def decide(self, when: str) -> None:
        """Raises LogprobGapError for gaps recorded since the last call, or prints it
        (backend.alarm=warn)."""
        noted, self._noted = self._noted, []
        if not noted:
            return
        message = f"{when}: {'; '.join(noted)}"
        if self._action == "stop":
            raise LogprobGapError(
                f"{message}. The last checkpoint is unchanged; backend.alarm=warn continues with a warning"
            )
        print(f"WARNING {message}", flush=True)


WEIGHTS = (
    "the sampler does not hold the trainer's weights (a sync that was skipped, or left some out), or "
    "computes this model differently (backend.engine=torch samples with transformers)"
)
SAMPLED = (
    "the sampler draws at another temperature, reads prefixes cached under older weights, or hands out logprobs of "
    "other tokens"
)
BATCHED = "layers of this architecture do not keep the sequences of a row apart, or see the padding"


async def check_at_start(
    client: TrainingClient, alarms: Alarms, sampler: SamplingClient | None = None, temperature: float = 1.0
) -> None:
    """The checks at a run's start, in about a second; LogprobGapError if one fails. Scalar models
    compare scalars, which are all 0 while the head is."""
    first, second, other = example_sequences(client)
    shared = len(first) - min(TAIL, len(first) // 4)
    data = [_scored(first, shared), _scored(second, shared), _scored(other, 1)]
    together, *alone = [await _values(client, batch) for batch in (data, *([datum] for datum in data))]
    apart = [values_T for values in alone for values_T in values]
    alarms.compare("batch", Gap.between(together, apart), "logprobs in a batch and alone", BATCHED)
    if sampler:
        gaps = await sampler_gaps(client, sampler, first, shared, temperature, 2, TAIL)
        compare_with_sampler(alarms, *gaps, temperature)
    alarms.decide("comparison at the start")


def compare_with_sampler(alarms: Alarms, whole: Gap, sampled: Gap, temperature: float) -> None:
    alarms.compare("sampler", whole, "sampler and trainer logprobs of one sequence", WEIGHTS)
    alarms.compare("sampled", sampled, "sampler and trainer logprobs of freshly sampled tokens", SAMPLED, temperature)


async def sampler_gaps(
    client: TrainingClient,
    sampler: SamplingClient,
    tokens: Sequence[int],
    cut: int,
    temperature: float,
    num_samples: int,
    max_tokens: int,
    first_alone: bool = False,
) -> tuple[Gap, Gap]:
    """Sampler against trainer, with equal weights: of `tokens` at temperature 1, and of tokens
    sampled after the first `cut`; with `first_alone`, of the first of these where that is more. Of
    several replicas each is asked.

    The engine recomputes `tokens`, as prompt logprobs are requested. Sampling then reads the prefix
    from the cache, and stale blocks show. The requests are sequential: later rollouts may read the
    first one's blocks, so it is computed alone.
    """
    params = SamplingParams(max_tokens=max_tokens, seed=PROBE_SEED, temperature=temperature, stop=[])

    async def asked(replica: int) -> tuple[list[float | None], list[SampledSequence]]:
        with sampling_group((replica,), only=replica):
            whole = await sampler.compute_logprobs_async(ModelInput.from_ints(tokens))
            answer = await sampler.sample_async(ModelInput.from_ints(tokens[:cut]), num_samples, params)
            return whole, answer.sequences

    answers_R = await asyncio.gather(*[asked(replica) for replica in range(sampler.num_replicas)])
    # replicas that drew the same share a pass
    drawn_R = [tuple(tuple(sequence.tokens) for sequence in drawn) for _, drawn in answers_R]
    distinct = list(dict.fromkeys(drawn_R))
    continued = [_scored([*tokens[:cut], *tokens_T], cut, temperature) for drawn in distinct for tokens_T in drawn]
    trained_whole, *trained = await _values(client, [_scored(tokens, 1), *continued])
    trained_of = {drawn: trained[i * num_samples :][:num_samples] for i, drawn in enumerate(distinct)}
    whole_R = [np.array(whole[1:], dtype=np.float64) for whole, _ in answers_R]
    sampled = [np.array(sequence.logprobs) for _, drawn in answers_R for sequence in drawn]
    scored = [values for drawn in drawn_R for values in trained_of[drawn]]
    gaps = [
        Gap.between([values[:end] for values in sampled], [values[:end] for values in scored])
        for end in ([None, 1] if first_alone else [None])
    ]
    return Gap.between(whole_R, [trained_whole] * len(whole_R)), max(gaps, key=lambda gap: gap.mean)


def least_certain(datum: Datum) -> int:
    """Number of tokens before a rollout's least likely token, where a wrong temperature shows most."""
    mask_T, logprobs_T = (datum.loss_fn_inputs[key].array for key in ("mask", "logprobs"))
    return int(np.where(mask_T > 0, logprobs_T, np.inf).argmin()) + 1


def example_sequences(client: TrainingClient) -> tuple[list[int], list[int], list[int]]:
    """Two sequences of equal length with different tails, and a shorter sequence of its own."""
    info, tokenizer = client.get_info(), client.get_tokenizer()
    length = min(START_TOKENS[info.device.split(":")[0]], info.max_length - 1)
    text = tokenizer.encode(TEXT, add_special_tokens=False, verbose=False)  # it may be longer than a context
    tokens = (text * (2 * length // len(text) + 1))[: 2 * length]
    tail = min(TAIL, length // 4)
    shared = tokens[: length - tail]
    return tokens[:length], shared + tokens[length : length + tail][::-1], tokens[length : length + length // 3 + 2]


def _scored(tokens: Sequence[int], first: int, temperature: float = 1.0) -> Datum:
    """Logprobs are requested from token number `first` on."""
    weights_T = (np.arange(1, len(tokens)) >= first).astype(np.float32)
    temperature_T = np.full(len(weights_T), temperature, dtype=np.float32)
    inputs = {"target_tokens": np.array(tokens[1:]), "weights": weights_T, "temperature": temperature_T}
    return Datum(ModelInput.from_ints(tokens[:-1]), inputs)


async def _values(client: TrainingClient, data_D: Sequence[Datum]) -> list[np.ndarray]:
    """Requested logprobs, or scalars."""
    outputs = (await client.forward(data_D, _negative)).loss_fn_outputs
    mask_D: Iterable[np.ndarray] = (datum.loss_fn_inputs["weights"].array > 0 for datum in data_D)
    return [next(iter(out.values())).array[mask_T] for out, mask_T in zip(outputs, mask_D, strict=True)]


def _negative(values_N: torch.Tensor, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss that is NaN where a value is: the trainer raises NonFiniteError and names the data."""
    return -values_N, {}
