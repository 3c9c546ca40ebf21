"""An adapter that was trained beside an earlier one is saved as one of both ranks: what goes on from it merges it, or says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftcli.cli.main import run
from ftcli.errors import RecipeError
from ftcli.recipe.chain import load_chain
from ftcli.recipe.load import load_recipe
from ftcli.reporting.live import Reporter
from ftcli.training.after import follow

CONFIG = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LORA = {"kind": "lora", "rank": 2}


def write(folder: Path, name: str, **changes: Any) -> str:
    document = {
        "version": 1,
        "name": name,
        "model": {"init": {"architecture": "llama", "config": CONFIG}, "tokenizer": "builtin:tiny"},
        "data": {"train": [{"source": {"kind": "builtin", "name": "orders"}, "limit": 5}], "holdout": 0, "max_length": 256},
        "train": {"steps": 1, "global_batch_size": 2, "lr": 1e-2},
        "output": str(folder / name),
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(document))
    return str(path)


@pytest.mark.parametrize("begin", [{}, {"begin": "keep"}], ids=["default", "keep"])
def test_a_stacked_adapter_is_not_trained_on_as_if_it_were_one(tmp_path: Path, begin: dict[str, Any]) -> None:
    stages = [{"name": "one", "method": LORA}, {"name": "two", "method": LORA, "begin": "stack"}]
    with pytest.raises(RecipeError, match=r"stages\.2.*adapter of its own rank and the earlier one's together") as caught:
        load_chain(Path(write(tmp_path, "chain", stages=[*stages, {"name": "three", "method": LORA, **begin}])))
    assert "`begin: merge`, or `stack` again" in str(caught.value)
    for how in ("merge", "stack"):
        load_chain(Path(write(tmp_path, "chain", stages=[*stages, {"name": "three", "method": LORA, "begin": how}])))


def test_a_run_after_a_stacked_one_begins_on_it_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", write(tmp_path, "one", method=LORA)]) == 0
    assert run(["train", write(tmp_path, "two", method=LORA, init_from={"path": "one", "adapter": "stack"})]) == 0
    found = follow(load_recipe(Path(write(tmp_path, "three", method=LORA))), tmp_path / "two", 0, Reporter(silent=True)).recipe
    assert (found.init_from, found.model.base) == (None, str(tmp_path / "two" / "merged"))
