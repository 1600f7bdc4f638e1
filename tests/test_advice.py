"""Usual settings with their sources, data sets by the names they are known by, and several at once."""

import asyncio
import json
import math
from types import SimpleNamespace
from typing import Any

import chz
import numpy as np
import pytest
from transformers import Qwen3Config

from envs import math_word
from envs.arithmetic import ArithmeticBuilder
from envs.interleaved import InterleavedBuilder, shares
from envs.math_word import BOXED_SUFFIX, Gsm8kBuilder, MathBuilder
from posttrain.advise import Config, main, recommended_renderer, usual_learning_rate, warn_of_learning_rate
from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.types import TensorData
from posttrain.renderers import get_renderer
from posttrain.tracking.command_line import parse
from posttrain.tracking.datasets import ListDataset
from rl.names import ENVS
from rl.train_cli import CLIConfig
from supervised.data import datum_from_tokens_weights
from supervised.names import DATASETS
from supervised.nll import NLLEvaluator, trained_bytes
from supervised.train_cli import CLIConfig as SupervisedConfig

RENDERER = get_renderer("role_colon", load_tokenizer("tiny"))


# --- advice ---------------------------------------------------------------------------------------


def test_learning_rates_by_hand():
    assert usual_learning_rate("sft", 4096, "llama", True)[0] == pytest.approx(2.856e-4, rel=1e-3)  # Llama 8B
    assert usual_learning_rate("sft", 2000, "qwen3", False)[0] == pytest.approx(5e-5)
    assert usual_learning_rate("rl", 4096, "llama", False)[0] == 1e-6
    rate, source = usual_learning_rate("sft", 2000, "gemma3", True)
    assert rate == pytest.approx(5e-4) and "gemma3 as Qwen" in source


@pytest.fixture
def model(tmp_path):
    Qwen3Config(hidden_size=1024).save_pretrained(tmp_path)
    tokenizer = load_tokenizer("tiny")
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_rate_that_is_far_off_is_a_warning_and_others_are_none(model, capsys):
    warning = warn_of_learning_rate("rl", model, 0, 1e-4)
    assert (
        warning and "is 100 times what is usual for rl of all weights" in warning and warning in capsys.readouterr().out
    )
    assert "is 1/53 of what is usual" in (warn_of_learning_rate("sft", model, 0, 1e-6) or "")
    assert warn_of_learning_rate("rl", model, 32, 1e-4) is None  # an adapter
    assert warn_of_learning_rate("rl", "tiny", 0, 1.0) is None and warn_of_learning_rate("rl", model, 0, 0.0) is None


def test_the_command_says_rates_sources_batches_and_renderer(model, capsys):
    main(Config(model_name=model, task="dpo", lora_rank=16, learning_rate=1e-5))
    printed = capsys.readouterr().out
    for text in (
        "qwen3, hidden size 1024",
        "-> learning_rate=1.0e-05  LoRA",
        "Zephyr",
        "renderer_name=",
        "not far off",
    ):
        assert text in printed
    for name, rate in (("tiny", 1.0), (model, 0.0)):  # no rule is known
        main(Config(model_name=name, learning_rate=rate))
        assert "not far off" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="lora_rank=1025 is more than the hidden size"):
        main(Config(model_name=model, lora_rank=1025))


def test_recommended_renderers():
    tokenizer = load_tokenizer("tiny")
    for template, name, expected in (
        (None, "a/b", "role_colon"),
        ("{{ messages }}", "Qwen/Qwen3-8B-Base", "role_colon"),
        ("{{ enable_thinking }}", "Qwen/Qwen3-8B", "disable_thinking"),
        ("{{ messages }}", "a/b", "chat_template"),
    ):
        tokenizer.chat_template = template
        assert recommended_renderer(name, tokenizer)[0] == expected


# --- names ----------------------------------------------------------------------------------------


def test_data_sets_have_the_names_they_are_known_by():
    def env(name: str) -> Any:
        return parse(CLIConfig, [f"env={name}"], {"env": ENVS}).env

    assert isinstance(env("math"), MathBuilder) and type(env("guess_the_number")) is type(env("guess_number"))
    assert (env("polaris").gold_style, env("deepmath").answer_field) == ("plain", "final_answer")
    for name, hub in (("no_robots", "HuggingFaceH4/no_robots"), ("tulu3", "allenai/tulu-3-sft-mixture")):
        dataset: Any = parse(SupervisedConfig, [f"dataset={name}"], {"dataset": DATASETS}).dataset
        assert dataset.name == hub
    with pytest.raises(ConfigError, match="set of preferences: preference/train_cli.py dataset=hhh"):
        parse(SupervisedConfig, ["dataset=hhh"], {"dataset": DATASETS})
    with pytest.raises(ConfigError, match="dataset=huggingface dataset.name=openai/gsm8k"):
        parse(SupervisedConfig, ["dataset=openai/gsm8k"], {"dataset": DATASETS})


def test_math_is_trained_on_without_math500(monkeypatch):
    def hub(name: str, subset: str | None, split: str):
        if name.endswith("MATH-500"):
            return [("500:0", {"problem": "What is 1 + 1?", "solution": r"\boxed{2}"})]
        questions = ["What is 1 + 1?", f"{subset} {split}?"]
        return [(f"{subset}:{i}", {"problem": q, "solution": r"\boxed{3}"}) for i, q in enumerate(questions)]

    monkeypatch.setattr(math_word, "table_rows", hub)
    train, test = MathBuilder(subsets=("algebra", "geometry")).splits()
    assert [problem.question for problem in test] == ["What is 1 + 1?"]
    assert [p.question for p in train] == ["algebra train?", "algebra test?", "geometry train?", "geometry test?"]


