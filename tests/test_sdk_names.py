"""Scripts written for the Tinker SDK (0.38) run here: its names, keywords and defaults, and one
script in its idiom.
"""

# Trap: a keyword of the Tinker SDK that is a TypeError here.

import asyncio
import concurrent.futures
import inspect
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import posttrain.backend as tinker
from posttrain.backend import sdk_keywords, types
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import CheckpointError, ConfigError, CookbookError, DataError
from posttrain.backend.rest_client import RestClient
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from tests.conftest import rounded

NO = inspect.Parameter.empty
PASS = {"data": NO, "loss_fn": NO, "loss_fn_config": None}
STATE = {"path": NO, "base_model": None, "user_metadata": None, "weights_access_token": None}
LORA = {"base_model": NO, "rank": 32, "seed": None, "train_mlp": True, "train_attn": True}
SAMPLER = {"retry_config": None, "record_stability_info": False}
SAMPLE = {
    "prompt": NO,
    "num_samples": NO,
    "sampling_params": NO,
    "include_prompt_logprobs": False,
    "topk_prompt_logprobs": 0,
    "topk_sample_logprobs": 0,
    "target_prompt_logprobs": None,
    "prompt_alt_tokens_k": 0,
    "prompt_logprobs_last_n": None,
}
# The SDK's keywords in its order, with its defaults. Defaults that differ: train_unembed (None =
# off, said in one line; there True).
METHODS: list[tuple[type, str, dict[str, Any]]] = [
    (ServiceClient, "get_server_capabilities", {}),
    (
        ServiceClient,
        "create_lora_training_client",
        LORA | {"train_unembed": None, "user_metadata": None, "optimizer": None},
    ),
    (ServiceClient, "create_training_client_from_state", STATE | {"optimizer": None}),
    (ServiceClient, "create_training_client_from_state_with_optimizer", STATE),
    (ServiceClient, "create_sampling_client", {"model_path": None, "base_model": None} | SAMPLER),
    (TrainingClient, "forward", PASS),
    (TrainingClient, "forward_backward", PASS),
    (TrainingClient, "forward_backward_custom", {"data": NO, "loss_fn": NO, "loss_type_input": None}),
    (TrainingClient, "optim_step", {"optim_params": None, "adam_params": None}),
    (TrainingClient, "save_state", {"name": NO, "ttl_seconds": None, "overwrite": False, "user_metadata": None}),
    (TrainingClient, "load_state", {"path": NO, "weights_access_token": None}),
    (TrainingClient, "load_state_with_optimizer", {"path": NO, "weights_access_token": None}),
    (TrainingClient, "save_weights_for_sampler", {"name": NO, "ttl_seconds": None, "user_metadata": None}),
    (
        TrainingClient,
        "save_weights_external",
        {"name": NO, "ttl_seconds": None, "age_encryption_recipients": None},
    ),
    (ServiceClient, "create_rest_client", {}),
    (RestClient, "list_user_checkpoints", {"limit": 100, "offset": 0}),
    (RestClient, "get_weights_info_by_tinker_path", {"tinker_path": NO}),
    (RestClient, "delete_checkpoint_from_tinker_path", {"tinker_path": NO}),
    (RestClient, "set_checkpoint_ttl_from_tinker_path", {"tinker_path": NO, "ttl_seconds": NO}),
    (TrainingClient, "save_weights_and_get_sampling_client", {"name": None} | SAMPLER | {"kind": "snapshot"}),
    (TrainingClient, "create_sampling_client", {"model_path": NO} | SAMPLER),
    (TrainingClient, "get_info", {}),
    (SamplingClient, "sample", SAMPLE),
    (SamplingClient, "compute_logprobs", {"prompt": NO, "prompt_logprobs_last_n": None}),
    (SamplingClient, "get_base_model", {}),
]


@pytest.mark.parametrize(
    ("owner", "name", "keywords"), METHODS, ids=[f"{owner.__name__}.{name}" for owner, name, _ in METHODS]
)
def test_methods_and_their_async_twins_take_the_sdks_keywords(owner: type, name: str, keywords: dict[str, Any]) -> None:
    method, twin = getattr(owner, name), getattr(owner, f"{name}_async")
    parameters = list(inspect.signature(method).parameters.values())[1:]
    assert {p.name: p.default for p in parameters[: len(keywords)]} == keywords
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[len(keywords) :]), "our own options come after, by keyword"
    assert inspect.iscoroutinefunction(twin) and inspect.signature(twin) == inspect.signature(method)


