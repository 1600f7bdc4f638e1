"""Supervised datasets: the shift, splits, bad and over-long rows, and batches that depend on
nothing but their index.
"""

import json
import pickle
from pathlib import Path

import chz
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.star_graph_data import StarGraphExamplesBuilder
from posttrain.backend.errors import ConfigError, DataError, ModelError
from posttrain.backend.tokenizers import character_tokenizer, load_tokenizer
from posttrain.backend.types import Datum, ModelInput
from posttrain.renderers import get_renderer
from posttrain.renderers.turns import decode
from posttrain.renderers.types import TrainOnWhat
from posttrain.tracking.command_line import parse
from posttrain.tracking.datasets import ListDataset
from supervised import viz_sft_dataset
from supervised.data import (
    ConversationFileBuilder,
    HuggingFaceBuilder,
    MixtureBuilder,
    MixtureDataset,
    PromptCompletionFileBuilder,
    conversation_to_datum,
    datum_from_tokens_weights,
)
from supervised.types import SupervisedDatasetBuilder
from supervised.viz_sft_dataset import colored_example
from tests import commands
from tests.jsonl_files import write

TOKENIZER = character_tokenizer(512)
PLAIN = get_renderer("plain", TOKENIZER)
# of `datasets.save_to_disk`
SAVED_FILES = ("state.json", "dataset_info.json", "data-00000-of-00001.arrow")
WORD_PROBLEMS = [
    {
        "question": "Ana has 3 pears and eats 1. How many are left?",
        "answer": "She has 3 - 1 = <<3-1=2>>2 left.\n#### 2",
    },
    {"question": "A box holds 4 pens. How many are in 6 boxes?", "answer": "4 * 6 = <<4*6=24>>24 pens.\n#### 24"},
    {"question": "Ben walks 2 km a day. How far in a week?", "answer": "He walks 2 * 7 = <<2*7=14>>14 km.\n#### 14"},
]


def sums(n: int) -> list[dict[str, str]]:
    return [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(n)]


def text_of(datum: Datum) -> str:
    return decode(TOKENIZER, [*datum.model_input.to_ints()[:1], *datum.loss_fn_inputs["target_tokens"].tolist()])


def texts(dataset) -> list[str]:
    return [text_of(datum) for i in range(len(dataset)) for datum in dataset.get_batch(i)]


def numbered(n: int, first: int = 0) -> list[Datum]:
    return [Datum(ModelInput.from_ints([first + i]), {}) for i in range(n)]


def numbers(data: list[Datum]) -> list[int]:
    return [datum.model_input.to_ints()[0] for datum in data]


def test_shift_and_reductions_by_hand():
    datum = datum_from_tokens_weights([5, 6, 7, 8], [1.0, 0.0, 1.0, 1.0], reduction="sum")
    assert datum.model_input.to_ints() == [5, 6, 7]
    assert datum.loss_fn_inputs["target_tokens"].tolist() == [6, 7, 8]
    assert datum.loss_fn_inputs["weights"].tolist() == [0.0, 1.0, 1.0]
    mean = datum_from_tokens_weights([5, 6, 7, 8], [1.0, 0.0, 1.0, 1.0])
    assert mean.loss_fn_inputs["weights"].tolist() == [0.0, 0.5, 0.5]
    cut = datum_from_tokens_weights([5, 6, 7, 8], [1.0, 0.0, 1.0, 1.0], max_length=3)
    assert cut.loss_fn_inputs["target_tokens"].tolist() == [6, 7] and cut.loss_fn_inputs["weights"].tolist() == [
        0.0,
        1.0,
    ]


def test_datum_without_weight_is_an_error():
    with pytest.raises(DataError, match="nothing to train on"):
        # the first token's weight has no place
        datum_from_tokens_weights([5, 6, 7], [1.0, 0.0, 0.0])
    with pytest.raises(DataError, match="nothing to train on"):
        datum_from_tokens_weights([5, 6, 7], [0.0, 0.0, 1.0], max_length=2)
    with pytest.raises(DataError, match="nothing to train on"):
        datum_from_tokens_weights([5], [1.0])
    with pytest.raises(ConfigError, match="reduction='median'"):
        datum_from_tokens_weights([5, 6], [0.0, 1.0], reduction="median")


