"""The models and data sets that come with the package, so that everything can be tried without a network.

They are made by scripts/build_base.py from the project's own grammar; data/README.md and models/tiny/README.md say how.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from ftcli.errors import DataError, Problem, RequestError, did_you_mean

MODELS: Mapping[str, str] = MappingProxyType(
    {
        "tiny": "Llama of 2.6 M parameters with a chat template, pre-trained on a small world told in plain English",
    }
)
"""One line about each built-in model."""

DATASETS: Mapping[str, str] = MappingProxyType(
    {
        "stories": "short stories, of the kind that builtin:tiny was pre-trained on (text)",
        "clinic": "notes from a clinic, whose jargon builtin:tiny has never seen (text)",
        "orders": "an order in plain English and the same order as JSON (chat)",
        "reviews": "reviews and whether they are good, mixed or bad (text and label; prompt and completion)",
        "preferences": "questions with a right answer and with a rude or wrong one (prompt, chosen, rejected)",
    }
)
"""One line about each built-in data set."""

SPLITS = ("train", "test")
"""The splits of every built-in data set; the two do not overlap."""

_HERE = Path(__file__).parent


def model_folder(name: str) -> Path:
    """The folder of a built-in model: config, weights, tokenizer, card.

    Raises:
        RequestError: there is none of that name.
    """
    if name not in MODELS:
        raise RequestError("there is no such model", [_unknown(f"builtin:{name}", "model", name, tuple(MODELS))])
    folder = _HERE / "models" / name
    if not (folder / "config.json").is_file():
        hint = "make it with `python scripts/build_base.py all`, or install the package again"
        raise RequestError("a built-in model is missing", [Problem(f"builtin:{name}", f"`{folder}` has no config.json", hint)])
    return folder


def dataset_path(name: str, split: str = "train") -> Path:
    """The file of a built-in data set: gzipped JSON Lines.

    Args:
        name: one of `DATASETS`.
        split: one of `SPLITS`.

    Raises:
        DataError: there is no such data set, or no such split.
    """
    if name not in DATASETS:
        raise DataError("there is no such built-in data set", [_unknown(f"builtin `{name}`", "data set", name, tuple(DATASETS))])
    if split not in SPLITS:
        raise DataError("there is no such split", [_unknown(f"builtin `{name}`", "split", split, SPLITS)])
    return _HERE / "data" / f"{name}-{split}.jsonl.gz"


def _unknown(where: str, what: str, found: str, allowed: tuple[str, ...]) -> Problem:
    return Problem(
        where, f"unknown {what} `{found}`", did_you_mean(found, allowed) or f"one of {', '.join(f'`{name}`' for name in allowed)}"
    )