def test_constructors_and_types_have_the_sdks_defaults() -> None:
    service = inspect.signature(ServiceClient).parameters
    for name in ("user_metadata", "project_id", "display_name", "base_url", "api_key", "default_headers_overrides"):
        assert service[name].default is None
    adam = {
        "learning_rate": 1e-4,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-12,
        "weight_decay": 0.0,
        "grad_clip_norm": 0.0,
    }
    sampling = {"max_tokens": None, "seed": None, "stop": None, "temperature": 1.0, "top_k": -1, "top_p": 1.0}
    assert vars(tinker.AdamParams()) == adam and vars(tinker.SamplingParams()) == sampling
    assert tinker.EncodedTextChunk([1]).type == "encoded_text" and tinker.ModelInputChunk is tinker.EncodedTextChunk


NAMES = """ServiceClient TrainingClient SamplingClient RestClient APIFuture AdamParams Datum EncodedTextChunk ForwardBackwardOutput LoraConfig
ModelInput ModelInputChunk OptimStepResponse SampledSequence SampleResponse SamplingParams StopReason TensorData TensorDtype types
TinkerError APIError APIStatusError APITimeoutError APIConnectionError APIResponseValidationError RequestFailedError
BadRequestError AuthenticationError BillingError PermissionDeniedError NotFoundError ConflictError UnprocessableEntityError
RateLimitError InternalServerError ImageChunk ImageAssetPointerChunk"""


def test_names() -> None:
    from posttrain.backend.tensor_data import TensorData
    from posttrain.renderers import Message, TrainOnWhat, get_text_content

    assert all(hasattr(tinker, name) for name in NAMES.split())
    assert types.TensorData is types.tensor_data.TensorData is TensorData and types.OptimParams is types.AdamParams
    assert types.SaveWeightsForSamplerResponse and types.GetServerCapabilitiesResponse and types.LossFnType
    assert get_text_content(Message(role="user", content="hello")) == "hello" and TrainOnWhat.ALL_ASSISTANT_MESSAGES
    with pytest.raises(AttributeError):
        getattr(tinker, "no_such_name")  # noqa: B009
    with pytest.raises(DataError, match="text only"):
        tinker.ImageAssetPointerChunk(location="a.png", format="png")


def test_what_fails_here_is_a_tinker_error_and_never_one_of_a_network(torch_service: ServiceClient) -> None:
    with pytest.raises(tinker.TinkerError):
        torch_service.create_training_client_from_state("nowhere")
    assert issubclass(CheckpointError, tinker.RequestFailedError) and not issubclass(CheckpointError, tinker.APIError)
    assert issubclass(tinker.RateLimitError, tinker.APIError) and issubclass(tinker.APIError, CookbookError)


def test_keywords_without_a_meaning_are_ignored_with_one_line_each(
    torch_service: ServiceClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdk_keywords, "_printed", set())
    for _ in range(2):
        with ServiceClient(BackendConfig(engine="torch"), project_id="p", user_metadata={"a": "b"}, api_key="k"):
            pass
        client = torch_service.create_lora_training_client("micro", 4, user_metadata={"renderer": "plain"})
        path = client.save_state("twice", ttl_seconds=60, overwrite=True, user_metadata={"a": "b"}).result().path
        client.load_state(path, weights_access_token="t").result()
        torch_service.create_training_client_from_state(path, base_model="micro", weights_access_token="t")
        client.save_weights_and_get_sampling_client(name="step", retry_config=object())
    said = capsys.readouterr().out.splitlines()
    ignored = {
        "project_id",
        "user_metadata",
        "api_key",
        "ttl_seconds",
        "overwrite",
        "weights_access_token",
        "base_model",
        "name",
    }
    assert sorted(line.split("=")[0] for line in said if "ignored" in line) == sorted(ignored | {"retry_config"})
    assert sum("train_unembed" in line for line in said) == 1


