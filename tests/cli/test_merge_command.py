"""`ftcli merge`: what it refuses before it loads anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftcli.cli.main import run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "neither a run nor all of --base, --adapter and --output are given"),
        (["--base", "builtin:tiny"], "neither a run nor all of"),
        (["runs/a", "--base", "builtin:tiny"], "a run knows its base"),
        (["runs/a", "--quantize", "nf4"], "a run knows its base"),
        (["--base", "b", "--adapter", "a", "-o", "o", "--checkpoint", "best"], "--checkpoint belongs to a run"),
        (["runs/nothing"], "`runs/nothing` is not a run folder"),
        (["runs/a", "--target", "mixed"], "mixed"),
    ],
)
def test_a_wrong_command_line_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["merge", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
