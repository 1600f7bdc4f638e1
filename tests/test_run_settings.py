"""Results carry the settings that made them: asked for with others they are refused, made anew or
let through, never passed off as another's.
"""

# Trap: a result reported as that of other settings; a resume with others.

import asyncio
import json
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import chz
import numpy as np
import pytest

from envs.arithmetic import ArithmeticBuilder, ArithmeticExamplesBuilder
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.run_folder import open_run_folder
from posttrain.tracking.settings import changes, changes_text, config_to_json, write_settings
from posttrain.tracking.stages import Stage, run_stages
from recipes import demo, warm_start
from recipes.algorithms import train as algorithms
from recipes.latro import train as latro
from recipes.latro.toy import ToyBuilder
from recipes.rlhf import train as rlhf
from recipes.star_graph.model import make_model
from supervised import train
from tests import commands
from tests.conftest import ROOT


@chz.chz
class Task:
    batch_size: int = 8
    group_size: int = 4


@chz.chz
class RunConfig:
    model_name: str = "tiny"
    env: Task = Task()
    learning_rate: float = 1e-3
    seed: int = 0
    max_steps: int | None = 10
    loss_fn_config: dict | None = None
    eval_every: int = 20
    log_path: str = "runs"
    backend: BackendConfig = BackendConfig()


NAMED = [
    ({"learning_rate": 1e-4}, "learning_rate=0.001 (now 0.0001)"),
    (
        {"seed": 1, "env": Task(batch_size=16, group_size=2)},
        "env.batch_size=8 (now 16), env.group_size=4 (now 2), seed=0 (now 1)",
    ),
    ({"max_steps": 9}, "max_steps=10 (now 9)"),
    ({"loss_fn_config": {"clip": 0.1}}, "loss_fn_config.clip=None (now 0.1)"),
    ({"backend": BackendConfig(max_length=64)}, "backend.max_length=None (now 64)"),
]
FREE = [
    {"max_steps": 11},
    {"max_steps": None},
    {"eval_every": 0, "log_path": "elsewhere"},
    {"backend": BackendConfig(micro_batch_tokens=99)},
]


@pytest.mark.parametrize(("changed", "names"), NAMED, ids=[names.split("=")[0] for _, names in NAMED])
def test_a_resume_with_other_settings_names_them(
    changed: dict[str, Any], names: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    open_run_folder(tmp_path / "run", "raise", RunConfig())
    before = (tmp_path / "run" / "config.json").read_text()
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with pytest.raises(ConfigError) as refused:
        open_run_folder(tmp_path / "run", "resume", RunConfig(**changed))
    assert names in str(refused.value) and "behavior_if_log_dir_exists=resume_changed" in str(refused.value)
    assert (tmp_path / "run" / "config.json").read_text() == before
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "q" if names in question else pytest.fail(question))
    with pytest.raises(ConfigError):
        open_run_folder(tmp_path / "run", "resume", RunConfig(**changed))
    monkeypatch.setattr("builtins.input", lambda question: "c")
    assert open_run_folder(tmp_path / "run", "resume", RunConfig(**changed)).resumed
    assert json.loads((tmp_path / "run" / "config_changes.jsonl").read_text())["changes"].keys() == {
        name.split("=")[0] for name in names.split(", ")
    }
    monkeypatch.setattr("builtins.input", pytest.fail)
    # and back again
    assert open_run_folder(tmp_path / "run", "resume_changed", RunConfig()).resumed
    assert "continues with changed settings" in capsys.readouterr().out


@pytest.mark.parametrize("changed", FREE, ids=[" ".join(one) for one in FREE])
def test_what_does_not_change_a_step_may_change_on_resume(changed: dict[str, Any], tmp_path: Path) -> None:
    open_run_folder(tmp_path / "run", "raise", RunConfig())
    assert open_run_folder(tmp_path / "run", "resume", RunConfig(**changed)).resumed
    assert not (tmp_path / "run" / "config_changes.jsonl").exists()


def test_options_that_a_newer_version_added_count_as_their_defaults(tmp_path: Path) -> None:
    """Those of nested objects, too, and whole objects; in the record of a stage as in a run's."""
    open_run_folder(tmp_path / "run", "raise", RunConfig())
    stages = [Stage("data", tmp_path / "data", RunConfig(), (tmp_path / "data").touch)]
    tasks = {"run": RunConfig(), "tasks": [Task()]}
    stages.append(Stage("model", tmp_path / "model", tasks, (tmp_path / "model").touch, stages[:1]))
    asyncio.run(run_stages(stages))
    run, record = tmp_path / "run" / "config.json", stages[1].record
    saved, made_with = json.loads(run.read_text()), json.loads(record.read_text())
    for config in (saved, made_with["data"], made_with["model"]["run"]):
        del config["seed"], config["backend"]["moments"], config["env"]
    del made_with["model"]["tasks"][0]["group_size"]
    run.write_text(json.dumps(saved))
    record.write_text(json.dumps(made_with))
    assert open_run_folder(tmp_path / "run", "resume", RunConfig()).resumed and stages[1].is_finished()
    other = {"backend": BackendConfig(moments="8bit"), "env": Task(batch_size=16)}
    run.write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match=r"backend.moments=float32 \(now 8bit\), env.batch_size=8 \(now 16\)"):
        open_run_folder(tmp_path / "run", "resume", RunConfig(**other))
    tasks |= {"run": RunConfig(**other)}
    changed = Stage("model", tmp_path / "model", tasks, (tmp_path / "model").touch, stages[:1])
    with pytest.raises(ConfigError, match=r"backend.moments=float32 \(now 8bit\)"):
        changed.is_finished()


