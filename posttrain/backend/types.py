"""The data types of the backend's API, named and shaped as in the Tinker SDK. Tokens and numbers
only (specs: tinker_semantics 3.2). Left out: images, sparse tensors.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import numpy as np

from posttrain.backend import tensor_data as tensor_data
from posttrain.backend.errors import DataError
from posttrain.backend.ranges import (
    COUNT,
    DECAY,
    LARGEST_COUNT,
    LEARNING_RATE,
    NON_NEGATIVE,
    POSITIVE,
    POSITIVE_SHARE,
    SEED,
    TEMPERATURE,
    Range,
    RangeError,
    check_ranges,
)
from posttrain.backend.tensor_data import TensorData as TensorData
from posttrain.backend.tensor_data import TensorDtype as TensorDtype

StopReason = Literal["stop", "length"]
SAMPLING_SEED = Range(0, 2**63, whole=True)
TOP_K = Range(-1, LARGEST_COUNT, whole=True)
KeptRow = tuple[int, int]  # number of a kept forward pass, and of a Datum in it
LossFnType = Literal["cross_entropy", "importance_sampling", "ppo", "gspo", "cispo", "dro", "reinforce"]


_IDS: dict[int, int] = {}  # every id that `ModelInput.kept` has met


@dataclass(frozen=True)
class EncodedTextChunk:
    tokens: Sequence[int]
    type: Literal["encoded_text"] = "encoded_text"

    @property
    def length(self) -> int:
        return len(self.tokens)


class ImageChunk:
    """For the imports and `isinstance` of scripts written for the Tinker SDK: there is none here."""

    def __init__(self, *args: Any, **kwargs: Any):
        raise DataError("models are trained and sampled on text only here, not on images: leave the image out")


class ImageAssetPointerChunk(ImageChunk):
    """As `ImageChunk`."""


ModelInputChunk = EncodedTextChunk  # the only kind: no images, no audio


@dataclass(frozen=True)
class ModelInput:
    """A token sequence in chunks. Immutable: `append` and `append_int` return a copy."""

    chunks: list[EncodedTextChunk] = field(default_factory=list)

    @classmethod
    def from_ints(cls, tokens: Sequence[int]) -> "ModelInput":
        return cls([EncodedTextChunk(list(tokens))])

    @classmethod
    def kept(cls, tokens: Sequence[int]) -> "ModelInput":
        """As `from_ints`, for tokens in great number that are kept: 8 bytes each, not 36. Equal ids
        are one object for all."""
        ids = [*map(int, tokens)]
        return cls([EncodedTextChunk([*map(_IDS.setdefault, ids, ids)])])

    @classmethod
    def empty(cls) -> "ModelInput":
        return cls([])

    def to_ints(self) -> list[int]:
        return [*chain.from_iterable(chunk.tokens for chunk in self.chunks)]

    @property
    def length(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    def append(self, chunk: EncodedTextChunk) -> "ModelInput":
        return ModelInput([*self.chunks, chunk])

    def append_int(self, token: int) -> "ModelInput":
        return self.append(EncodedTextChunk([token]))


@dataclass(init=False)
class Datum:
    """One training sequence. `loss_fn_inputs` hold an entry per token of `model_input` (names:
    losses.py), as TensorData, torch tensors, numpy arrays or lists."""

    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData]

    def __init__(self, model_input: ModelInput, loss_fn_inputs: Mapping[str, Any]):
        self.model_input = model_input
        self.loss_fn_inputs = {key: _as_tensor_data(value) for key, value in loss_fn_inputs.items()}


def _as_tensor_data(value: Any) -> TensorData:
    if isinstance(value, TensorData):
        return value
    # torch is not imported to know its tensors
    return TensorData.from_torch(value) if hasattr(value, "detach") else TensorData(value)


@dataclass(frozen=True)
class SamplingParams:
    """`stop`: None stops at EOS; strings or token ids stop there and at EOS; [] never stops.
    `top_k` -1 or 0 means all tokens. `temperature` 0 takes the most likely token, with its logprob at
    temperature 1 among all tokens. Of `seed` torch's generators on a CPU read the 32 low bits.
    RangeError for numbers out of range, and for other stops."""

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | Sequence[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_ranges(
            self, max_tokens=COUNT, seed=SAMPLING_SEED, temperature=TEMPERATURE, top_k=TOP_K, top_p=POSITIVE_SHARE
        )
        stops = [self.stop] if isinstance(self.stop, str) else [] if self.stop is None else self.stop
        # what an engine cannot read would end it, for all its clients
        if not isinstance(stops, Collection) or not all(map(_is_stop, stops)):
            raise RangeError("stop", self.stop, "a text, or a list of texts or token ids (int), and no text empty")


def _is_stop(stop: object) -> bool:
    return isinstance(stop, str | int) and stop != "" and not isinstance(stop, bool)


@dataclass(frozen=True)
class AdamParams:
    """AdamW with Tinker's defaults. `grad_clip_norm` 0 is no clipping. RangeError for bad numbers."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def __post_init__(self) -> None:
        check_ranges(self, learning_rate=LEARNING_RATE, beta1=DECAY, beta2=DECAY, eps=POSITIVE)
        check_ranges(self, weight_decay=NON_NEGATIVE, grad_clip_norm=NON_NEGATIVE)


