"""Every experiment and benchmark behind a figure of the pages, in turn, each in a process of its own;
then the tables and pictures between markers in the pages are written anew.

    python -m benchmarks.evidence                        # `make evidence`: rows whose code has changed
    python -m benchmarks.evidence only=demo,algorithms
    python -m benchmarks.evidence status=true            # which rows are stale; nothing runs

A killed command goes on where it stopped. The rows are in evidence_recipes.py, evidence_systems.py and
evidence_times.py, the pictures in evidence_pictures.py.
"""

import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import chz

from benchmarks.evidence_pictures import PICTURES, Picture
from benchmarks.evidence_recipes import RECIPES
from benchmarks.evidence_row import OUTPUT, RESUME, Row
from benchmarks.evidence_systems import SYSTEMS
from benchmarks.evidence_times import TIMES
from benchmarks.report import ROOT, machine, rounded, wait_until_quiet
from posttrain.backend.errors import ConfigError
from posttrain.tracking.command_line import run_command
from posttrain.tracking.jsonl import read_json, write_atomically
from recipes.intervals import mean_and_margin

ROWS = [*RECIPES, *SYSTEMS, *TIMES]
BUSY = 0.5  # cores that other processes may use beside a timed row before it is marked
COMMAS = r",\s*"
FEWEST = 3  # seeds of an interval of the mean
# Pages and pictures in the folders of code: figures do not depend on them.
NO_CODE = (":(exclude)*.md", ":(exclude)*.png")
NO_EFFECT = "no_effect.json"  # commits that change no figure, or only those of the rows "but for" -> how that was seen
MARKED = re.compile(r"(<!-- evidence: ([\w ,-]+) -->\n).*?(<!-- end of evidence -->)", re.DOTALL)


@chz.chz
class Config:
    """The evidence behind the pages."""

    only: str | None = chz.field(default=None, doc="rows by comma; None = all")
    status: bool = chz.field(default=False, doc="say which rows are missing, stale or taken beside other work")
    pages: bool = chz.field(
        default=False, doc="write tables and pictures of the pages anew from what is there; nothing runs"
    )
    log_path: str = chz.field(default="runs/evidence", doc="folder of the runs")
    data: str = chz.field(default="../shared/data", doc="folder of the data sets: gsm8k/, arc_challenge/")