def functions(limit: int) -> dict[str, Any]:
    """As a process makes them: each time at other addresses."""

    def short(text: str, limit: int) -> bool:
        return len(text) < limit

    def other() -> None: ...

    class Shown:
        def __repr__(self) -> str:
            return f"<Shown of {short!r}>"

    return {"partial": partial(short, limit=limit), "set": {short, other, partial(other)}, "shown": Shown()}


def test_functions_are_written_without_their_addresses() -> None:
    first, again, other = functions(5), functions(5), functions(6)  # all alive: no address is used twice
    saved = config_to_json(first)
    assert not changes(saved, config_to_json(again))
    assert changes_text(changes(saved, config_to_json(other))) == "partial.keywords.limit=5 (now 6)"
    assert json.loads(json.dumps(saved))["partial"]["function"].endswith(":functions.<locals>.short")


def test_numbers_of_numpy_are_the_numbers_that_they_are() -> None:
    saved = config_to_json({"max_steps": np.int64(3), "learning_rate": np.float32(0.5)})
    assert saved == json.loads(json.dumps(saved)) == {"max_steps": 3, "learning_rate": 0.5}


# Trap: sixty steps are asked for, and the run ends after the 42 that an epoch has.
def test_data_that_end_before_max_steps_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    config = train.Config(dataset=ArithmeticExamplesBuilder(), max_steps=60)
    assert config.num_steps(42) == 42
    assert "max_steps=60: the data have 42 batches in num_epochs=1" in (said := capsys.readouterr().out)
    assert "num_epochs=2 has enough" in said
    assert [config.num_steps(60), config.num_steps(0), chz.replace(config, max_steps=None).num_steps(7)] == [60, 0, 7]
    assert not capsys.readouterr().out


def test_a_long_list_of_changes_is_cut() -> None:
    found = changes({str(n): n for n in range(9)}, {str(n): -n for n in range(9)})
    assert len(found) == 8 and changes_text(found).endswith(" and 2 more")


TORCH = BackendConfig(engine="torch")


def test_algorithms_of_another_seed_are_not_those_of_the_first(tmp_path: Path, monkeypatch, capsys) -> None:
    for kind in (ArithmeticExamplesBuilder, ArithmeticBuilder):
        small = partial(chz.replace, batch_size=2, num_test=8)
        monkeypatch.setattr(algorithms, kind.__name__, lambda kind=kind, small=small, **options: small(kind(**options)))
    first = algorithms.Config(algorithms="grpo", num_steps=1, warm_start_nll=9.0, log_path=str(tmp_path), backend=TORCH)
    asyncio.run(algorithms.main(first))
    saved = (tmp_path / "grpo" / "config.json").read_bytes()
    line = [line for line in capsys.readouterr().out.splitlines() if "held-out accuracy" in line]
    with pytest.raises(ConfigError, match=r"grpo was made with .*warm_start.seed=0 \(now 1\)"):
        asyncio.run(algorithms.main(chz.replace(first, seed=1)))
    assert (tmp_path / "grpo" / "config.json").read_bytes() == saved
    asyncio.run(algorithms.main(first))  # the same command again: nothing is done twice, the same is reported
    printed = capsys.readouterr().out
    assert "grpo is there" in printed and [text for text in printed.splitlines() if "held-out accuracy" in text] == line


def test_a_demo_that_begins_anew_keeps_nothing_of_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in its warm start and resumed, it found the last demo at its end, and showed that one's result."""

    async def stop(stages: list) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(warm_start, "run_stages", stop)
    config = demo.Config(log_path=str(tmp_path / "demo"))
    open_run_folder(config.log_path, "delete", config)
    for behavior, left in (("resume", True), ("delete", False)):
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(demo.main(chz.replace(config, behavior_if_log_dir_exists=behavior)))
        assert (tmp_path / "demo" / "metrics.jsonl").exists() == left