# --- prompts --------------------------------------------------------------------------------------


@pytest.fixture
def gsm8k(tmp_path):
    rows = {"train": range(5), "test": range(5, 7)}
    for split, numbers in rows.items():
        lines = [json.dumps({"question": f"What is {n}?", "answer": f"It is {n}.\n#### {n}"}) for n in numbers]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    return str(tmp_path)


def test_few_shot_and_boxed_answers(gsm8k):
    builder = Gsm8kBuilder(data_dir=gsm8k, few_shot=2, boxed=True, batch_size=3, group_size=2)
    train, test = asyncio.run(builder(RENDERER))
    assert test is not None
    (group,) = [group for group in test.get_batch(0) if "What is 5?" in str(group)]
    env: Any = asyncio.run(group.make_envs())[0]
    prompt = RENDERER.tokenizer.decode(env.build_prompt().to_ints())
    for text in (f"What is 0?{BOXED_SUFFIX}", "It is 0.\n\\boxed{0}", "\\boxed{1}", f"What is 5?{BOXED_SUFFIX}"):
        assert text in prompt
    assert "####" not in prompt
    assert set(questions_of(train.get_batch(0))) == {
        f"What is {n}?{BOXED_SUFFIX}" for n in (2, 3, 4)
    }  # the examples are not trained on
    with pytest.raises(DataError, match="few_shot=5 of 5 training problems"):
        asyncio.run(Gsm8kBuilder(data_dir=gsm8k, few_shot=5)(RENDERER))
    only_test = asyncio.run(builder.test_set(RENDERER))
    assert only_test is not None and str(only_test.get_batch(0)) == str(test.get_batch(0))
    # Trap: an evaluation whose prompts show the answers of its own questions
    alike = Gsm8kBuilder(train_path=f"{gsm8k}/test.jsonl", test_path=f"{gsm8k}/test.jsonl", few_shot=1)
    with pytest.raises(DataError, match="1 few_shot problems are in the test set too"):
        asyncio.run(alike.test_set(RENDERER))


# --- several data sets ----------------------------------------------------------------------------


def test_shares_by_hand():
    assert shares(8, [3, 1]) == [6, 2] and shares(4, [1, 1, 1]) == [2, 1, 1] and shares(3, [1, 1]) == [2, 1]
    with pytest.raises(ConfigError, match="data set 1 has no group"):
        shares(4, [100, 1])


def questions_of(batch) -> list[str]:
    return [group.env_thunk.args[0].question for group in batch]


def test_every_batch_has_groups_of_each_set(gsm8k):
    argv = ["env=interleaved", "env.builders.0=gsm8k", f"env.builders.0.data_dir={gsm8k}", "env.builders.1=arithmetic"]
    argv += ["env.weights=1,3", "groups_per_batch=4", "group_size=2", "env.builders.1.n_batches=3"]
    env = parse(CLIConfig, argv, {"env": ENVS}).resolved().env
    assert isinstance(env, InterleavedBuilder) and isinstance(env.builders[1], ArithmeticBuilder)
    train, test = asyncio.run(env(RENDERER))
    assert len(train) == 5 and test is not None
    for index in (0, 4, 7):  # arithmetic has 3 batches; 7 is in a later epoch
        batch = train.get_batch(index)
        assert [group.logging_tags() == ["gsm8k"] for group in batch] == [True, False, False, False]
        assert all(group.num_envs == 2 for group in batch)  # type: ignore[attr-defined]
    assert questions_of(train.get_batch(2)) == questions_of(train.get_batch(2)) != questions_of(train.get_batch(1))
    assert sum("gsm8k" in group.logging_tags() for i in range(len(test)) for group in test.get_batch(i)) == 2
    with pytest.raises(ConfigError, match="one weight for each"):
        asyncio.run(InterleavedBuilder(builders=env.builders, weights=[1.0])(RENDERER))
    for name in ("batch_size", "group_size", "seed"):
        builders = [env.builders[0], chz.replace(env.builders[1], **{name: 5})]
        with pytest.raises(ConfigError, match=rf"builders\.1\.{name}=5: set env.{name} instead"):
            asyncio.run(InterleavedBuilder(builders=builders)(RENDERER))


# --- bits per byte --------------------------------------------------------------------------------


def test_bits_per_byte_by_hand():
    """Two texts of 3 and 5 UTF-8 bytes and their stops, at half a bit and two bits a token."""
    tokenizer, data, logprobs = load_tokenizer("tiny"), [], []
    for text, bits in (("abc", 0.5), ("d\u00e9fg", 2.0)):
        tokens = [5, *tokenizer.encode(text), tokenizer.eos_token_id]
        data.append(datum_from_tokens_weights(tokens, [0.0] + [1.0] * (len(tokens) - 1)))
        logprobs.append(TensorData(np.full(len(tokens) - 1, -bits * math.log(2), dtype=np.float32)))

    class Client:
        async def forward(self, batch, loss, *, all_logprobs):
            return SimpleNamespace(loss_fn_outputs=[{"logprobs": each} for each in logprobs])

        def get_tokenizer(self):
            return tokenizer

    metrics = asyncio.run(NLLEvaluator(ListDataset(data, 2, shuffle=False))(Client()))  # type: ignore[arg-type]
    counts = [logprob.array.size for logprob in logprobs]
    assert trained_bytes(data, tokenizer) == 8
    assert metrics["test/bits_per_byte"] == pytest.approx((0.5 * counts[0] + 2.0 * counts[1]) / 8)
    assert metrics["test/nll"] == pytest.approx(math.log(2) * 8 * metrics["test/bits_per_byte"] / sum(counts))
