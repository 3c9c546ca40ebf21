"""Documents that are made from the code say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.conftest import ROOT


def test_recipe_reference_is_made_from_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    import runpy

    runpy.run_path(str(ROOT / "scripts" / "recipe_docs.py"))["main"]()
    assert (ROOT / "docs" / "recipes.md").read_text() == capsys.readouterr().out


def test_evaluation_reference_is_made_from_the_code_and_its_example_is_a_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import runpy

    from ftcli.evaluation.recipe import load_evaluation_recipe

    runpy.run_path(str(ROOT / "scripts" / "recipe_docs.py"))["main"]("evaluation")
    text = (ROOT / "docs" / "evaluation-recipes.md").read_text()
    assert text == capsys.readouterr().out
    example = tmp_path / "eval.yaml"
    example.write_text(text.split("```yaml\n")[1].split("```")[0])
    kinds = {task.kind for task in load_evaluation_recipe(example).tasks}
    assert kinds == set(re.findall(r"^`kind: (\S+)`$", text, re.MULTILINE)) & kinds
    assert len(kinds) == 8


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_every_link_in_a_document_leads_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), f"{document} links to {target}"
