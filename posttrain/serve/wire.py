"""The messages of the Tinker protocol that are protobuf: requests of forward_backward, results of
forward, forward_backward and sample. The schema is a table, as only field numbers and types are on
the wire. Arrays are little-endian. Left out: provenance spans (ignored), images and audio (refused).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from posttrain.backend.errors import DataError
from posttrain.backend.types import Datum, ForwardBackwardOutput, ModelInput, SampleResponse, TensorData

# message: number type name; "*" is repeated, "map<V>" a map from strings to V
SCHEMA = """
ForwardBackwardRequest: 1 string model_id, 2 int32 seq_id, 3 *Datum data, 4 string loss_fn,
    5 map<double> loss_fn_config, 6 bool forward_only, 7 map<ConfigValue> loss_fn_config_v2
ConfigValue: 1 double number, 2 string text
Datum: 1 *Chunk model_input, 2 map<Tensor> loss_fn_inputs
Chunk: 1 EncodedText encoded_text, 2 bytes image, 3 bytes dmel
EncodedText: 1 bytes tokens
Tensor: 1 bytes dense, 2 SparseCsr sparse_csr, 3 int32 dtype, 4 *int64 shape
SparseCsr: 1 bytes values, 2 bytes crow_indices, 3 bytes col_indices
ForwardBackwardOutput: 1 string loss_fn_output_type, 2 *ArrayRecord loss_fn_outputs, 3 map<double> metrics
ArrayRecord: 1 string type_tag, 2 map<BatchedTensor> fields, 3 int64 num_datums
BatchedTensor: 1 bytes data, 2 bytes offsets, 3 int32 dtype, 4 *int64 trailing_shape
SampleResponse: 1 *SampledSequence sequences, 2 bytes prompt_logprobs, 3 TopkLogprobs topk_prompt_logprobs,
    4 int32 prompt_cache_hit_tokens, 5 Tensor target_prompt_logprobs, 6 PromptAltTokens prompt_alt_tokens
