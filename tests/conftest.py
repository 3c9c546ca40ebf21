"""Fixtures shared by all tests: tiny real models, a cache of their own, the folder of real data where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests neither read nor fill the user's cache."""
    monkeypatch.setenv("FTCLI_CACHE", str(tmp_path_factory.getbasetemp() / "ftcli-cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models, or a skip that says what is missing."""
    folder = Path(os.environ.get("FTCLI_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data: {folder}/data is not there (set FTCLI_SHARED)")
    return folder