def test_stages_of_rlhf_depend_on_those_before_them(tmp_path: Path) -> None:
    config = rlhf.Config(log_path=str(tmp_path))
    for stage in rlhf.stages_of(config)[:4]:
        assert not stage.is_finished()
        stage.result.parent.mkdir(parents=True, exist_ok=True)
        write_settings(stage.record, stage.made_with())
        stage.result.write_text("")
        assert stage.is_finished()
    sft, comparisons, _, rl, *_ = rlhf.stages_of(chz.replace(config, kl_coef=0.1))
    assert sft.is_finished() and comparisons.is_finished()
    with pytest.raises(ConfigError, match=r"rl was made with rl.kl.coef=0.5 \(now 0.1\): delete it to make it anew"):
        rl.is_finished()
    for setting, name in (({"sft_steps": 7}, "sft.dataset.n_batches=200 .now 7"), ({"seed": 1}, "sft.seed=0 .now 1")):
        for stage in rlhf.stages_of(chz.replace(config, **setting))[:4]:
            with pytest.raises(ConfigError, match=name):
                stage.is_finished()


def test_latro_begins_with_the_warm_start_it_asks_for(tmp_path: Path) -> None:
    task = ToyBuilder(num_train=32, num_validation=4)
    config = latro.prepared(
        latro.Config(
            dataset=task,
            warm_start_updates=2,
            num_evaluations=1,
            log_path=str(tmp_path),
            behavior_if_log_dir_exists="resume",
        )
    )
    (stage,) = latro.beginning(config)
    asyncio.run(run_stages([stage]))
    assert (stage.result / "model.safetensors").exists()
    # not a setting of the warm start
    (other,) = latro.beginning(chz.replace(config, learning_rate=1.0))
    assert other.is_finished() and latro.begin_path(config, [other]) == str(stage.result)
    with pytest.raises(ConfigError, match=r"seed=0 \(now 5\)"):
        asyncio.run(run_stages(latro.beginning(chz.replace(config, warm_start_seed=5))))
    with pytest.raises(ConfigError, match=r"made with .*warm_start.max_steps=2 \(now 3\)"):
        asyncio.run(latro.main(chz.replace(config, method="sft", warm_start_updates=3)))


def test_star_graph_models_are_those_asked_for(tmp_path: Path) -> None:
    from envs.star_graph import StarGraph

    sizes = {"num_layers": 1, "num_heads": 2, "hidden": 16}
    asyncio.run(make_model(StarGraph(2, 3, 8), tmp_path / "model", 0, **sizes))
    asyncio.run(make_model(StarGraph(2, 3, 8), tmp_path / "model", 0, **sizes))
    with pytest.raises(ConfigError, match=r"was made with model.seed=0 \(now 1\)"):
        asyncio.run(make_model(StarGraph(2, 3, 8), tmp_path / "model", 1, **sizes))


@pytest.mark.parametrize("eval_every", [0, 2])
def test_a_finished_run_that_is_resumed_says_so_and_changes_nothing(eval_every: int, tmp_path: Path, capsys) -> None:
    config = train.Config(
        dataset=ArithmeticExamplesBuilder(n_batches=3, batch_size=4, num_test=4),
        renderer_name="plain",
        model_name="micro",
        eval_every=eval_every,
        log_path=str(tmp_path),
        behavior_if_log_dir_exists="resume",
    )
    metrics = asyncio.run(train.main(config))
    files = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "checkpoints.jsonl", "config.json")}
    capsys.readouterr()
    again = asyncio.run(train.main(config))
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
    assert again == metrics
    printed = capsys.readouterr().out
    assert (
        "has finished at step 3: there is nothing to train" in printed
        and "train_mean_nll" in printed
        and "more in" in printed
    )
    # the end is no end any more
    longer = asyncio.run(train.main(chz.replace(config, num_epochs=2)))
    assert (
        "with lr_schedule=linear to step 6 its learning rate rises again, from 3.33e-05 to 6.67e-05"
        in capsys.readouterr().out
    )
    assert [record["step"] for record in read_metrics(tmp_path)] == list(
        range(6 + bool(eval_every))
    ) and longer != metrics


def test_the_code_diff_holds_the_commit_and_the_users_own_modules(tmp_path: Path) -> None:
    """A module outside the repository that the configuration names, and what it imports from its
    own folder. The repository's own files are known by the commit.
    """
    (tmp_path / "my_parts.py").write_text("SIZE = 7  # a part\n")
    (tmp_path / "my_task.py").write_text(
        "import chz\nfrom my_parts import SIZE\n\n\n@chz.chz\nclass MyTask:\n    size: int = SIZE  # my task\n"
    )
    script = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import my_task
        from envs.arithmetic import ArithmeticBuilder
        from posttrain.tracking.run_folder import open_run_folder
        open_run_folder({str(tmp_path / "run")!r}, "raise", {{"env": my_task.MyTask(), "other": ArithmeticBuilder()}})
    """)
    assert commands.run("-c", script).returncode == 0
    text = (tmp_path / "run" / "code.diff").read_text()
    assert (
        f"+++ {tmp_path}/my_task.py" in text
        and "+    size: int = SIZE  # my task" in text
        and "+SIZE = 7  # a part" in text
    )
    files = [line for line in text.splitlines() if line.startswith("+++ ")]  # git's own are "+++ b/..."
    assert not any("/chz/" in file or file.startswith(f"+++ {ROOT}/") for file in files)
    assert text.startswith("commit ") or not (ROOT / ".git").exists()
