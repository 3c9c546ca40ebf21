"""The table of merges in docs has every method that a recipe may name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scripts.bench import merge_rows
from tests.conftest import ROOT

WORLD = merge_rows.World("builtin:tiny", Path("runs"), ("a", "b", "c"), 5, {})


def test_every_registered_merge_method_has_a_row() -> None:
    rows = merge_rows.all_rows(WORLD)
    assert {method for row in rows for method in row.methods} == set(merge_rows.registered())
    assert all(row.name.split(",")[0] in row.methods for row in rows)


def test_a_merge_method_without_a_row_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = merge_rows.registered()
    monkeypatch.setattr(merge_rows, "registered", lambda: [*known, "brand_new"])
    with pytest.raises(SystemExit, match=r"without a row .*: brand_new$"):
        merge_rows.all_rows(WORLD)


def test_the_tables_in_docs_name_every_registered_merge_method() -> None:
    sections = (ROOT / "docs" / "merge-methods.md").read_text().split("\n## ")
    tables = [section for section in sections if "| the base |" in section]
    assert len(tables) == 2
    for table in tables:
        named = set(re.findall(r"^\| (\w+)[,| ]", table, re.MULTILINE))
        assert set(merge_rows.registered()) <= named, set(merge_rows.registered()) - named