def test_what_has_a_meaning_and_is_not_there_is_refused_by_name(torch_service: ServiceClient) -> None:
    client = torch_service.create_training_client("micro")
    sampler = client.save_weights_and_get_sampling_client(kind="inflight")
    prompt, params = types.ModelInput.from_ints([5, 6]), types.SamplingParams(max_tokens=1)
    with pytest.raises(ConfigError, match="prompt_logprobs_last_n"):
        sampler.sample(prompt, 1, params, prompt_logprobs_last_n=3)

    class Dimuon:
        type = "dimuon"

    for call in (
        lambda: torch_service.create_lora_training_client("micro", optimizer=Dimuon()),
        lambda: client.forward_backward_custom([], lambda data, logprobs_D: None, loss_type_input="logits"),  # type: ignore[arg-type]
        lambda: client.optim_step(),
        lambda: client.optim_step(types.AdamParams(), adam_params=types.AdamParams()),
        lambda: client.save_weights_and_get_sampling_client(kind="live"),  # type: ignore[arg-type]
        lambda: ServiceClient(base_url="http://localhost"),
    ):
        with pytest.raises(ConfigError):
            call()


def test_checkpoints_of_the_folder_are_listed_described_and_deleted(tmp_path: Path) -> None:
    with ServiceClient(BackendConfig(engine="torch"), tmp_path / "mine") as service:
        client = service.create_lora_training_client("micro", 4, train_attn=False)
        reader = service.create_rest_client()
        assert reader.list_user_checkpoints().result().checkpoints == []
        saved = [client.save_state("a").result().path, client.save_weights_external("b").result().path]
        listed = {c.checkpoint_id: c for c in reader.list_user_checkpoints().result().checkpoints}
        assert {name: c.checkpoint_type for name, c in listed.items()} == {
            "a": "training",
            "sampler_weights/b": "sampler",
        }
        assert [listed[name].tinker_path for name in sorted(listed)] == saved
        assert listed["a"].size_bytes > listed["sampler_weights/b"].size_bytes > 1000
        for path in saved:
            info = reader.get_weights_info_by_tinker_path(path).result()
            assert (info.base_model, info.is_lora, info.lora_rank) == ("micro", True, 4)
        whole = service.create_training_client("micro").save_state("whole").result().path
        assert reader.get_weights_info_by_tinker_path(whole).result().is_lora is False
        reader.delete_checkpoint_from_tinker_path(saved[0]).result()
        assert asyncio.run(reader.list_user_checkpoints_async(1, 1)).checkpoints[0].tinker_path in saved[1:]
        outside = ServiceClient(BackendConfig(engine="torch"), tmp_path / "other").create_rest_client()
        for call in (
            lambda: reader.delete_checkpoint_from_tinker_path(saved[0]).result(),
            lambda: reader.delete_checkpoint_from_tinker_path(str(tmp_path / "mine")).result(),
            lambda: outside.delete_checkpoint_from_tinker_path(whole).result(),
        ):
            with pytest.raises(CheckpointError):
                call()
        with pytest.raises(ConfigError, match="posttrain-serve"):
            reader.list_sessions()
        with pytest.raises(ConfigError, match="encrypted"):
            client.save_weights_external("c", None, ["age1"])
        with pytest.raises(ConfigError, match="does not pickle"):
            pickle.dumps(service.create_sampling_client(base_model="micro"))


