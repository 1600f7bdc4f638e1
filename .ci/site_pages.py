"""A hook of mkdocs: the pages and files outside docs/ that its pages link to (recipes, benchmarks,
ARCHITECTURE.md, sources) are on the site too, at their own paths, with links that work on GitHub.
"""

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)")


def place(file: Path) -> str:
    """Where a file of the repository is on the site."""
    path = file.relative_to(ROOT).as_posix()
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def targets(page: Path) -> list[Path]:
    """The files of the repository that a page links to."""
    if page.suffix != ".md":
        return []
    found = [(page.parent / path).resolve() for path in LINK.findall(page.read_text())]
    return [file for file in found if file.is_file()]


def beside_docs() -> list[Path]:
    """What the pages of docs/ link to outside docs/, and what those pages link to."""
    waiting, seen = sorted((ROOT / "docs").glob("*.md")), set[Path]()
    while waiting:
        page = waiting.pop()
        if page not in seen:
            seen.add(page)
            waiting += targets(page)
    return sorted(file for file in seen if place(file) == file.relative_to(ROOT).as_posix())


def rewritten(page: Path, text: str) -> str:
    """The page's text with links between the places of the site."""

    def link(match: re.Match[str]) -> str:
        file = (page.parent / match[1]).resolve()
        return f"]({os.path.relpath(place(file), os.path.dirname(place(page)) or '.')}" if file.is_file() else match[0]

    return LINK.sub(link, text)


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for file in beside_docs():
        files.append(File(place(file), str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return rewritten(Path(page.file.abs_src_path), markdown)
