"""Documents that are made from the code say what the code says."""

from __future__ import annotations

import re

import pytest
from tests.conftest import ROOT


def test_recipe_reference_is_made_from_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    import runpy

    runpy.run_path(str(ROOT / "scripts" / "recipe_docs.py"), run_name="__main__")
    assert (ROOT / "docs" / "recipes.md").read_text() == capsys.readouterr().out


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_every_link_in_a_document_leads_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), f"{document} links to {target}"