@dataclass(frozen=True)
class LoraConfig:
    """Updates are scaled by alpha / rank; `alpha` None is 32, as in Tinker. RangeError: rank < 1."""

    rank: int = 32
    seed: int | None = None
    alpha: float | None = None
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, rank=COUNT, seed=SEED, alpha=POSITIVE)
        for name in ("train_mlp", "train_attn", "train_unembed"):
            if not isinstance(value := getattr(self, name), bool):
                raise RangeError(name, value, "True or False")


@dataclass(frozen=True)
class SampledSequence:
    """Sampled tokens, the stop included, with logprobs under the (tempered, truncated) sampling
    distribution."""

    tokens: list[int]
    logprobs: list[float]
    stop_reason: StopReason
    topk_logprobs: list[list[tuple[int, float]]] | None = None
    """Of each token, the (token, logprob) that were most likely there, best first; fewer where top_k
    or top_p left fewer."""

    @property
    def tokens_np(self) -> np.ndarray:
        """(T,) int32"""
        return np.array(self.tokens, dtype=np.int32)

    @property
    def logprobs_np(self) -> np.ndarray:
        """(T,) float32"""
        return np.array(self.logprobs, dtype=np.float32)


@dataclass(frozen=True)
class PromptAltTokens:
    """Tokens drawn at each position of a prompt but the first, int64 (T, k), and their logprobs,
    float32 (T, k), under the tempered distribution."""

    tokens: TensorData
    logprobs: TensorData


@dataclass(frozen=True)
class SampleResponse:
    """`prompt_logprobs[t]` is log p(token t | tokens before t) at temperature 1; element 0 is None.
    `target_prompt_logprobs` is float32 of the shape that was asked for, 0.0 at -1."""

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens: PromptAltTokens | None = None

    @property
    def prompt_logprobs_np(self) -> np.ndarray | None:
        """(T,) float32, NaN where there is no logprob"""
        return None if self.prompt_logprobs is None else np.array(self.prompt_logprobs, dtype=np.float32)


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """`loss_fn_outputs[d]["logprobs"]` has an entry per token of datum d, at weight and mask 0 too."""

    loss_fn_outputs: list[dict[str, TensorData]]
    metrics: dict[str, float]
    loss_fn_output_type: str = "ArrayRecord"
    kept_D: list[KeptRow] | None = None  # of forward_terms(keep=True): the rows that a LossTerm may name


@dataclass(frozen=True)
class OptimStepResponse:
    metrics: dict[str, float]


@dataclass(frozen=True)
class SaveWeightsResponse:
    path: str


@dataclass(frozen=True)
class LoadWeightsResponse:
    path: str


@dataclass(frozen=True)
class ModelData:
    model_name: str


@dataclass(frozen=True)
class GetInfoResponse:
    """`lora_rank` 0 means all weights are trained."""

    model_name: str
    lora_rank: int
    num_parameters: int
    num_trainable_parameters: int
    max_length: int
    device: str
    dtype: str

    @property
    def is_lora(self) -> bool:
        return self.lora_rank > 0

    @property
    def model_id(self) -> str:
        return self.model_name

    @property
    def model_data(self) -> ModelData:
        return ModelData(self.model_name)


@dataclass(frozen=True)
class SupportedModel:
    model_name: str
    max_context_length: int | None = None
    trainable: bool = True
    sampleable: bool = True


@dataclass(frozen=True)
class GetServerCapabilitiesResponse:
    """`supported_models` are the presets; any hub model or local folder works, too."""

    supported_models: list[SupportedModel]
    device: str
    vllm: bool


# --- further names of the Tinker SDK, for annotations --------------------------------------------

OptimParams = AdamParams
SaveWeightsForSamplerResponse = SaveWeightsResponse
LossFnInputs = LossFnOutput = dict[str, TensorData]
ModelID = str
