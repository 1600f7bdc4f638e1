"""The command lines: what a user may write, what comes out, and the one line that a mistake
gets.
"""

import contextlib
import importlib
import re
import subprocess
import sys
import textwrap
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from unittest.mock import patch

import chz
import pytest

from posttrain.backend.errors import ConfigError
from posttrain.tracking.command_line import parse
from posttrain.tracking.option_hints import USUAL_NAMES

if TYPE_CHECKING:
    from fractions import Fraction


class Which(Enum):
    ALL = "all"
    LAST = "last"


@chz.chz
class Task:
    group_size: int = chz.field(default=8, doc="rollouts per group")


@chz.chz
class Sums(Task):
    difficulty: int = chz.field(default=1, doc="digits")
    which: Which = chz.field(default=Which.ALL, doc="what counts")


@chz.chz
class Words(Task):
    path: str = chz.field(doc="folder of the data")
    split: str | None = chz.field(default=None, doc="part of it")


@chz.chz
class Unread(Task):
    share: "Fraction | None" = chz.field(default=None, doc="of the digits")


@chz.chz
class Around(Task):
    inner: Unread | None = chz.field(default=None, doc="the task")


@chz.chz
class Baseline:
    divide_by_std: bool = chz.field(default=False, doc="as in GRPO")


@chz.chz
class Judge:
    def __call__(self) -> int:
        raise NotImplementedError


@chz.chz
class Strict(Judge):
    def __call__(self) -> int:
        return 1


@chz.chz
class Contest(Task):
    judge: Judge = chz.field(doc="who says what is better")


@chz.chz
class Options:
    """Trains something."""

    model_name: str = chz.field(default="tiny", doc="preset, folder or hub name")
    learning_rate: float = chz.field(default=1e-3, doc="of AdamW")
    env: Task = chz.field(default_factory=lambda: Sums(difficulty=3), doc="the task")
    baseline: Baseline | None = chz.field(default=None, doc="what is subtracted")
    loss_fn: Literal["ppo", "cispo"] = chz.field(default="ppo", doc="the loss")
    loss_fn_config: dict[str, float] | None = chz.field(default=None, doc="its settings")

    @chz.validate
    def _check(self):
        if self.learning_rate <= 0:
            raise ValueError("learning_rate must be positive")


SHORT_NAMES = {
    "env": {
        "sums": f"{__name__}:Sums",
        "words": f"{__name__}:Words split=train",
        "*.jsonl": f"{__name__}:Words path={{}}",
    }
}


def read(*argv: str) -> Options:
    return parse(Options, list(argv), SHORT_NAMES)


# Trap: `env.field=value` building the base class instead of the default.
@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], Options()),
        # the default object keeps its class and fields
        (["env.group_size=2"], Options(env=Sums(difficulty=3, group_size=2))),
        (["...group_size=2"], Options(env=Sums(difficulty=3, group_size=2))),
        (["env=sums", "env.which=last"], Options(env=Sums(which=Which.LAST))),
        (["env=words", "env.path=x=y"], Options(env=Words(path="x=y", split="train"))),
        (["env.path=p", "env.split=test", "env=words"], Options(env=Words(path="p", split="test"))),
        (["env=data/a b.jsonl"], Options(env=Words(path="data/a b.jsonl"))),
        ([f"env={__name__}:Words", "env.path=p"], Options(env=Words(path="p"))),
        (["baseline.divide_by_std=true"], Options(baseline=Baseline(divide_by_std=True))),
        (["baseline=None"], Options()),
        ([f"env={__name__}:Contest", f"env.judge={__name__}:Strict"], Options(env=Contest(judge=Strict()))),
        (["loss_fn_config.clip=0.2"], Options(loss_fn_config={"clip": 0.2})),
        (["--learning-rate", "0.5", "--model_name=m:n", "model_name=q"], Options(learning_rate=0.5, model_name="q")),
    ],
)
def test_what_a_user_may_write(argv, expected):
    assert read(*argv) == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["env=summs"], "env=summs: no such name; did you mean sums? known: sums, words, *.jsonl, or module:Class"),
        (["env=no_such_module:X"], "env=no_such_module:X: Could not import module 'no_such_module'"),
        ([f"env={__name__}:Nothing"], "has no attribute 'Nothing'"),
        ([f"env={__name__}:Baseline"], "to be a subtype of"),
        ([f"env={__name__}:Sumz"], f"did you mean {__name__}:Sums?"),
        (["env=my_envs.py"], "in the folder of the file write env=my_envs:CLASS"),
        (["env=my.envs.Sums"], "did you mean my.envs:Sums?"),
        (
            ["dataset=x.jsonl"],
            "unknown option 'dataset'; it is one of supervised/train_cli.py and preference/train_cli.py",
        ),
        (["env=None"], "env=None: no such name"),
        (["env.difficultly=3"], "unknown option 'env.difficultly'; did you mean env.difficulty?"),
        (["difficulty=3"], "unknown option 'difficulty'; did you mean env.difficulty?"),
        (["env=words", "env.path=p", "env.difficulty=3"], "unknown option 'env.difficulty'"),
        (["lerning_rate=3"], "unknown option 'lerning_rate'; did you mean learning_rate?"),
        (["--lr", "3"], "unknown option 'lr'; did you mean learning_rate?"),
        (["model=m"], "unknown option 'model'; did you mean model_name?"),
        (["data=x"], "unknown option 'data'; did you mean env?"),
        ([f"env={__name__}:Contest"], f"env.judge: not given; give env.judge=module:Class (such as {__name__}:Strict)"),
        ([f"env={__name__}:Unread"], "the annotation of Unread.share cannot be read (name 'Fraction' is not defined)"),
        ([f"env={__name__}:Around"], "the annotation of Unread.share cannot be read"),
        (["env=words", "env.path=x", "env.split="], "env.split= is empty: give a value, or env.split=None"),
        (["env=/etc"], "env=/etc: a folder that no short name reads; known: sums"),
        (["...grup_size=3"], "did you mean env.group_size?"),
        (["env.group_size=abc"], "env.group_size=abc: expected int"),
        (["loss_fn=grpo"], "loss_fn=grpo: expected ppo | cispo"),
        (["env.which=first"], "env.which=first: expected all | last"),
        (["learning_rate=0"], "learning_rate must be positive"),
        (["env=words"], "env.path"),
        (["--learning-rate"], "write learning_rate=VALUE"),
        (["env", "sums"], "cannot read 'env'; options are written key=value (--help"),
        (["learning_rate", "=", "3"], "options are written key=value, without spaces around the ="),
        (["config=run.yaml"], "unknown option 'config'; there are no files of options: write them as key=value"),
        (["env='sums'"], "env='sums': no such name; the quotes are part of it: your shell did not take them away; did"),
        (["env=SUMS"], "env=SUMS: no such name; did you mean sums?"),
        (["env.zzzzzzzzzzzzzz=3"], "unknown option 'env.zzzzzzzzzzzzzz'; --help"),
        (["baseline.divide_by_std=yes"], "baseline.divide_by_std=yes: expected true | false"),
    ],
)
def test_a_mistake_gets_one_line(argv, message):
    with pytest.raises(ConfigError) as error:
        read(*argv)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_help_shows_every_option_and_those_of_the_class_asked_for(capsys):
    for argv, shown in ((["--help"], "env.difficulty"), (["env=words", "-h"], "env.path")):
        with pytest.raises(SystemExit) as exit_code:
            read(*argv)
        page = capsys.readouterr().out
        assert exit_code.value.code == 0 and shown in page and "env= takes sums, words, *.jsonl or module:Class" in page
        assert page.startswith("Trains something.") and "ppo | cispo" in page and "baseline.divide_by_std" in page
        assert max(map(len, page.splitlines())) <= 130