async def script(service_client: tinker.ServiceClient) -> dict[str, Any]:
    """As written for the SDK: from here on nothing is ours but the model's name."""
    capabilities = await service_client.get_server_capabilities_async()
    names = [model.model_name for model in capabilities.supported_models]
    training_client = await service_client.create_lora_training_client_async(
        base_model=names[names.index("tiny")], rank=8, user_metadata={"recipe": "sl_loop"}
    )
    tokenizer = training_client.get_tokenizer()
    tokens = tokenizer.encode("1+1=2" * 4)
    datum = tinker.types.Datum(
        model_input=tinker.types.ModelInput.from_ints(tokens=tokens[:-1]),
        loss_fn_inputs={
            "weights": tinker.TensorData(data=[1.0] * (len(tokens) - 1), dtype="float32", shape=[len(tokens) - 1]),
            "target_tokens": tinker.TensorData(data=tokens[1:], dtype="int64", shape=[len(tokens) - 1]),
        },
    )
    losses = []
    for step in range(6):
        fwd_bwd_future = await training_client.forward_backward_async([datum], loss_fn="cross_entropy")
        optim_future = await training_client.optim_step_async(
            adam_params=tinker.AdamParams(learning_rate=1e-3 * (1 - step / 6))
        )
        fwd_bwd_result = await fwd_bwd_future.result_async()
        await optim_future
        logprobs, weights = fwd_bwd_result.loss_fn_outputs[0]["logprobs"], datum.loss_fn_inputs["weights"]
        losses.append(-float(np.dot(logprobs.to_numpy(), weights.to_numpy())))

    def custom(data: list[tinker.Datum], logprobs_list: list) -> tuple[Any, dict[str, float]]:
        return -logprobs_list[0].sum(), {"tokens": float(len(logprobs_list[0]))}

    custom_future = await training_client.forward_backward_custom_async([datum], loss_fn=custom)
    try:
        await training_client.optim_step_async(tinker.AdamParams(learning_rate=1e-4))
    except tinker.RateLimitError:
        raise AssertionError from None
    saved = await (await training_client.save_state_async("0001", ttl_seconds=3600, overwrite=True)).result_async()
    sampling_path = training_client.save_weights_for_sampler(name="0001").result().path
    sampling_client = await training_client.save_weights_and_get_sampling_client_async(retry_config=None)
    params = tinker.SamplingParams(max_tokens=8, temperature=0.7, seed=1)
    prompt = tinker.ModelInput.from_ints(tokens[:5])
    futures = [sampling_client.sample(prompt=prompt, num_samples=2, sampling_params=params) for _ in range(3)]
    samples = [future.result() for future in concurrent.futures.as_completed(futures)]
    logprobs = await sampling_client.compute_logprobs_async(prompt)
    # in 0.38 a future of a client
    frozen = await training_client.create_sampling_client(sampling_path)
    resumed = service_client.create_training_client_from_state_with_optimizer(
        saved.path, user_metadata={"a": "b"}
    ).result()
    return {
        "losses": losses,
        "custom": (await custom_future).metrics,
        "samples": samples,
        "logprobs": logprobs,
        "frozen": frozen.compute_logprobs(prompt).result(),
        "info": await training_client.get_info_async(),
        "resumed": (await resumed.get_info_async()).is_lora,
        "base_model": sampling_client.get_base_model(),
    }


def test_a_script_for_the_sdk_runs_but_for_its_import(torch_service: ServiceClient) -> None:
    outcome = asyncio.run(script(torch_service))
    assert outcome["losses"][-1] < outcome["losses"][0] and outcome["custom"]["tokens"] == len("1+1=2" * 4) - 1
    assert len(outcome["samples"]) == 3 and all(len(response.sequences) == 2 for response in outcome["samples"])
    sequence = outcome["samples"][0].sequences[0]
    assert sequence.tokens_np.tolist() == sequence.tokens and sequence.logprobs_np.dtype == np.float32
    assert outcome["logprobs"][0] is None and outcome["frozen"][1:] == pytest.approx(
        outcome["logprobs"][1:], abs=rounded(1e-4)
    )
    info = outcome["info"]
    assert (info.model_data.model_name, info.is_lora, info.lora_rank, outcome["resumed"]) == ("tiny", True, 8, True)
    assert outcome["base_model"] == "tiny"


def test_an_environment_of_the_cookbook_is_given_the_stop_reason(torch_service: ServiceClient) -> None:
    from rl.rollouts import Policy, do_single_rollout
    from rl.types import Env, StepResult

    class Ours(Env):
        async def initial_observation(self):  # noqa: ANN202
            return types.ModelInput.from_ints([5, 6]), []

        async def step(self, action: list[int]) -> StepResult:
            return StepResult(0.0, True, types.ModelInput.empty())

    class Theirs(Ours):
        async def step(self, action: list[int], *, extra: dict | None = None) -> StepResult:
            return StepResult(0.0, True, types.ModelInput.empty(), logs={"stop_reason": (extra or {})["stop_reason"]})

    policy = Policy(torch_service.create_sampling_client(base_model="micro"), max_tokens=2)
    logs = [asyncio.run(do_single_rollout(policy, env, (0,))).transitions[0].logs for env in (Ours(), Theirs())]
    assert logs == [{}, {"stop_reason": "length"}]