def test_conversation_to_datum():
    datum = conversation_to_datum([{"role": "user", "content": "2+3="}, {"role": "assistant", "content": "5"}], PLAIN)
    assert text_of(datum) == "2+3=5<|endoftext|>"
    assert datum.loss_fn_inputs["weights"].tolist() == [0.0, 0.0, 0.0, 0.5, 0.5]


@given(n=st.integers(1, 40), batch_size=st.integers(1, 40), seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_batches_depend_on_seed_epoch_and_index_alone(n, batch_size, seed, epoch):
    batch_size = min(batch_size, n)
    resumed = ListDataset(numbered(n), batch_size, seed)
    resumed.set_epoch(epoch)
    last = numbers(resumed.get_batch(len(resumed) - 1))
    dataset = ListDataset(numbered(n), batch_size, seed)
    for e in range(epoch + 1):
        dataset.set_epoch(e)
        seen = [numbers(dataset.get_batch(i)) for i in range(len(dataset))]
    assert seen[-1] == last
    # nothing is lost: the last batch is short instead
    assert sorted(sum(seen, [])) == list(range(n))
    assert all(len(batch) == batch_size for batch in seen[:-1])


def test_epochs_differ_and_bounds_are_checked():
    dataset = ListDataset(numbered(50), 50)
    first = numbers(dataset.get_batch(0))
    dataset.set_epoch(1)
    assert numbers(dataset.get_batch(0)) != first
    assert numbers(pickle.loads(pickle.dumps(dataset)).get_batch(0)) == numbers(dataset.get_batch(0))
    # past the end is a later epoch
    whole, later = numbers(dataset.get_batch(0)), numbers(dataset.get_batch(1))
    dataset.set_epoch(2)
    assert later == numbers(dataset.get_batch(0)) != whole
    with pytest.raises(DataError, match="batch_size=0 and 50 examples: a batch needs at least one"):
        ListDataset(numbered(50), 0)


def test_fewer_examples_than_a_batch_are_trained_on_and_said(capsys):
    whole = ListDataset(numbered(50), 50)
    assert capsys.readouterr().out == ""
    dataset = ListDataset(numbered(50), 128)
    assert len(dataset) == 1 and numbers(dataset.get_batch(0)) == numbers(whole.get_batch(0))
    assert capsys.readouterr().out == "batch_size=128 is more than the 50 examples: every batch holds all of them\n"


def test_a_huggingface_set_that_cannot_be_built_is_one_line(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"messages": [1]}\n{"messages": {"a": 2}}\n{"other": "x"\n')
    with pytest.raises(DataError, match="could not be loaded: ") as error:
        HuggingFaceBuilder(name=str(tmp_path))(PLAIN)
    assert "\n" not in str(error.value)


def test_gsm8k_rows_train_directly(tmp_path, capsys):
    builder = PromptCompletionFileBuilder(
        path=write(tmp_path / "train.jsonl", *WORD_PROBLEMS[:2]),
        test_path=write(tmp_path / "test.jsonl", *WORD_PROBLEMS[2:]),
        prompt_field="question",
        completion_field="answer",
        prompt_template="Q: {prompt}\nA: ",
        batch_size=2,
    )
    train, test = builder(PLAIN)
    assert sorted(texts(train)) == sorted(
        f"Q: {r['question']}\nA: {r['answer']}<|endoftext|>" for r in WORD_PROBLEMS[:2]
    )
    assert test is not None and "Ben walks" in texts(test)[0]
    assert "train.jsonl: 2 examples\n" in capsys.readouterr().out
    chat, _ = builder(get_renderer(None, TOKENIZER))
    assert all("<|im_start|>assistant\n" in text for text in texts(chat))


def test_conversations_from_a_file(tmp_path):
    chat = [
        {"role": r, "content": c} for r, c in [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    ]
    path = write(tmp_path / "chats.jsonl", {"messages": chat})
    train, test = ConversationFileBuilder(path=path, batch_size=1)(PLAIN)
    assert texts(train) == ["ab<|endoftext|>cd<|endoftext|>"] and test is None
    last = ConversationFileBuilder(
        path=path, batch_size=1, train_on_what=TrainOnWhat.LAST_ASSISTANT_MESSAGE, reduction="sum"
    )
    assert last(PLAIN)[0].get_batch(0)[0].loss_fn_inputs["weights"].tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]


def test_held_out_examples_are_not_trained_on(tmp_path):
    path = write(tmp_path / "sums.jsonl", *sums(20))
    train, test = PromptCompletionFileBuilder(path=path, test_size=5, batch_size=8)(PLAIN)
    assert test is not None
    assert len(texts(test)) == 5 and len(texts(train)) == 15 and not set(texts(test)) & set(texts(train))
    again = PromptCompletionFileBuilder(path=path, test_size=5, batch_size=3)(PLAIN)[1]
    assert again is not None and texts(again) == texts(test)
    with pytest.raises(DataError, match="test_size=20 of 20"):
        PromptCompletionFileBuilder(path=path, test_size=20)(PLAIN)
    with pytest.raises(ConfigError, match="give one of them"):
        PromptCompletionFileBuilder(path=path, test_size=1, test_path=path)(PLAIN)


@pytest.mark.parametrize("renderer_name", ["plain", "role_colon", "chat_template"])
def test_empty_answers_and_held_out_examples_that_are_trained_on_are_counted(tmp_path, capsys, renderer_name):
    rows = [*sums(3), *({"prompt": "0+0=", "completion": blank} for blank in ("", " ", "\n"))]
    path, test_path = write(tmp_path / "sums.jsonl", *rows), write(tmp_path / "test.jsonl", rows[1], *sums(6)[4:])
    PromptCompletionFileBuilder(path=path, test_path=test_path)(get_renderer(renderer_name, load_tokenizer("tiny")))
    said = capsys.readouterr().out
    assert f"{path}: 6 examples; WARNING 3 have an empty answer, of which the end alone is trained on\n" in said
    assert "WARNING 1 of the 3 held-out examples are trained on, too" in said


def test_overlong_examples_are_counted_never_lost_silently(tmp_path, capsys):
    rows = [*sums(3), {"prompt": "1+2+3+4+5=", "completion": "15"}, {"prompt": "1=", "completion": "1" * 30}]
    path = write(tmp_path / "sums.jsonl", *rows)
    builder = PromptCompletionFileBuilder(path=path, max_length=9, batch_size=1, reduction="sum")
    assert len(texts(builder(PLAIN)[0])) == 3
    assert capsys.readouterr().out == f"{path}: 5 examples, 2 longer than 9 tokens dropped\n"
    train, _ = PromptCompletionFileBuilder(path=path, max_length=9, batch_size=1, overlong="truncate")(PLAIN)
    assert "1=1111111" in texts(train) and len(texts(train)) == 4
    assert (
        "2 longer than 9 tokens truncated (1 of them dropped: nothing to train on was left)" in capsys.readouterr().out
    )
    last = write(tmp_path / "last.jsonl", {"prompt": "1234567=", "completion": "89"})  # the last token that is left
    train, _ = PromptCompletionFileBuilder(path=last, max_length=9, batch_size=1, overlong="truncate")(PLAIN)
    assert texts(train) == ["1234567=8"]
    with pytest.raises(DataError, match=r"sums.jsonl:4: 13 tokens, more than max_length=9"):
        PromptCompletionFileBuilder(path=path, max_length=9, overlong="raise")(PLAIN)
    with pytest.raises(DataError, match="5 examples, 5 longer than 3 tokens dropped: none is left"):
        PromptCompletionFileBuilder(path=path, max_length=3)(PLAIN)


@pytest.mark.parametrize(
    "line, complaint",
    [
        ('{"text": "a"}', "2: no field 'messages'; the fields are 'text'"),
        ('{"messages": "a"}', "2: the field 'messages' is a str, not a list"),
        ('{"messages": [{"role": "user"}]}', r"2: messages\[0\] needs a 'role' and a 'content'"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', r"2: messages\[0\] has the role 'bot'; roles are"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "2: no message to train on: the roles are user"),
        ('{"messages": []}', "2: a conversation without messages"),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, complaint):
    path = tmp_path / "chats.jsonl"
    good = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError, match=f"chats.jsonl:{complaint}"):
        ConversationFileBuilder(path=str(path), batch_size=1)(PLAIN)


def test_missing_and_empty_files(tmp_path):
    write(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match="no such file; did you mean .*train.jsonl"):
        ConversationFileBuilder(path=str(tmp_path / "trian.jsonl"))(PLAIN)
    with pytest.raises(DataError, match="no examples"):
        ConversationFileBuilder(path=str(tmp_path / "train.jsonl"))(PLAIN)
    with pytest.raises(ConfigError, match="no {prompt} in it"):
        path = write(tmp_path / "sums.jsonl", *sums(1))
        PromptCompletionFileBuilder(path=path, prompt_template="Q:")(PLAIN)


def test_hugging_face_datasets(tmp_path, monkeypatch, capsys):
    import datasets
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    splits = datasets.DatasetDict()
    splits["train"], splits["test"] = (
        datasets.Dataset.from_list(rows) for rows in (WORD_PROBLEMS[:2], WORD_PROBLEMS[2:])
    )
    splits.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl", *WORD_PROBLEMS[:2])
    write(tmp_path / "files" / "test.jsonl", *WORD_PROBLEMS[2:])
    for name in ("saved", "files"):
        builder = HuggingFaceBuilder(
            name=str(tmp_path / name),
            test_split="test",
            prompt_field="question",
            completion_field="answer",
            batch_size=2,
        )
        train, test = builder(PLAIN)
        assert len(texts(train)) == 2 and test is not None and "Ben walks" in texts(test)[0]
    with pytest.raises(DataError, match="split 'dev', could not be loaded"):
        HuggingFaceBuilder(name=str(tmp_path / "saved"), split="dev")(PLAIN)
    found, _ = HuggingFaceBuilder(name=str(tmp_path / "saved"), batch_size=2)(PLAIN)
    assert texts(found) == texts(train)  # by the fields
    assert "saved: read as question and answer (question, answer)" in capsys.readouterr().out
    for field, complaint in (("messages", "the fields .* are of no known form"), ("turns", "no field 'turns'")):
        datasets.Dataset.from_list([{"first": "a"}]).to_parquet(str(tmp_path / "other.parquet"))
        with pytest.raises(DataError, match=rf"other\.parquet\[train\]:0: {complaint}"):
            HuggingFaceBuilder(name=str(tmp_path / "other.parquet"), messages_field=field)(PLAIN)


@pytest.mark.parametrize("file", ["dataset_dict.json", *(f"train/{name}" for name in SAVED_FILES)])
def test_a_damaged_file_of_a_saved_hugging_face_set_is_one_line(tmp_path: Path, file: str):
    import datasets

    splits = datasets.DatasetDict()
    splits["train"] = datasets.Dataset.from_list(WORD_PROBLEMS[:2])
    splits.save_to_disk(str(tmp_path / "saved"))
    path = tmp_path / "saved" / file
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) * 2 // 3], bytes(range(256)) * 40, b"[1, 2]"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"saved', split 'train', could not be loaded: .") as error:
            HuggingFaceBuilder(name=str(tmp_path / "saved"), prompt_field="question", completion_field="answer")(PLAIN)
        assert "\n" not in str(error.value)


def test_mixture_follows_its_weights_everywhere_in_the_epoch():
    mixture = MixtureDataset([numbered(30), numbered(10, first=100)], weights=[1.0, 1.0], batch_size=6)
    batches = [numbers(mixture.get_batch(i)) for i in range(len(mixture))]
    assert [sum(number >= 100 for number in batch) for batch in batches] == [3] * 10
    assert set(sum(batches, [])) == {*range(30), *range(100, 110)}
    second_source = [number for number in sum(batches, []) if number >= 100]
    assert sorted(second_source[:10]) == sorted(second_source[10:20]) and second_source[:10] != second_source[10:20]
    by_size = MixtureDataset([numbered(30), numbered(10, first=100)], weights=[30, 10], batch_size=8)
    assert sorted(sum((numbers(by_size.get_batch(i)) for i in range(5)), [])) == [*range(30), *range(100, 110)]


def test_a_mixture_has_all_examples_of_a_data_set_of_the_users():
    class Own(ListDataset[Datum]):
        """Makes batches of its own, for all the mixture knows."""

    @chz.chz
    class OwnBuilder(SupervisedDatasetBuilder):
        def __call__(self, renderer):
            return Own(numbered(5), self.batch_size), None

    mixture, _ = MixtureBuilder(builders=[OwnBuilder(), OwnBuilder()], batch_size=2)(PLAIN)
    drawn = [number for i in range(len(mixture)) for number in numbers(mixture.get_batch(i))]
    assert sorted(drawn) == sorted([*range(5)] * 2)


def test_mixture_is_stateless_and_its_settings_hold_for_all(tmp_path):
    parts: list[SupervisedDatasetBuilder] = [
        PromptCompletionFileBuilder(path=write(tmp_path / "a.jsonl", *sums(9)), test_size=2),
        PromptCompletionFileBuilder(path=write(tmp_path / "b.jsonl", *sums(40)[20:])),
    ]
    train, test = MixtureBuilder(builders=parts, weights=[0.5, 0.5], batch_size=4, reduction="sum")(PLAIN)
    assert test is not None and len(texts(test)) == 2
    resumed, _ = MixtureBuilder(builders=parts, weights=[0.5, 0.5], batch_size=4, reduction="sum")(PLAIN)
    for dataset in (train, resumed):
        dataset.set_epoch(3)
    assert [text_of(d) for d in resumed.get_batch(7)] == [text_of(d) for d in train.get_batch(7)]
    assert train.get_batch(0)[0].loss_fn_inputs["weights"].to_numpy().max() == 1.0
    with pytest.raises(ConfigError, match="builders.0.max_length=7: set max_length on the mixture"):
        MixtureBuilder(builders=[PromptCompletionFileBuilder(path="a", max_length=7)])(PLAIN)
    with pytest.raises(ConfigError, match="one weight for each"):
        MixtureBuilder(builders=parts, weights=[1.0])(PLAIN)
    with pytest.raises(ConfigError, match="above 0"):
        MixtureBuilder(builders=parts, weights=[1.0, 0.0])(PLAIN)


def test_builders_are_reachable_from_the_command_line():
    one = "supervised.data:PromptCompletionFileBuilder"
    argv = [f"builders.0={one}", "builders.0.path=a", f"builders.1={one}", "builders.1.path=b", "weights=1,3"]
    mixture = parse(MixtureBuilder, argv)
    assert [part.path for part in mixture.builders] == ["a", "b"] and mixture.weights == [1.0, 3.0]  # type: ignore[attr-defined]


def test_viz_shows_a_star_graph_file_or_says_what_to_set(tmp_path, capsys):
    """`tiny` has a token for each digit and none for 10: it reads graphs over up to ten nodes."""
    lines = ["1,2|2,3|1,4|4,5/1,3=1,2,3", "0,2|2,3|0,4|4,5/0,5=0,4,5"]
    (tmp_path / "graph_2_3_sample_2.txt").write_text("\n".join(lines) + "\n")
    graphs = StarGraphExamplesBuilder(
        path=str(tmp_path / "graph_2_3_sample_2.txt"), path_length=3, num_nodes=6, num_test=0
    )
    viz_sft_dataset.main(viz_sft_dataset.Config(dataset=graphs))
    shown = capsys.readouterr().out
    assert all(line in shown for line in lines) and "10 of 50 tokens (20%) of these 2 examples carry loss" in shown
    with pytest.raises(ModelError, match="writes '10' in 2 tokens.* Give the num_nodes of the graphs"):
        viz_sft_dataset.main(viz_sft_dataset.Config(dataset=chz.replace(graphs, num_nodes=50)))


def test_viz_colours_by_weight_and_runs_as_a_file_from_anywhere(tmp_path):
    datum = conversation_to_datum([{"role": "user", "content": "2+é="}, {"role": "assistant", "content": "5"}], PLAIN)
    text = colored_example(datum, TOKENIZER)
    assert text.plain == "2+é=5<|endoftext|>"
    assert [(text.plain[span.start : span.end], span.style) for span in text.spans] == [
        ("2+é=", "dim"),
        ("5<|endoftext|>", "bold green"),
    ]
    script = viz_sft_dataset.__file__
    options = [f"dataset.path={write(tmp_path / 'sums.jsonl', *sums(4))}", "dataset.batch_size=128", "num_examples=3"]
    command = [script, "dataset=prompt_completion", "renderer_name=plain", *options]
    shown = commands.run(*command, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "6 of 18 tokens (33%) of these 3 examples carry loss" in shown.stdout
