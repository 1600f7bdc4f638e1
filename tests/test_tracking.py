"""The run folder, its metrics, checkpoints, transcripts and plots: what survives a kill, what is
refused, what a person sees.
"""

import asyncio
import json
import math
import sys
import time
from enum import Enum
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import chz
import pytest

from posttrain.backend.errors import CheckpointError, ConfigError, DataError
from posttrain.tracking.figures import Curve, Panel, at_multiples, curves_by_label, draw_panels, mean_curve, over_total
from posttrain.tracking.metrics_log import MetricsLog, print_last_metrics, print_metrics_table, read_metrics, timed
from posttrain.tracking.plots import compare_runs, main, plot_run
from posttrain.tracking.progress import TrainingProgress, reported
from posttrain.tracking.run_config import RunConfig as SharedConfig
from posttrain.tracking.run_folder import RunFolder, open_run_folder
from posttrain.tracking.settings import config_to_json
from posttrain.tracking.timeline import Span, Timeline
from posttrain.tracking.transcripts import TranscriptGroup, TranscriptMember, TranscriptTurn, write_transcripts
from recipes.prm.picture import CHOICES, draw
from tests import commands


class Which(Enum):
    ALL = "all"


@chz.chz
class Task:
    size: int = 3


@chz.chz
class HarderTask(Task):
    which: Which = Which.ALL


@chz.chz
class RunConfig:
    model_name: str = "tiny"
    env: Task = Task()
    learning_rate: float = 1e-3
    folder: Path = Path("data")
    betas: tuple[float, ...] = (0.9, math.inf)
    loss: object = math.sqrt


def test_a_configuration_becomes_json_with_the_classes_of_its_parts():
    assert config_to_json(RunConfig(env=HarderTask(size=4))) == {
        "model_name": "tiny",
        "env": {"class": f"{__name__}:HarderTask", "size": 4, "which": "all"},
        "learning_rate": 1e-3,
        "folder": "data",
        "betas": [0.9, "inf"],
        "loss": "math:sqrt",
    }


