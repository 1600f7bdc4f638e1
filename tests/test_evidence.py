"""`make evidence`: a row is taken once, again when its code changes, and written into the pages."""

import importlib
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import chz
import pytest

from benchmarks.evidence import ROWS, Evidence
from benchmarks.evidence_pictures import PICTURES, Folders, Picture
from benchmarks.evidence_row import RESUME, Listed, Metric, Printed, Reached, Result, Row
from benchmarks.report import over, write_report
from posttrain.backend.errors import ConfigError

SCRIPT = """
import json, pathlib, sys
seed, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
folder.mkdir()
if pathlib.Path("break").exists() and seed == 1:
    raise SystemExit(3)
print(f"step {seed}: loss 2.5\\nstep 9: loss 5e-1 nats")
(folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "x": seed + i}) + "\\n" for i in range(3)))
"""


def git(root: Path, *arguments: str) -> None:
    name = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", *name, *arguments], cwd=root, check=True, capture_output=True)


@pytest.fixture
def evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    monkeypatch.setattr("benchmarks.evidence.wait_until_quiet", lambda: 0.0)
    root = tmp_path / "repository"
    root.mkdir()
    (root / "script.py").write_text(SCRIPT)
    (root / "page.md").write_text("Before.\n\n<!-- evidence: climb -->\nold\n<!-- end of evidence -->\n\nAfter.\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    metrics = {"start": Metric("x", "first", "run"), "end": Metric("x", "last", "run")}
    row = Row("climb", "script.py {seed} {folder}/run", ("script.py", "code"), metrics)
    return Evidence([row], root, root / "records", tmp_path / "runs")


def seeds(evidence: Evidence) -> dict[str, dict]:
    return json.loads((evidence.records / "climb.json").read_text())["seeds"]


# Trap: a table that is written anew, and a sentence beside it that still has the old figure.
def test_a_row_is_taken_once_and_again_when_its_code_changes(
    evidence: Evidence, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = evidence.rows
    assert evidence.state(row) == "missing: seeds 0, 1, 2"
    (evidence.root / "break").touch()
    with pytest.raises(ConfigError, match="climb, seed 1: ended with 3"):
        evidence.run(row)
    assert list(seeds(evidence)) == ["0"]
    (evidence.root / "break").unlink()
    (evidence.runs / "climb" / "1" / "run").rmdir()
    first = seeds(evidence)["0"]
    evidence.run(row)
    assert seeds(evidence)["0"] == first
    assert [run["figures"]["end"] for run in seeds(evidence).values()] == [2, 3, 4]
    assert all({"commit", "date", "device", "versions", "seconds", "load before"} <= run.keys() for run in [first])

    (evidence.root / "code").mkdir()
    for file in ("unrelated.py", "code/page.md", "code/picture.png"):
        (evidence.root / file).touch()
    git(evidence.root, "add", "unrelated.py", "code")
    git(evidence.root, "commit", "-qm", "unrelated")
    assert evidence.state(row) == "current"
    (evidence.root / "script.py").write_text(SCRIPT.replace("seed + i", "seed - i"))
    assert evidence.state(row).startswith("stale: script.py")
    git(evidence.root, "commit", "-qam", "another figure")
    assert evidence.state(row).startswith("stale: script.py")
    commit = evidence.git("rev-parse", "HEAD").stdout[:7]
    (evidence.records / "no_effect.json").write_text(json.dumps({commit: "a comment"}))
    assert evidence.state(row) == "current"
    for name, state in (("another", "current"), ("climb", "stale: script.py")):
        (evidence.records / "no_effect.json").write_text(json.dumps({commit: {"but for": [name], "seen": "run anew"}}))
        assert evidence.state(row).startswith(state)
    (evidence.records / "no_effect.json").unlink()
    assert ", now " not in capsys.readouterr().out
    evidence.run(row)
    assert [run["figures"]["end"] for run in seeds(evidence).values()] == [-2, -1, 0]
    moved = [line.partition(": see")[0] for line in capsys.readouterr().out.splitlines() if ", now " in line]
    assert moved == [f"--- climb, seed {seed}: end: {2 + seed}, now {seed - 2}" for seed in row.seeds]
    assert evidence.state(row) == "current"


def test_other_numbers_of_a_run_are_read_without_running_it_again(evidence: Evidence) -> None:
    (row,) = evidence.rows
    evidence.run(row)
    begun = seeds(evidence)["0"]["date"]
    for seed in row.seeds:
        (evidence.runs / f"climb/{seed}/run/results.json").write_text(json.dumps({"x": {1: 2.5}.get(seed, 0.5)}))
    numbers = {
        "mean of two": Metric("x", "last", "run", over=2),
        "reached": Reached("x", folder="run", level=2.0),
        "reached at a sum of": Reached("x", folder="run", level=2.0, total=("x",)),
        "never": Reached("x", folder="run", level=9.0),
        "result": Result("x"),
    }
    evidence.run(replace(row, metrics=numbers))
    runs = seeds(evidence)
    assert [run["figures"] for run in runs.values()] == [
        {"mean of two": 1.5, "reached": 2.0, "reached at a sum of": 1.0, "never": None, "result": 0.5},
        {"mean of two": 2.5, "reached": 1.0, "reached at a sum of": 1.0, "never": None, "result": 2.5},
        {"mean of two": 3.5, "reached": 0.0, "reached at a sum of": 0.0, "never": None, "result": 0.5},
    ]
    assert runs["0"]["date"] == begun
    table = evidence.table(["climb"])
    assert "| never | not reached |  |  | 0 of 3 |" in table
    assert (
        "| mean of two | 2.5 | 2.5 | 1.5 to 3.5 | 3 |" in table
    )  # t of 2 degrees of freedom, 4.30, over the root of 3


# Trap: a page whose text speaks of figures that no record has.
def test_a_row_with_a_new_figure_is_incomplete_and_is_run_again_without_its_folder(evidence: Evidence) -> None:
    (row,) = evidence.rows
    evidence.run(row)
    evidence.rows = [more := replace(row, metrics={**row.metrics, "largest": Metric("x", "max", "run")})]
    assert evidence.state(more) == "incomplete: no figure 'largest'"
    assert "; incomplete: no figure 'largest'." in evidence.table(["climb"])
    shutil.rmtree(evidence.runs)
    evidence.run(more)
    assert [run["figures"]["largest"] for run in seeds(evidence).values()] == [2, 3, 4]
    assert evidence.state(more) == "current"


def test_a_run_of_other_code_or_another_command_is_not_resumed(evidence: Evidence) -> None:
    (row,) = evidence.rows
    (evidence.root / "break").touch()
    with pytest.raises(ConfigError, match="climb, seed 1: ended with 3"):
        evidence.run(row)
    (evidence.root / "break").unlink()
    (evidence.root / "script.py").write_text(SCRIPT.replace("seed + i", "seed - i"))
    git(evidence.root, "commit", "-qam", "another figure")
    evidence.run(row)  # seed 1 left its folder, which the script makes
    assert [run["figures"]["end"] for run in seeds(evidence).values()] == [-2, -1, 0]
    evidence.run(replace(row, command=row.command + " more"))
    assert json.loads((evidence.records / "climb.json").read_text())["command"].endswith(" more")


def test_a_picture_is_copied_when_it_is_made(evidence: Evidence) -> None:
    row = replace(evidence.rows[0], picture="run/metrics.jsonl picture")
    evidence.run(row)
    assert '"x": 4' in (evidence.root / "picture").read_text()  # of the last seed
    shutil.rmtree(evidence.runs)
    evidence.run(row)  # as in a new checkout, which has the records and no runs


def test_a_picture_of_several_seeds_is_drawn_when_all_have_run(evidence: Evidence) -> None:
    shown: list[list[str]] = []

    def draw(folders: Folders, out: Path) -> None:
        shown.append([folder.name for folder in folders["climbs"]])
        if len(shown) == 1:
            raise KeyboardInterrupt

    picture, row = Picture("picture", {"climbs": "climb/{seed}/run"}, draw), evidence.rows[0]
    assert evidence.run(replace(row, seeds=row.seeds[:1]), [picture]) == []
    with pytest.raises(KeyboardInterrupt):
        evidence.run(row, [picture])
    shutil.rmtree(evidence.runs / "climb" / "2" / "run")
    assert evidence.run(row, [picture]) == [evidence.root / "picture"]
    assert evidence.run(row, [picture]) == []
    assert shown == [["run"] * len(row.seeds)] * 2
    assert evidence.draw([picture], ["another"]) == []


# Trap: a row whose second start asks what to do with the folder of the first, and has no terminal.
def test_a_killed_row_is_told_to_go_on_where_its_command_would_ask(evidence: Evidence) -> None:
    (evidence.root / "script.py").write_text("import sys\nprint(sys.argv[2:])\nraise SystemExit(len(sys.argv) == 2)\n")
    git(evidence.root, "commit", "-qam", "another")
    row = Row("asks", "script.py {seed}", ("script.py",), {}, seeds=(0,), asks=True)
    with pytest.raises(ConfigError, match="ended with 1"):
        evidence.run(row)
    evidence.run(row)
    assert (evidence.runs / "asks/0/output.txt").read_text() == f"[]\n['{RESUME}']\n"


def test_rows_of_commands_that_ask_say_so() -> None:
    for row in ROWS:
        script = row.command.split()[row.command.startswith("-m")]
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        fields = chz.chz_fields(module.Config) if hasattr(module, "Config") else {}
        option = fields.get("behavior_if_log_dir_exists")
        asks = option is not None and option._default != "resume" and RESUME not in row.command
        assert row.asks is asks, row.name


def test_tables_are_written_between_markers(evidence: Evidence) -> None:
    page = evidence.root / "page.md"
    evidence.write_pages()
    assert "| climb | not taken yet | | | |" in page.read_text()
    evidence.run(evidence.rows[0])
    assert evidence.write_pages() == [page]
    text = page.read_text()
    assert text.startswith("Before.\n\n<!-- evidence: climb -->\n") and text.endswith(
        "\n<!-- end of evidence -->\n\nAfter.\n"
    )
    assert "| start | 1 | 2.5 | 0 to 2 | 3 |\n| end | 3 | 2.5 | 2 to 4 | 3 |\n" in text and "old" not in text
    assert evidence.write_pages() == []
    page.write_text(text.replace("evidence: climb", "evidence: clim"))
    with pytest.raises(ConfigError, match="no row is called clim"):
        evidence.write_pages()


def test_figures_of_lines_and_columns_are_a_table_of_their_own(evidence: Evidence) -> None:
    (row,) = evidence.rows
    cells = {"GRPO | start": row.metrics["start"], "GRPO | end": row.metrics["end"], "SFT | end": row.metrics["end"]}
    evidence.rows = [replace(row, metrics=cells | {"SFT on answers | loss": Printed("loss")})]
    evidence.run(evidence.rows[0])
    head = "| mean (smallest to largest) | start | end |\n| --- | --- | --- |\n"
    lines = "| GRPO | 1 (0 to 2) | 3 (2 to 4) |\n| SFT |  | 3 (2 to 4) |\n\n"
    other = "| mean (smallest to largest) | loss |\n| --- | --- |\n| SFT on answers | 0.5 (0.5 to 0.5) |\n\n`climb`"
    assert evidence.table(["climb"]).startswith(head + lines + other)


def test_a_time_has_the_range_of_its_rounds(evidence: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.report.RESULTS", evidence.root)
    monkeypatch.setattr("benchmarks.evidence_row.RESULTS", evidence.root)
    write_report("race", {}, {}, 0.0, {"theirs / ours": over([3.0, 8.0, 5.0], [1.0, 2.0, 1.0]), "both": 0.5})
    evidence.rows = [Row("race", "script.py {seed} {folder}/run", ("script.py",), results="race", seeds=(0,))]
    evidence.run(evidence.rows[0])
    table = evidence.table(["race"])
    assert "| `race`: theirs / ours | 4 |  | 3 to 5 | 3 |\n| `race`: both | 0.5 |  |  | 1 |\n" in table


def test_a_time_taken_beside_other_work_says_so(evidence: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.evidence_row.RESULTS", evidence.root)
    monkeypatch.setattr("benchmarks.report.RESULTS", evidence.root)
    write_report("race", {}, {}, 0.0, {"theirs / ours": 2.0})
    ticks = iter([(0.0, 0.0), (1e4, 1.0)] * 2)
    monkeypatch.setattr("benchmarks.evidence._cpu_seconds", lambda: next(ticks))
    row = Row("race", "script.py {seed} {folder}/run", ("script.py",), results="race", seeds=(0,))
    evidence.run(row)
    assert evidence.state(row).startswith("taken beside other work")
    (evidence.records / "race.json").unlink()
    daemons = replace(row, has_daemons=True)  # whose time cannot be told from other programs'
    shutil.rmtree(evidence.runs)
    evidence.run(daemons)
    assert evidence.state(daemons) == "current"


def test_rows_name_code_and_pictures_of_the_repository() -> None:
    root = Path(__file__).parent.parent
    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert not any("|" in label.replace(" | ", "", 1) for label in row.metrics), "a cell of its own in a table"
        assert row.command.format(seed=0, folder="f", data="d") and bool(row.metrics) != bool(row.results)
        words = row.command.split()
        script = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
        for path in (*row.code, script, *row.picture.split()[1:]):
            assert (root / path.removeprefix(":(exclude)")).exists(), f"{row.name}: {path}"
    pictures = {row.picture.split()[1] for row in ROWS if row.picture} | {picture.target for picture in PICTURES}
    listed = subprocess.run(["git", "ls-files", "*.png"], cwd=root, capture_output=True, text=True).stdout.split()
    assert pictures == set(listed) - {"docs/transcript.png"}  # which is a page as a browser shows it
    assert {name for picture in PICTURES for name in picture.rows} <= {row.name for row in ROWS}


def test_a_players_number_is_read_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    players = [{"name": "random", "elo": 0.0}, {"name": "run_000100", "elo": 260.0}]
    (tmp_path / "run" / "results.json").write_text(json.dumps({"players": players}))
    assert Listed("run_000100", "elo").read(tmp_path, 0) == 260
    with pytest.raises(ConfigError, match="no player step 100: random, run_000100"):
        Listed("step 100", "elo").read(tmp_path, 0)
