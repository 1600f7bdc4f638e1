"""The python blocks of README.md and docs/*.md run, page by page, in the order they are read in.

A block that cannot be run here stands under a line `<!-- not executed: REASON -->`. Commands are parsed.
"""

import ast
import functools
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from posttrain.backend.errors import CookbookError
from posttrain.tracking import command_line
from tests import commands
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DRIVER = """
import os, runpy, sys
from matplotlib.figure import Figure
sys.modules["vllm"] = None  # torch samples: the start of an engine takes longer than a page
Figure.savefig = lambda *_, **__: None
for page in sys.argv[1:]:
    os.chdir(os.path.dirname(page))
    runpy.run_path(page, run_name="__main__")
"""
MARK = re.compile(r"<!-- not executed: \S.* -->")
BESIDE_DOCS = [page for folder in ("recipes", "benchmarks") for page in sorted((ROOT / folder).rglob("*.md"))]


def program(page: str) -> str:
    """The blocks that are to be run, on the lines where they stand in the page, so that a traceback
    points there.
    """
    lines, running, fenced = [], False, False
    previous = ""
    for line in page.splitlines():
        if line.startswith("```"):
            running = not fenced and line.strip() == "```python" and not MARK.fullmatch(previous.strip())
            fenced = not fenced
            lines.append("")
        else:
            lines.append(line if running else "")
        previous = line
    assert not fenced, "a block is not closed"
    return "\n".join(lines) + "\n"


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.M), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_blocks_keep_their_lines_and_only_a_reason_keeps_one_from_running():
    page = "# T\n```python\na = 1\n```\n<!-- not executed: needs a GPU -->\n```python\nb\n```\n```\nc\n```\n"
    page += "<!-- not executed: -->\n```python\nd = 2\n```\n"
    assert {i: line for i, line in enumerate(program(page).splitlines(), start=1) if line} == {3: "a = 1", 14: "d = 2"}


# Trap: a page that names a file that was moved.
@pytest.mark.parametrize(
    "page",
    [*ROOT.glob("*.md"), ROOT / "tests" / "README.md", *PAGES[1:], *BESIDE_DOCS],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_places_that_a_page_names_exist(page: Path):
    """Files and headings of links, and paths in backticks; those of ARCHITECTURE.md may be below posttrain/."""
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists() and (not anchor or anchor in anchors(target)), link
    paths = re.findall(r"`((?:[a-z_]+/)+\w+\.(?:py|md))`", page.read_text())
    folders = (ROOT, ROOT / "posttrain", ROOT / "tests")
    assert [path for path in paths if not any((folder / path).exists() for folder in folders)] == []


def test_the_map_of_the_tests_has_each_file_once():
    page = ROOT / "tests" / "README.md"
    shared, subjects = page.read_text().split("\n## backend\n")
    files = {file.name for file in page.parent.glob("*.py")}
    tests = re.findall(r"`(test_\w+\.py)`", subjects)
    assert sorted(tests) == sorted(name for name in files if name.startswith("test_"))
    assert files <= {*tests, *re.findall(r"`(\w+\.py)`", shared)}


# Trap: documentation that no longer runs.
def test_every_page_runs(tmp_path: Path):
    """One process, for torch takes seconds to import; a namespace and a folder for each page."""
    for page in PAGES:
        (tmp_path / page.stem).mkdir()
        (tmp_path / page.stem / f"{page.name}.py").write_text(program(page.read_text()))
    scripts = [str(tmp_path / page.stem / f"{page.name}.py") for page in PAGES]
    done = commands.run("-c", DRIVER, *scripts, env={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert len(PAGES) >= 3 and done.returncode == 0, done.stderr[-3000:]


def test_metrics_of_runs_are_on_their_page():
    """Names that the loops write as one text, `optim/lr`, and the seconds that they take."""
    folders = ("optim", "mismatch", "critic", "likelihood", "prm", "reward_model", "progress", "train", "test", "time")
    files = [f for folder in ("rl", "supervised", "preference") for f in (ROOT / folder).glob("*.py")]
    text = "".join(file.read_text() for file in files)
    named = re.findall(rf'"(?:{"|".join(folders)})/([a-z_]+)"', text)
    named += re.findall(r'timed\((?:minibatch_)?metrics, "([a-z_]+)"', text)
    page = re.findall(r"[a-z_]+", "".join(re.findall(r"`[^`\n]+`", (ROOT / "docs" / "metrics.md").read_text())))
    assert len(named) > 40 and set(named) - set(page) == set()


@functools.cache
def docstrings() -> dict[Path, str]:
    packages = ("benchmarks", "envs", "posttrain", "preference", "recipes", "rl", "supervised")
    files = sorted(file for package in packages for file in (ROOT / package).rglob("*.py"))
    return {file: ast.get_docstring(ast.parse(file.read_text())) or "" for file in files}


def test_commands_in_docstrings_can_be_pasted():
    """A line has one command, which goes on in the next line after a backslash only."""
    command, second = (
        re.compile(r"\s+(python|torchrun|pip|rm|export) "),
        re.compile(r"(?<!&&) python (-m )?[a-z_]+[/.]"),
    )
    broken = []
    for file, text in docstrings().items():
        lines = text.split("\n")
        for line, following in zip(lines, [*lines[1:], ""], strict=True):
            cut = not line.endswith("\\") and following.strip() and not command.match(following)
            if command.match(line) and (cut or line.endswith(" python")) or second.search(line.strip()):
                broken.append(f"{file.relative_to(ROOT)}: {line.strip()}")
    assert not broken


def page_commands() -> list[tuple[str, Path, list[str]]]:
    """Of all pages and docstrings: line, file and options of the commands that run_command parses."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    found = []
    for text in [*(page.read_text() for page in [*PAGES, *BESIDE_DOCS]), *docstrings().values()]:
        for line in text.replace("\\\n", " ").splitlines():
            if not re.match(r" {4}([A-Z_]+=\S+ )*(python|posttrain-\w+) ", line) or re.search(r"\.\.\.|=my_\w+:", line):
                continue
            words = [word for word in shlex.split(line, comments=True) if not re.match("[A-Z_]+=", word)]
            name, *given = words[2:] if words[1] == "-m" else words[1:] if words[0] == "python" else words
            module = scripts.get(name, name).partition(":")[0]
            file = ROOT / (module if module.endswith(".py") else f"{module.replace('.', '/')}.py")
            if file.is_file() and "run_command(" in file.read_text():
                found.append((line.strip(), file, given))
    return found


# Trap: an option that was renamed, on a page that nobody types from.
def test_commands_of_pages_and_docstrings_have_the_options_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[object] = []

    def parse_only(main: object, config_class: type, *names: Any) -> None:
        parsed.append(command_line.parse(config_class, None, *names))

    monkeypatch.setattr(command_line, "run_command", parse_only)
    monkeypatch.setattr(sys, "path", [*sys.path])
    commands_found = page_commands()
    for line, file, given in commands_found:
        monkeypatch.setattr(sys, "argv", [str(file), *given])
        try:
            runpy.run_path(str(file), run_name="__main__")
        except CookbookError as error:
            raise AssertionError(f"{line}: {error}") from error
    assert len(parsed) == len(commands_found) > 200