def test_an_existing_run_is_resumed_deleted_or_refused(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    run = open_run_folder(folder, "raise", RunConfig())
    MetricsLog(run).log({"loss": 1.0}, step=0)
    assert not run.resumed and json.loads(run.config_file.read_text())["model_name"] == "tiny"
    with pytest.raises(ConfigError, match="already holds a run"):
        open_run_folder(folder, "raise", RunConfig())
    with pytest.raises(ConfigError, match="no terminal to ask; add behavior_if_log_dir_exists=resume to continue it"):
        monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
        open_run_folder(folder, "ask", RunConfig())
    assert open_run_folder(folder, "resume", RunConfig()).resumed and len(read_metrics(folder)) == 1
    assert not open_run_folder(folder, "delete", RunConfig()).resumed and read_metrics(folder) == []


def test_a_run_is_not_resumed_as_another_run(tmp_path):
    open_run_folder(tmp_path / "run", "raise", RunConfig())
    with pytest.raises(ConfigError, match="model_name=tiny, not small"):
        open_run_folder(tmp_path / "run", "resume", RunConfig(model_name="small"))
    with pytest.raises(ConfigError, match="env.class=.*:Task, not .*:HarderTask"):
        open_run_folder(tmp_path / "run", "resume", RunConfig(env=HarderTask()))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model_name"] == "tiny"


def test_what_is_no_run_is_never_deleted(tmp_path):
    (tmp_path / "config.json").write_text("{}")  # a Hugging Face model has one too
    with pytest.raises(ConfigError, match="holds no run"):
        open_run_folder(tmp_path, "delete", RunConfig())
    assert (tmp_path / "config.json").exists()
    with pytest.raises(ConfigError, match="is a file"):
        open_run_folder(tmp_path / "config.json", "resume", RunConfig())


def test_a_folder_of_a_run_killed_at_its_start_can_be_resumed(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert open_run_folder(tmp_path / "run", "resume", RunConfig()).resumed


def make_checkpoint(run: RunFolder, step: int, name: str | None = None) -> Path:
    folder = run.checkpoints / (name or f"{step:06d}")
    folder.mkdir(exist_ok=True)
    (folder / "weights").write_text("w")
    run.record_checkpoint(name or f"{step:06d}", step, folder)
    return folder


def test_the_last_checkpoint_is_the_last_whole_one(tmp_path):
    run = open_run_folder(tmp_path / "run", "raise", RunConfig())
    assert run.last_checkpoint() is None
    make_checkpoint(run, 5)
    gone = make_checkpoint(run, 10)
    (gone / "weights").unlink()
    gone.rmdir()
    with run.checkpoints_file.open("a") as file:
        file.write('{"name": "000015", "st')  # killed here
    last = run.last_checkpoint()
    assert last is not None and last.step == 5 and last.path == run.checkpoints / "000005"
    make_checkpoint(run, 20)  # the torn line does not swallow the next record
    assert [record.step for record in run.list_checkpoints()] == [5, 20]
    with pytest.raises(CheckpointError, match="not a folder"):
        run.record_checkpoint("x", 1, tmp_path / "nowhere")


def test_pruning_keeps_the_latest_the_final_and_what_lies_elsewhere(tmp_path):
    run = open_run_folder(tmp_path / "run", "raise", RunConfig())
    outside = tmp_path / "outside"
    outside.mkdir()
    run.record_checkpoint("outside", 0, outside)
    for step, name in ((1, None), (2, "final"), (3, None), (4, None), (5, None)):
        make_checkpoint(run, step, name)
    run.prune_checkpoints(keep=2)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["000004", "000005", "final"] and outside.exists()
    with pytest.raises(ConfigError, match="keep_checkpoints=0"):
        run.prune_checkpoints(keep=0)


# Trap: metrics logged twice, or torn by a kill.
def test_metrics_survive_a_kill_and_a_rewind(tmp_path):
    run = open_run_folder(tmp_path / "run", "raise", RunConfig())
    log = MetricsLog(run)
    for step in range(4):
        log.log({"loss": 0.1 * step, "n": step}, step)
    before = run.metrics_file.read_text()
    log.log({"loss": 9.0}, 4)
    with run.metrics_file.open("a") as file:
        file.write('{"step": 5, "lo')
    assert [record["step"] for record in read_metrics(run.metrics_file)] == [0, 1, 2, 3, 4]
    run.truncate_metrics(4)
    assert run.metrics_file.read_text() == before
    run.metrics_file.write_text('{"step": 0}\nnonsense\n{"step": 1}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl:2: not JSON"):
        read_metrics(tmp_path / "run")


def test_numbers_that_are_not_finite_are_null_and_named(tmp_path):
    run = open_run_folder(tmp_path / "run", "raise", RunConfig())
    MetricsLog(run).log({"a": math.nan, "b": -math.inf, "c": 2}, step=7)
    text = run.metrics_file.read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 7,
        "a": None,
        "b": None,
        "c": 2,
        "non_finite": {"a": "nan", "b": "-inf"},
    }


LOGGERS = {
    "wandb": {"wandb_project": "p"},
    "torch.utils.tensorboard": {"tensorboard": True},
    "trackio": {"trackio_project": "p"},
}


@pytest.mark.parametrize("module", LOGGERS)
def test_a_logger_is_asked_for_only_on_request_and_its_absence_says_what_to_install(module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    run = open_run_folder(tmp_path / "run", "raise", RunConfig())
    MetricsLog(run, SharedConfig()).close()
    extra = module.split(".")[-1]
    with pytest.raises(ConfigError, match=rf"needs {extra}, which is not installed: pip install -e '\.\[{extra}\]'"):
        MetricsLog(run, SharedConfig(**LOGGERS[module]))


def test_trackio_gets_every_metric(tmp_path, monkeypatch):
    calls = []
    trackio = SimpleNamespace(
        init=lambda **settings: calls.append(settings),
        log=lambda metrics, step: calls.append((metrics, step)),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    config = SharedConfig(trackio_project="p", eval_every=7)
    log = MetricsLog(open_run_folder(tmp_path / "run", "raise", config), config)
    log.log({"loss": 0.5}, 3)
    log.close()
    log.close()
    assert calls[0]["project"] == "p" and calls[0]["name"] == "run" and calls[0]["config"]["eval_every"] == 7
    assert calls[1:] == [({"loss": 0.5}, 3), "finish"]


LOGGED = """
import sys
from pathlib import Path
from types import SimpleNamespace
from posttrain.tracking import loggers
from posttrain.tracking.metrics_log import MetricsLog
from posttrain.tracking.run_config import RunConfig
from posttrain.tracking.run_folder import RunFolder
loggers.START_TIMEOUT = int(sys.argv[2])
run = RunFolder(Path(sys.argv[1]))
run.path.mkdir(exist_ok=True)
log = MetricsLog(run, RunConfig(wandb_project="p", tensorboard=True))
for step in range(3):
    log.log({"optim/loss": 0.5 * step}, step)
log.close()
"""


@pytest.mark.slow
def test_wandb_and_tensorboard_write_into_the_run_folder_without_a_network(tmp_path):
    ran = commands.run("-c", LOGGED, tmp_path / "run", "60", env={"WANDB_MODE": "offline"})
    assert ran.returncode == 0, ran.stderr
    (logged,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    (events,) = (tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*")
    for file in (logged, events):
        assert file.read_bytes().count(b"optim/loss") >= 3
    assert (tmp_path / "run/wandb_run_id.txt").read_text().strip() in logged.name
    # a server that is not there: one line, and no wait for ever
    account = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    ran = commands.run("-c", LOGGED, tmp_path / "other", "5", env=account)
    assert ran.returncode == 1 and "ConfigError: wandb_project=p: " in ran.stderr.splitlines()[-1], ran.stderr
    assert "WANDB_MODE=offline" in ran.stderr.splitlines()[-1]


def test_timers_add_up_and_the_table_shows_every_metric(capsys):
    metrics = {"optim/loss": 0.25}
    for _ in range(2):
        with timed(metrics, "sampling"):
            time.sleep(0.01)
    assert metrics["time/sampling"] >= 0.02
    print_metrics_table(metrics, "step 3")
    printed = capsys.readouterr().out
    assert "step 3" in printed and "optim/loss" in printed and "0.2500" in printed and "time/sampling" in printed


def test_progress_without_a_terminal_prints_the_first_and_the_last_step(capsys):
    with TrainingProgress(1000, start=10, description="rl") as progress:
        for step in range(10, 1000):
            progress.update(step, {"reward": 0.5})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("rl  step 11/1000") and lines[1].startswith("rl  step 1000/1000")
    assert "s/step" in lines[1] and "ETA" in lines[1] and "reward 0.5000" in lines[1]


class Balance(HTMLParser):
    """Follows open tags and gathers text."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_transcripts_are_whole_escaped_and_in_both_forms(tmp_path):
    evil = "<script>alert('x')</script> & more\n"
    turn = TranscriptTurn(
        evil, ["<b>", " 4", "\n"], [0.5, -0.25, math.nan], [-0.1, -2.0, 0.0], 1.0, {"ok": 1}, {"gold": "<4>"}
    )
    second = TranscriptTurn("and then?", ["end"], logs={"proof": "long\ntext"}, stop_reason="length")
    failed = TranscriptMember([], 0.0, error="EngineError: <died>")
    groups = [TranscriptGroup([TranscriptMember([turn, second], 1.0, 0.5), failed], ["arith"]), TranscriptGroup([])]
    page = write_transcripts(tmp_path, 12, groups, max_html_groups=1)
    html = page.read_text()
    parsed = Balance(html)
    assert page.name == "000012.html" and parsed.open == ["html", "body"][: len(parsed.open)]
    assert "<script" not in html and evil.strip() in parsed.text and "EngineError: <died>" in parsed.text
    assert 'class="p5" title="logprob -0.1000 advantage 0.5000"' in html and 'class="n3"' in html
    assert "the first 1 groups are shown" in parsed.text and "http" not in html
    lines = [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "000012.jsonl").read_text().splitlines()
    ]
    assert [line["member"] for line in lines] == [0, 1] and lines[0]["turns"][0]["tokens"] == ["<b>", " 4", "\n"]
    assert lines[0]["tags"] == ["arith"] and lines[1]["error"] == "EngineError: <died>"


@pytest.mark.usefixtures("rendered")
def test_runs_are_plotted_alone_and_together(tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        log = MetricsLog(open_run_folder(tmp_path / name, "raise", RunConfig()))
        for step in range(3):
            metrics = {"env/all/correct": step / 3, "optim/loss": math.nan, "time/sampling": 1.0, "time/total": 2.0}
            log.log(metrics | ({"test/env/all/correct": 0.5} if step == 0 else {}), step)
    assert plot_run(tmp_path / "a").read_bytes().startswith(b"\x89PNG")
    out = compare_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "c.png", ["env/all/correct"])
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="keys=optim/nothing: no such metric"):
        compare_runs([tmp_path / "a"], tmp_path / "d.png", ["optim/nothing"])
    monkeypatch.setattr("sys.argv", ["plots", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_code:
        main()
    assert exit_code.value.code == 2 and "no metrics there" in capsys.readouterr().err


def test_a_long_wait_says_what_it_is_waiting_for(capsys) -> None:  # noqa: ANN001
    async def until_it_is_said_twice() -> str:
        said = ""
        while said.count("still giving the sampler new weights after") < 2:
            await asyncio.sleep(0.01)
            said += capsys.readouterr().out
        return "done"

    assert asyncio.run(reported(until_it_is_said_twice(), "giving the sampler new weights", seconds=0.01)) == "done"
    with pytest.raises(ZeroDivisionError):
        asyncio.run(reported(asyncio.to_thread(lambda: 1 / 0), "dividing"))


def test_shares_of_a_timeline_by_hand() -> None:
    timeline = Timeline()
    closed = [Span("sampling", 0, 4), Span("env", 3, 4), Span("env", 3, 5), Span("train", 7, 8)]
    timeline.spans._closed.extend(closed)
    timeline.spans._open.add(Span("sampling", 9))
    assert timeline.shares(0, 10) == pytest.approx(
        {"sampling": 0.5, "env": 0.2, "train": 0.1, "idle": 1 - 0.7, "rollouts_in_flight": 0.8}
    )
    assert timeline.shares(3, 5)["idle"] == 0


def test_the_last_table_shows_eight_metrics_and_says_where_the_others_are(tmp_path, capsys) -> None:
    run = open_run_folder(tmp_path / "run", "raise", RunConfig())
    metrics = {f"optim/{n}": 1.0 for n in range(30)} | {
        "env/all/reward/total": 0.5,
        "test/env/all/correct": 0.25,
        "alarm/gap": 2.0,
    }
    metrics |= dict.fromkeys(
        ("optim/entropy", "optim/grad_norm", "optim/lr", "optim/loss", "learning_rate", "num_tokens"), 0.1
    )
    print_last_metrics(run, metrics)
    printed = capsys.readouterr().out
    assert (
        sum("│" in line for line in printed.splitlines()) == 9 and "alarm/gap" in printed and "optim/12" not in printed
    )
    assert printed.index("test/env/all/correct") < printed.index(" env/all/reward/total") and "0.2500" in printed
    assert "30 more in" in printed.replace("\n", "") and "metrics.jsonl" in printed
    print_metrics_table({}, "nothing")  # and no traceback


def test_pictures_show_no_noise_and_no_panel_twice(tmp_path, monkeypatch) -> None:
    log = MetricsLog(open_run_folder(tmp_path / "run", "raise", RunConfig()))
    for step in range(4):
        noise = {
            "optim/logprob_gap_mean": 2e-7 * step,
            "optim/kl_sample_train_v1": -1e-7 * step,
            "optim/entropy": 2.0 + 1e-9 * step,
            "optim/grad_norm": 1.0 + step,
        }
        log.log({"env/all/correct": step / 4, "env/all/reward/total": step / 4, **noise}, step)
    figures = []
    monkeypatch.setattr("posttrain.tracking.plots.save_figure", lambda figure, path: figures.append(figure) or path)
    plot_run(tmp_path / "run")
    limits = {axis.get_title("left"): axis.get_ylim() for axis in figures[0].axes}
    gap = "|logprob gap| sampler to trainer (nats)"  # and no panel of KLs that are rounding
    assert list(limits) == ["reward = accuracy", gap, "entropy (nats)", "gradient norm"]
    spans = {title: high - low for title, (low, high) in limits.items()}
    assert limits[gap] == pytest.approx((1e-7, 1e-6)) and spans["entropy (nats)"] == pytest.approx(0.1)
    assert 3 < spans["gradient norm"] < 3.5  # what moves is drawn as before


def test_a_curve_of_hundreds_of_steps_is_shown_by_means() -> None:
    values = [math.nan, *[float(step % 10) for step in range(1, 600)]]
    axis = draw_panels([Panel("reward", {"run": [Curve(list(range(600)), values)]})]).axes[0]
    thin, means = axis.get_lines()
    assert len(thin.get_xdata()) == 600 and thin.get_linewidth() < means.get_linewidth()
    assert list(means.get_xdata()[:2]) == [4.5, 14.5] and list(means.get_ydata()) == [5.0, *[4.5] * 59]
    assert axis.get_xlabel() == "step (means of 10)"


def test_curves_of_seeds_are_averaged_at_the_steps_they_share() -> None:
    seeds = [[{"step": step, "test/hop": float(step + seed)} for step in (0, 4, 9 + seed)] for seed in (0, 2)]
    runs = {"a": [[{"step": 0, "hop": None}, *seeds[0]], seeds[1]], "b": [[{"step": 0, "hop": 1.0}]]}
    curves = curves_by_label(runs, "hop", "test/hop")
    assert curves["a"][0] == Curve([0, 4, 9], [0.0, 4.0, 9.0]) and curves["b"] == [Curve([0], [1.0])]
    assert mean_curve(curves["a"]) == Curve([0, 4], [1.0, 5.0])
    figure = draw_panels(
        [Panel("one", {"b": curves["b"]}, levels={"chance": 0.5}), Panel("all", curves)], shared_legend=True
    )
    colors = [{line.get_label(): line.get_color() for line in axis.get_lines()} for axis in figure.axes]
    assert colors[0]["b"] == colors[1]["b"] != colors[1]["a"] and len(figure.axes[1].get_lines()) == 4
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["b", "chance", "a"]


def test_the_timeline_says_what_it_shows(tmp_path, monkeypatch) -> None:
    figures = []
    monkeypatch.setattr("posttrain.tracking.timeline.save_figure", lambda figure, path: figures.append(figure) or path)
    timeline = Timeline()
    began = timeline._began
    timeline.spans._closed.extend([Span("train", began + 45, began + 48), Span("sampling", began + 40, began + 50)])
    timeline.plot(tmp_path / "t.png")
    assert (
        figures[0]._suptitle.get_text().startswith("the last 10 seconds of the run: number of open spans of each kind")
    )
    last = figures[0].axes[-1]
    assert last.get_xlim() == pytest.approx((40, 50)) and last.get_xlabel() == "seconds since the run was started"
    assert all(float(tick).is_integer() for axis in figures[0].axes for tick in axis.get_yticks())


def of_two_processes(began: float) -> Timeline:
    """Ten seconds: a rank trains for 4 and writes for 1; a replica samples for 3, 6 more are open, and
    loads for 0.5 of them; another does nothing."""
    timeline = Timeline()
    timeline.spans.processes |= dict.fromkeys(["rank 0", "replica 0", "replica 1", "sync"])
    timeline.spans._closed.extend(
        [
            Span("sampling", began - 2, began + 1, "replica 0", 50),
            Span("sampling", began + 1, began + 3, "replica 0", 70),
            Span("train", began + 1, began + 5, "rank 0"),
            Span("publish", began + 5, began + 6, "rank 0"),
            Span("publish", began + 5, began + 6.25, "sync"),
            Span("load", began + 6.5, began + 7, "replica 0"),
            Span("load", began + 6.25, began + 8, "sync"),
            Span("train", began + 1, began + 10),
        ]
    )
    timeline.spans._open.add(Span("sampling", began + 4, process="replica 0"))
    return timeline


def test_figures_of_ranks_and_replicas_by_hand() -> None:
    timeline = of_two_processes(100.0)
    assert timeline.metrics(100.0, 110.0) == pytest.approx(
        {
            "time/share/train": 0.9,
            "time/share/idle": 0.1,
            "time/share/rollouts_in_flight": 0.0,
            "processes/rank_0/idle": 0.5,
            "processes/replica_0/idle": 0.1,
            "processes/replica_0/tokens_per_second": 12.0,
            "processes/replica_1/idle": 1.0,
            "processes/replica_1/tokens_per_second": 0.0,
            "time/sync_publish": 1.25,
            "time/sync_load": 1.75,
            "time/sync_pause": 0.5,
        }
    )
    assert timeline.of_processes(100.0, 104.0)["processes/replica_0/tokens_per_second"] == 30.0
    assert not any(name.startswith(("processes", "time/sync")) for name in Timeline().metrics(0, 1))


def test_the_timeline_has_a_row_for_each_rank_and_replica(tmp_path, monkeypatch) -> None:
    figures = []
    monkeypatch.setattr("posttrain.tracking.timeline.save_figure", lambda figure, path: figures.append(figure) or path)
    timeline = of_two_processes(Timeline()._began)
    timeline.plot(tmp_path / "t.png")
    rows = figures[0].axes[-1]
    assert [label.get_text() for label in rows.get_yticklabels()] == ["rank 0", "replica 0", "replica 1"]
    bars = {
        (round(p.vertices[:, 0].min(), 1), round(p.vertices[:, 1].mean()))
        for c in rows.collections
        for p in c.get_paths()
    }
    assert {(1.0, 0), (5.0, 0), (6.5, 1), (4.0, 1)} <= bars and not any(row == 2 for _, row in bars)


@pytest.mark.usefixtures("rendered")
def test_the_picture_of_a_process_reward_model_needs_no_right_chain(tmp_path) -> None:
    MetricsLog(open_run_folder(tmp_path / "prm", "raise", RunConfig())).log({"train_loss": 1.0}, 0)
    results = {name: 0.0 for choice in CHOICES for name in (choice, f"{choice}_se")}
    for aligned in ({}, {0: [0.1] * 29}, {0: [0.1] * 30}):
        assert draw(tmp_path / "prm", results, aligned, tmp_path / "prm.png").stat().st_size > 5000


def test_a_curve_over_tokens_counts_those_before_its_step_and_shares_its_steps_with_other_seeds() -> None:
    records = [
        {"step": 0, "right": 0.1, "sampled": 100},
        {"step": 1, "sampled": 50},
        {"step": 2, "right": 0.3, "sampled": 60, "more": 10},
        {"step": 3, "right": 0.6},
    ]
    curve = over_total(records, "right", "sampled", "more")
    assert curve == Curve([0, 150, 220], [0.1, 0.3, 0.6])
    shared = at_multiples(curve, 75)
    assert shared.steps_K == [0, 75, 150] and shared.values_K == pytest.approx([0.1, 0.2, 0.3])
    assert at_multiples(Curve([], []), 75) == Curve([], [])
