"""The codec of the Tinker protocol's messages."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from posttrain.backend.errors import DataError
from posttrain.backend.types import ForwardBackwardOutput, SampledSequence, SampleResponse, TensorData
from posttrain.serve import wire
from tests.tinker_messages import TOKENS, datum, pass_body


def test_a_request_is_read_as_it_was_written() -> None:
    request = wire.read_pass_request(pass_body("m", 3, [datum(0.5)], forward_only=True))
    assert (request.model_id, request.seq_id, request.forward_only, request.fault) == ("m", 3, True, None)
    assert request.data_D[0].model_input.to_ints() == TOKENS[:-1]
    assert request.data_D[0].loss_fn_inputs["target_tokens"] == TensorData(TOKENS[1:])
    assert request.data_D[0].loss_fn_inputs["weights"] == TensorData([0.5] * 5)


def test_numbers_and_texts_of_a_loss_config() -> None:
    message = wire.MESSAGES["ForwardBackwardRequest"](model_id="m", seq_id=1)
    message.loss_fn_config["beta"] = 1.0
    message.loss_fn_config_v2["beta"].number = 2.0
    message.loss_fn_config_v2["kind"].text = "token"
    assert wire.read_pass_request(message.SerializeToString()).loss_fn_config == {"beta": 2.0, "kind": "token"}


def test_sparse_targets_become_dense() -> None:
    message = wire.MESSAGES["ForwardBackwardRequest"](model_id="m", seq_id=1)
    tensor = message.data.add().loss_fn_inputs["weights"]
    dense_NK = np.array([[0.0, 0.5, 0.25], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], "<f4")
    tensor.dtype = wire.FLOAT32
    tensor.shape.extend([3, 3])
    tensor.sparse_csr.values = np.array([0.5, 0.25, 1.0], "<f4").tobytes()
    tensor.sparse_csr.crow_indices = np.array([0, 2, 2, 3], "<i8").tobytes()
    tensor.sparse_csr.col_indices = np.array([1, 2, 0], "<i8").tobytes()
    read = wire.read_pass_request(message.SerializeToString())
    assert np.array_equal(read.data_D[0].loss_fn_inputs["weights"].array, dense_NK)
    tensor.sparse_csr.col_indices = np.array([1, 3, 0], "<i8").tobytes()
    assert "outside its shape" in str(wire.read_pass_request(message.SerializeToString()).fault)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda m: setattr(m.data[0].loss_fn_inputs["weights"], "dtype", 9), "unknown dtype 9"),
        (lambda m: m.data[0].loss_fn_inputs["weights"].shape.append(3), "its shape is [5, 3]"),
        (lambda m: setattr(m.data[0].loss_fn_inputs["weights"], "dense", b"123"), "3 bytes"),
        (lambda m: setattr(m.data[0].model_input.add(), "image", b"png"), "image or audio"),
    ],
)
def test_what_cannot_be_read_is_a_fault_of_the_datum(spoil: Callable[[Any], object], text: str) -> None:
    message = wire.MESSAGES["ForwardBackwardRequest"].FromString(pass_body("m", 1, [datum()]))
    spoil(message)
    fault = wire.read_pass_request(message.SerializeToString()).fault
    assert isinstance(fault, DataError) and text in str(fault) and "datum 0" in str(fault)


def test_bytes_that_are_no_message_are_refused() -> None:
    with pytest.raises(ValueError, match="not a ForwardBackwardRequest"):
        wire.read_pass_request(b"\xff\xff\xff")


def test_outputs_of_different_widths_go_into_records_of_their_own() -> None:
    arrays = [np.arange(3.0), np.arange(2.0), np.arange(6.0).reshape(3, 2)]
    output = ForwardBackwardOutput(
        [{"logprobs": TensorData(array)} for array in arrays],
        {"loss:sum": 2.0, "loss": 1.0, "a:b:sum": 1.0, "x:odd": 1.0, "nan:mean": float("nan")},
    )
    message = wire.MESSAGES["ForwardBackwardOutput"].FromString(wire.write_pass_output(output))
    assert dict(message.metrics) == {"loss:sum": 2.0}  # Trap: the SDK fails on, or drops, all others
    records = [(record.num_datums, [*record.fields["logprobs"].trailing_shape]) for record in message.loss_fn_outputs]
    assert records == [(2, []), (1, [2])]
    first = message.loss_fn_outputs[0].fields["logprobs"]
    assert np.frombuffer(first.offsets, "<i8").tolist() == [0, 12, 20]  # bytes
    assert np.frombuffer(first.data, "<f4").tolist() == [0, 1, 2, 0, 1]


def test_prompt_logprobs_before_the_last_n_are_absent() -> None:
    response = SampleResponse(
        [SampledSequence([7, 8], [-0.5, -1.0], "length"), SampledSequence([1], [-2.0], "stop")],
        [None, -1.0, -2.0, -3.0],
        [None, [(6, -2.0), (5, -1.0), (7, -3.0)], [(5, -1.0)], [(9, -3.0)]],
    )
    message = wire.MESSAGES["SampleResponse"].FromString(wire.write_sample_response(response, 2, 2))
    assert [sequence.stop_reason for sequence in message.sequences] == [1, 0]
    assert np.frombuffer(message.sequences[0].tokens, "<i4").tolist() == [7, 8]
    assert np.isnan(np.frombuffer(message.prompt_logprobs, "<f4")).tolist() == [True, True, False, False]
    topk = message.topk_prompt_logprobs
    assert (topk.k, topk.length) == (2, 4)
    assert np.frombuffer(topk.token_ids, "<i4").tolist() == [0, 0, 5, 6, 5, 0, 9, 0]
    assert np.frombuffer(topk.logprobs, "<f4")[0] == np.float32(-99999.0)