@dataclass
class Evidence:
    """The rows' records in `records`, of the repository at `root`."""

    rows: Sequence[Row]
    root: Path
    records: Path
    runs: Path
    data: Path = Path()

    def record(self, row: Row) -> dict[str, Any]:
        """The seeds that have been run, by number; empty if none has."""
        file = self.records / f"{row.name}.json"
        return read_json(file) if file.exists() else {"command": row.command, "seeds": {}}

    def state(self, row: Row) -> str:
        """`current`, or what is wrong with the row's record, for a person."""
        record = self.record(row)
        runs = list(record["seeds"].values())
        if missing := [seed for seed in row.seeds if str(seed) not in record["seeds"]]:
            return f"missing: seeds {', '.join(map(str, missing))}"
        if record["command"] != row.command:
            return "stale: its command is another now"
        if stale := [reason for run in runs if (reason := self.changed(run["commit"], row.code, row.name))]:
            return f"stale: {stale[0]}"
        if lacking := next((figure for run in runs for figure in _lacking(row, run)), None):
            return f"incomplete: no figure {lacking!r}"
        busiest = max(run["other processes, cores"] or 0.0 for run in runs)
        return f"taken beside other work, {busiest:.1f} cores" if row.is_timed and busiest > BUSY else "current"

    def commit(self, code: Sequence[str]) -> str:
        """The commit of the tree, marked where `code` differs from it."""
        commit = self.git("rev-parse", "--short", "HEAD").stdout.strip()
        return f"{commit}-dirty" if commit and self.changed(commit, code) else commit

    def changed(self, commit: str, code: Sequence[str], row: str = "") -> str:
        """What of `code` has changed since `commit`, committed or not; empty if nothing has. Commits of
        NO_EFFECT are left out, unless they change this row."""
        if not commit or commit.endswith("-dirty"):
            return "taken with uncommitted changes, or outside git"
        paths, exceptions = [*code, *NO_CODE], self.records / NO_EFFECT
        reasons = read_json(exceptions) if exceptions.exists() else {}
        none = [commit for commit, why in reasons.items() if isinstance(why, str) or row not in why["but for"]]
        done = self.git("log", "--format=%H", f"{commit}..HEAD", "--", *paths)
        if done.returncode:
            return f"commit {commit} is unknown here"
        files = self.git("diff", "--name-only", "HEAD", "--", *paths).stdout.split()
        if later := [later for later in done.stdout.split() if not later.startswith(tuple(none))]:
            files += self.git("show", "--format=", "--name-only", *later, "--", *paths).stdout.split()
        files = sorted(set(files))
        if not files:
            return ""
        what = f"{files[0]} has" if len(files) == 1 else f"{files[0]} and {len(files) - 1} more have"
        return f"{what} changed since {commit}"

    def git(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["git", *arguments], cwd=self.root, capture_output=True, text=True)

    def run(self, row: Row, pictures: Sequence[Picture] = ()) -> list[Path]:
        """The seeds that are missing or stale. Each is recorded as soon as it has ended, the last one after the
        row's pictures are drawn: a command killed before goes on there. Returns the pictures."""
        record, drawn = self.record(row), list[Path]()
        if record["command"] != row.command:
            record = {"command": row.command, "seeds": {}}
        taken = {seed: record["seeds"].get(str(seed)) for seed in row.seeds}
        folders = {seed: self.runs / row.name / str(seed) for seed in row.seeds}
        due = [
            seed
            for seed, run in taken.items()
            if not run
            or self.changed(run["commit"], row.code, row.name)
            or (_lacking(row, run) and not (folders[seed] / "begun.json").exists())
        ]
        for seed, run in taken.items():
            folder = folders[seed]
            if seed in due:
                record["seeds"][str(seed)] = self.run_seed(row, seed, folder)
                for moved in _moved(taken[seed], record["seeds"][str(seed)]):
                    print(f"--- {row.name}, seed {seed}: {moved}: see the sentences beside the table", flush=True)
                if row.picture and seed == row.seeds[-1]:
                    source, target = row.picture.split()
                    shutil.copy(folder / source, self.root / target)
                if seed == due[-1]:
                    drawn = self.draw(pictures, [row.name])
            elif row.metrics and run["figures"].keys() != row.metrics.keys() and (folder / "begun.json").exists():
                run["figures"] = rounded(row.figures(folder, seed))  # other numbers of the same run
            else:
                continue
            self.records.mkdir(parents=True, exist_ok=True)
            write_atomically(self.records / f"{row.name}.json", json.dumps(record, indent=2) + "\n")
        return drawn

    def draw(self, pictures: Sequence[Picture], names: Collection[str]) -> list[Path]:
        """Of the pictures that show runs of these rows those whose runs are all here."""
        drawn = []
        for picture in pictures:
            folders = picture.folders(self.rows, self.runs)
            if set(names) & set(picture.rows) and all(run.exists() for seeds in folders.values() for run in seeds):
                picture.draw(folders, self.root / picture.target)
                drawn.append(self.root / picture.target)
        return drawn

    def run_seed(self, row: Row, seed: int, folder: Path) -> dict[str, Any]:
        commit, note = self.commit(row.code), folder / "begun.json"
        begun = read_json(note) if note.exists() else {"command": "", "commit": ""}
        is_new = begun["command"] != row.command or bool(self.changed(begun["commit"], row.code, row.name))
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)  # a run that resumed there would be of two commits or commands
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(note, json.dumps({"command": row.command, "commit": commit}))
        arguments = row.command.format(seed=seed, folder=folder, data=self.data).split()
        arguments += [RESUME] if row.asks and not is_new else []
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        load = wait_until_quiet() if row.is_timed else os.getloadavg()[0]
        print(f"--- {row.name}, seed {seed}: python {' '.join(arguments)}", flush=True)
        before, start = _cpu_seconds(), time.perf_counter()
        with (folder / OUTPUT).open("a") as output:
            done = subprocess.run(
                [sys.executable, *arguments], cwd=self.root, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        if done.returncode:
            raise ConfigError(f"{row.name}, seed {seed}: ended with {done.returncode}; see {folder / OUTPUT}")
        seconds, after = time.perf_counter() - start, _cpu_seconds()
        others = (after[0] - before[0] - (after[1] - before[1])) / seconds
        return rounded(
            {
                **{key: value for key, value in machine().items() if key != "device_type"},
                "commit": commit,
                "load before": load,
                "load after": os.getloadavg()[0],
                "other processes, cores": None if row.has_daemons else max(others, 0.0),
                "seconds": seconds,
                "CPU seconds": after[1] - before[1],
                "figures": row.figures(folder, seed),
                **({"figures of the rounds": row.report()["ratios of the rounds"]} if row.is_timed else {}),
            }
        )

    def table(self, names: Sequence[str]) -> str:
        """Mean, 95% interval and range over the seeds of the rows' figures, of times median and range over the
        rounds, and what they were taken with. Figures called "line | column" are cells of a table of their own."""
        lines, notes = [], []
        cells: dict[tuple[str, str], str] = {}
        for row in [row for row in self.rows if row.name in names]:
            runs = [self.record(row)["seeds"].get(str(seed)) for seed in row.seeds]
            runs = [run for run in runs if run]
            if not runs:
                lines.append(f"| {row.name} | not taken yet | | | |")
                continue
            for label in [label for label in runs[0]["figures"] if all(label in run["figures"] for run in runs)]:
                values = [value for run in runs if (value := run["figures"][label]) is not None]
                mean = _shown(statistics.mean(values)) if values else "not reached"
                margin = f"{mean_and_margin(values)[1]:.2g}" if len(values) == len(runs) >= FEWEST else ""
                seeds = f"{len(values)} of {len(runs)}" if len(values) < len(runs) else len(runs)
                if row.is_timed:  # one run of several rounds
                    values = runs[0].get("figures of the rounds", {}).get(label, values)
                    seeds = len(values)
                span = f"{_shown(min(values))} to {_shown(max(values))}" if len(values) > 1 else ""
                line, cell, column = label.partition(" | ")
                if cell:
                    missing = f", {seeds} seeds" if len(values) < len(runs) else ""
                    cells[line, column] = mean + (f" ({span}{missing})" if span else missing)
                else:
                    name = f"`{row.name}`: {label}" if row.is_timed else label
                    lines.append(f"| {name} | {mean} | {margin} | {span} | {seeds} |")
            time_taken = timedelta(seconds=round(sum(run["seconds"] for run in runs)))
            state = "" if (state := self.state(row)) == "current" else f"; {state}"
            notes.append(
                f"`{row.name}`: {runs[-1]['date'][:10]}, commit {runs[-1]['commit']}, {runs[-1]['device']}, "
                f"torch {runs[-1]['versions'].get('torch')}, {time_taken} in all{state}."
            )
        timed = {row.is_timed for row in self.rows if row.name in names}
        center, runs = ("median", "rounds") if timed == {True} else ("mean", "seeds")
        center, runs = ("mean or median", "seeds or rounds") if len(timed) > 1 else (center, runs)
        if lines:
            head = [
                f"| figure | {center} | ± (95%) | smallest to largest | {runs} |",
                "| --- | --- | --- | --- | --- |",
            ]
            lines = [*head, *lines, ""]
        return "\n".join([*lines, *_grids(cells, center), *notes]) + "\n"

    def write_pages(self) -> list[Path]:
        """The pages whose tables have changed. ConfigError for a marker that names no row."""
        known, written = {row.name for row in self.rows}, []
        listed = self.git("ls-files", "*.md").stdout
        for page in [self.root / name for name in listed.split()]:
            text = page.read_text()
            for _, names, _ in MARKED.findall(text):
                if unknown := set(re.split(COMMAS, names.strip())) - known:
                    raise ConfigError(f"{page}: evidence: no row is called {sorted(unknown)[0]}")
            new = MARKED.sub(lambda m: f"{m[1]}\n{self.table(re.split(COMMAS, m[2].strip()))}\n{m[3]}", text)
            if new != text:
                page.write_text(new)
                written.append(page)
        return written


def _lacking(row: Row, run: Mapping[str, Any]) -> list[str]:
    """Figures of the row that were not read when the seed was run."""
    return [label for label in row.metrics if label not in run["figures"]]


def _moved(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[str]:
    """Figures that differ from those before."""
    old = before["figures"] if before else {}
    return [f"{name}: {old[name]}, now {new}" for name, new in after["figures"].items() if old.get(name, new) != new]


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _grids(cells: Mapping[tuple[str, str], str], center: str) -> list[str]:
    """Tables of cells by (line, column), each with an empty line after it. Lines that share no column with
    those before them begin a table."""
    columns_of: dict[str, set[str]] = {}
    for line, column in cells:
        columns_of.setdefault(line, set()).add(column)
    tables: list[list[str]] = []  # lines of each
    known: set[str] = set()
    for line, columns in columns_of.items():
        if known.isdisjoint(columns):
            tables.append([])
            known = set()
        tables[-1].append(line)
        known |= columns
    text = []
    for lines in tables:
        columns = list(dict.fromkeys(column for line, column in cells if line in lines))
        rows = [[f"{center} (smallest to largest)", *columns], ["---"] * (len(columns) + 1)]
        rows += [[line, *(cells.get((line, column), "") for column in columns)] for line in lines]
        text += [*(f"| {' | '.join(row)} |" for row in rows), ""]
    return text


def _cpu_seconds() -> tuple[float, float]:
    """Of the whole machine, and of this process's ended children."""
    user, nice, system = (int(ticks) for ticks in Path("/proc/stat").read_text().split()[1:4])
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (user + nice + system) / os.sysconf("SC_CLK_TCK"), usage.ru_utime + usage.ru_stime


def main(config: Config) -> None:
    evidence = Evidence(
        ROWS, ROOT, ROOT / "benchmarks" / "evidence", Path(config.log_path).absolute(), Path(config.data)
    )
    names = [row.name for row in ROWS]
    asked = config.only.split(",") if config.only else names
    if unknown := [name for name in asked if name not in names]:
        raise ConfigError(f"only={unknown[0]}: no such row; known: {', '.join(names)}")
    rows = [row for row in ROWS if row.name in asked]
    if config.status:
        for row in rows:
            print(f"{row.name:24s} {evidence.state(row)}")
        return
    failures, written = [], evidence.draw(PICTURES, asked) if config.pages else []
    for row in [] if config.pages else rows:
        try:
            written += evidence.run(row, PICTURES)
        except ConfigError as failure:
            failures.append(str(failure))
            print(f"--- {failure}", flush=True)
    for path in [*written, *evidence.write_pages()]:
        print(f"written: {path}")
    if failures:
        raise ConfigError(f"{len(failures)} rows could not be taken: {'; '.join(failures)}")


if __name__ == "__main__":
    run_command(main, Config)