def test_commands_answer_before_torch_and_transformers_are_imported() -> None:
    commands = ("rl.train_cli", "supervised.train_cli", "preference.train_cli", "rl.evaluate", "envs.elo")
    commands += ("posttrain.serve.chat", "posttrain.serve.command", "posttrain.tracking.runs")
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    code += "    heavy = {'torch', 'transformers', 'peft', 'vllm', 'matplotlib', 'datasets'} & set(sys.modules)\n"
    code += "    assert not heavy, (name, heavy)"
    done = subprocess.run([sys.executable, "-c", code, *commands], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_command_exits_2_with_one_line_130_on_ctrl_c_and_is_light(tmp_path):
    script = tmp_path / "command.py"
    script.write_text(
        textwrap.dedent("""
        import sys, chz
        from posttrain.backend.errors import DataError
        from posttrain.tracking.command_line import run_command
        import posttrain.tracking.metrics_log, posttrain.tracking.plots, posttrain.tracking.progress
        import posttrain.tracking.run_folder, posttrain.tracking.transcripts

        @chz.chz
        class Config:
            how: str = "well"

        def main(config):
            assert not {"torch", "vllm", "wandb", "matplotlib", "rich"} & set(sys.modules)
            if config.how == "badly":
                raise DataError("a.jsonl:3: no assistant turn")
            if config.how == "stopped":
                raise KeyboardInterrupt

        run_command(main, Config)
    """)
    )

    def run(*argv: str) -> tuple[int, str]:
        root = Path(__file__).parent.parent
        done = subprocess.run(
            [sys.executable, str(script), *argv],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PYTHONPATH": str(root)},
        )
        return done.returncode, done.stderr

    assert run() == (0, "")
    assert run("how=badly") == (2, "error: a.jsonl:3: no assistant turn\n")
    assert run("hwo=x") == (2, "error: unknown option 'hwo'; did you mean how? --help lists the options\n")
    assert run("how=stopped") == (130, "interrupted\n")


COMMANDS = ("rl", "supervised", "preference")


@pytest.mark.parametrize(
    ("command", "option", "hint"),
    [
        ("rl", "kl_penalty_coef", "kl.coef"),
        ("rl", "num_generations", "group_size or env.group_size"),
        ("rl", "max_completion_length", "max_tokens"),
        ("preference", "beta", "method.beta"),
        ("supervised", "max_grad_norm", "grad_clip_norm"),
    ],
)
def test_options_of_other_programs(command: str, option: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with patch("sys.argv", [command, f"{option}=1"]), pytest.raises(SystemExit):
        importlib.import_module(f"{command}.train_cli").main()
    assert f"unknown option {option!r}; did you mean {hint}? " in capsys.readouterr().err


def test_they_are_told_options_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with patch("sys.argv", [command, "--help"]), contextlib.suppress(SystemExit):
            importlib.import_module(f"{command}.train_cli").main()
    written = set(re.findall(r"[\w.]+", capsys.readouterr().out))
    assert {name for names in USUAL_NAMES.values() for name in names} - written == {"num_steps"}  # of recipes