PromptAltTokens: 1 Tensor tokens, 2 Tensor logprobs
SampledSequence: 1 int32 stop_reason, 2 bytes tokens, 3 bytes logprobs, 4 TopkLogprobs topk_sampled_logprobs
TopkLogprobs: 1 bytes token_ids, 2 bytes logprobs, 3 int32 k, 4 int32 length
"""
PACKAGE = "posttrain_serve"  # the SDK's own descriptors may be in the same process
SCALARS: dict[str, Any] = {"double": 1, "int64": 3, "int32": 5, "bool": 8, "string": 9, "bytes": 12}
MESSAGE: Any = 11
REPEATED: Any = 3
OPTIONAL: Any = 1
DTYPES = {1: np.dtype("<f4"), 2: np.dtype("<i8"), 3: np.dtype("<i4"), 4: np.dtype("<u2")}
FLOAT32, INT64, BFLOAT16 = 1, 2, 4
METRIC_SUFFIXES = ("sum", "mean", "min", "max", "slack", "hash2", "unique")
NO_TOKEN, NO_LOGPROB = 0, -99999.0


def _messages() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name=f"{PACKAGE}.proto", package=PACKAGE, syntax="proto3")
    for line in SCHEMA.replace(",\n   ", ",").strip().splitlines():
        name, fields = line.split(":")
        message = file.message_type.add(name=name)
        for number, kind, field in (entry.split() for entry in fields.split(",")):
            added = message.field.add(name=field, number=int(number), label=OPTIONAL)
            if kind.startswith("map<"):
                entry = message.nested_type.add(name=f"{''.join(map(str.capitalize, field.split('_')))}Entry")
                entry.options.map_entry = True
                _set_type(entry.field.add(name="key", number=1, label=OPTIONAL), "string")
                _set_type(entry.field.add(name="value", number=2, label=OPTIONAL), kind[4:-1])
                added.label, kind = REPEATED, f"{name}.{entry.name}"
            elif kind.startswith("*"):
                added.label, kind = REPEATED, kind[1:]
            _set_type(added, kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        message.name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{message.name}"))
        for message in file.message_type
    }


def _set_type(field: Any, kind: str) -> None:
    if kind in SCALARS:
        field.type = SCALARS[kind]
    else:
        field.type, field.type_name = MESSAGE, f".{PACKAGE}.{kind}"


MESSAGES = _messages()


# --- requests ------------------------------------------------------------------------------------


@dataclass
class PassRequest:
    """forward or forward_backward. `fault`: why its data cannot be used."""

    model_id: str
    seq_id: int
    data_D: list[Datum]
    loss_fn: str
    loss_fn_config: dict[str, float | str]
    forward_only: bool
    fault: DataError | None = None


def read_pass_request(body: bytes) -> PassRequest:
    """ValueError if the bytes are no such message; data that cannot be used are a `fault`."""
    message = MESSAGES["ForwardBackwardRequest"]()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise ValueError(f"the body is not a ForwardBackwardRequest: {error}") from error
    config: dict[str, float | str] = dict(message.loss_fn_config)
    config |= {key: value.text or value.number for key, value in message.loss_fn_config_v2.items()}
    request = PassRequest(message.model_id, message.seq_id, [], message.loss_fn, config, message.forward_only)
    try:
        request.data_D = [_read_datum(d, datum) for d, datum in enumerate(message.data)]
    except DataError as error:
        request.fault = error
    return request


def _read_datum(d: int, message: Any) -> Datum:
    tokens: list[int] = []
    for chunk in message.model_input:
        if chunk.image or chunk.dmel:
            raise DataError(f"datum {d} has an image or audio chunk: this server trains on text only")
        tokens += _array(chunk.encoded_text.tokens, np.dtype("<i4"), f"datum {d}: the tokens").tolist()
    inputs = {key: _read_tensor(tensor, f"datum {d}: {key}") for key, tensor in message.loss_fn_inputs.items()}
    return Datum(ModelInput.from_ints(tokens), inputs)


def _array(data: bytes, dtype: np.dtype, name: str) -> np.ndarray:
    if len(data) % dtype.itemsize:
        raise DataError(f"{name} has {len(data)} bytes, no multiple of {dtype.itemsize}")
    return np.frombuffer(data, dtype)


def _read_tensor(message: Any, name: str) -> TensorData:
    if (dtype := DTYPES.get(message.dtype)) is None:
        raise DataError(f"{name} has the unknown dtype {message.dtype}")
    shape = tuple(message.shape)
    sparse = message.HasField("sparse_csr")
    flat = _array(message.sparse_csr.values if sparse else message.dense, dtype, name)
    if message.dtype == BFLOAT16:
        flat = (flat.astype("<u4") << 16).view("<f4")
    array = flat
    if sparse:
        crow = _array(message.sparse_csr.crow_indices, np.dtype("<i8"), name)
        columns = _array(message.sparse_csr.col_indices, np.dtype("<i8"), name)
        array = _dense(flat, crow, columns, shape, name)
    if not sparse and shape:
        if min(shape) < 0 or np.prod(shape, dtype=object) != len(flat):
            raise DataError(f"{name} has {len(flat)} values, its shape is {list(shape)}")
        array = flat.reshape(shape)
    return TensorData(array, "int64" if array.dtype.kind == "i" else "float32")


def _dense(
    values: np.ndarray, crow: np.ndarray, columns: np.ndarray, shape: tuple[int, ...], name: str, fill: int = 0
) -> np.ndarray:
    """(N, K) of a compressed sparse row tensor: `fill` where it has no value."""
    counts = np.diff(crow)
    if len(shape) != 2 or not 0 <= max(shape) <= 2**24 or shape[0] * shape[1] > 2**26:
        raise DataError(f"{name} is sparse with shape {list(shape)}: (N, K) is needed, of at most 2^26 entries")
    if not (len(crow) == shape[0] + 1 and crow[0] == 0 and crow[-1] == len(values) == len(columns)):
        raise DataError(f"{name} is sparse, and its row pointers do not fit its {len(values)} values")
    if counts.min(initial=0) < 0 or columns.min(initial=0) < 0 or columns.max(initial=0) >= shape[1]:
        raise DataError(f"{name} is sparse, and its indices are outside its shape {list(shape)}")
    dense = np.full(shape, fill, values.dtype)
    dense[np.repeat(np.arange(shape[0]), counts), columns] = values
    return dense


@dataclass(frozen=True)
class Targets:
    """target_prompt_logprobs: dense, and the places that were named where it came sparse."""

    tensor: TensorData
    sparse: tuple[np.ndarray, np.ndarray] | None  # row pointers, columns


def read_targets(fields: Mapping[str, Any]) -> Targets:
    """From the JSON of a tensor. DataError if it cannot be read."""
    name = "target_prompt_logprobs"
    try:
        # no float loses its fraction
        values = np.array(fields["data"] or np.empty(0, np.int64)).astype(np.int64, casting="same_kind")
        shape = tuple(map(int, fields.get("shape") or values.shape))
        if fields.get("sparse_crow_indices") is None:
            return Targets(TensorData(values, "int64", shape), None)
        crow, columns = (np.array(fields[f"sparse_{key}_indices"], np.int64) for key in ("crow", "col"))
        dense = _dense(values, crow, columns, shape, name, fill=-1)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{name} is not a tensor of whole numbers: {error}") from error
    return Targets(TensorData(dense, "int64"), (crow, columns))


# --- results -------------------------------------------------------------------------------------


def metrics_for_client(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics the SDK can merge over chunks: finite, and named "name:reduction"."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if name.count(":") == 1 and name.rsplit(":")[-1] in METRIC_SUFFIXES and np.isfinite(value)
    }


def write_pass_output(output: ForwardBackwardOutput) -> bytes:
    message = MESSAGES["ForwardBackwardOutput"](loss_fn_output_type=output.loss_fn_output_type)
    message.metrics.update(metrics_for_client(output.metrics))
    # a record is rectangular: data of another number of targets begin a new one
    for _, group in groupby(output.loss_fn_outputs, lambda fields: [array.shape[1:] for array in fields.values()]):
        fields_D = list(group)
        record = message.loss_fn_outputs.add(type_tag=output.loss_fn_output_type, num_datums=len(fields_D))
        for name, first in fields_D[0].items():
            arrays_D = [fields[name].array.astype("<f4", copy=False) for fields in fields_D]
            batched = record.fields[name]
            batched.data = b"".join(array.tobytes() for array in arrays_D)
            batched.offsets = np.cumsum([0, *(array.nbytes for array in arrays_D)], dtype="<i8").tobytes()
            batched.dtype = FLOAT32
            batched.trailing_shape.extend(first.shape[1:])
    return message.SerializeToString()


def write_sample_response(
    response: SampleResponse,
    last_n: int | None = None,
    topk_prompt: int = 0,
    topk_sample: int = 0,
    targets: Targets | None = None,
) -> bytes:
    """With `last_n`, the prompt's earlier logprobs are NaN, which means None. `topk_prompt` and
    `topk_sample`: entries per position that were asked for; the sampler adds the token itself.
    `targets`: in which form their logprobs were asked for."""
    message = MESSAGES["SampleResponse"]()
    for sequence in response.sequences:
        added = message.sequences.add(
            stop_reason=int(sequence.stop_reason == "length"),
            tokens=np.asarray(sequence.tokens, "<i4").tobytes(),
            logprobs=np.asarray(sequence.logprobs, "<f4").tobytes(),
        )
        if sequence.topk_logprobs is not None and topk_sample:
            _write_topk(added.topk_sampled_logprobs, sequence.topk_logprobs, topk_sample)
    if response.prompt_logprobs is not None:
        logprobs_T = np.array(response.prompt_logprobs, "<f4")
        if last_n is not None:
            logprobs_T[: max(0, len(logprobs_T) - last_n)] = np.nan
        message.prompt_logprobs = logprobs_T.tobytes()
    if response.topk_prompt_logprobs is not None and topk_prompt:
        _write_topk(message.topk_prompt_logprobs, response.topk_prompt_logprobs, topk_prompt)
    if response.target_prompt_logprobs is not None:
        _write_tensor(message.target_prompt_logprobs, response.target_prompt_logprobs, targets and targets.sparse)
    if response.prompt_alt_tokens is not None:
        _write_tensor(message.prompt_alt_tokens.tokens, response.prompt_alt_tokens.tokens)
        _write_tensor(message.prompt_alt_tokens.logprobs, response.prompt_alt_tokens.logprobs)
    return message.SerializeToString()


def _write_tensor(message: Any, tensor: TensorData, sparse: tuple[np.ndarray, np.ndarray] | None = None) -> None:
    is_float = tensor.dtype == "float32"
    message.dtype = FLOAT32 if is_float else INT64
    message.shape.extend(tensor.shape)
    array = tensor.array.astype("<f4" if is_float else "<i8", copy=False)
    if sparse is None:
        message.dense = array.tobytes()
        return
    crow, columns = sparse
    rows = np.repeat(np.arange(len(crow) - 1), np.diff(crow))
    message.sparse_csr.values = array[rows, columns].tobytes()
    message.sparse_csr.crow_indices = crow.astype("<i8", copy=False).tobytes()
    message.sparse_csr.col_indices = columns.astype("<i8", copy=False).tobytes()


def _write_topk(message: Any, rows: Sequence[Sequence[tuple[int, float]] | None], k: int) -> None:
    tokens_TK = np.full((len(rows), k), NO_TOKEN, "<i4")
    logprobs_TK = np.full((len(rows), k), NO_LOGPROB, "<f4")
    for t, row in enumerate(rows):
        best = sorted(row or (), key=lambda entry: -entry[1])[:k]
        for i, (token, logprob) in enumerate(best):
            tokens_TK[t, i], logprobs_TK[t, i] = token, logprob
    message.token_ids, message.logprobs = tokens_TK.tobytes(), logprobs_TK.tobytes()
    message.k, message.length = k, len(rows)
