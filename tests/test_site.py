"""The site of docs/ (.ci/site_pages.py), without mkdocs."""

import os
import re
import runpy
from pathlib import Path

from tests.conftest import ROOT

SITE = runpy.run_path(str(ROOT / ".ci" / "site_pages.py"))


# Trap: `mkdocs build --strict` ends at the first link out of docs/, and the recipes are not on the site.
def test_every_link_of_a_page_is_a_place_of_the_site() -> None:
    pages = [*(ROOT / "docs").glob("*"), *SITE["beside_docs"]()]
    places = {SITE["place"](page) for page in pages}
    assert {"recipes/README.md", "ARCHITECTURE.md", "recipes/dpo/dpo.png"} <= places
    navigation = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert set(navigation) <= places and len(navigation) > 20
    for page in pages:
        if page.suffix == ".md":
            folder = Path("/site", SITE["place"](page)).parent
            for link in SITE["LINK"].findall(SITE["rewritten"](page, page.read_text())):
                target = os.path.normpath(folder / link)
                assert os.path.relpath(target, "/site") in places, f"{page}: {link}"
