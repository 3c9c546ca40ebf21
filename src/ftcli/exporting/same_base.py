"""Weights that were trained on one base are put on no other."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ftcli.errors import Problem, RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require_same_base(
    base: PreTrainedModel, recorded: str | None, trained: Path, name: str | None, as_trained: Iterable[PreTrainedModel]
) -> None:
    """Refuse a base that is another than the one of the training.

    Args:
        recorded: what the training left as the fingerprint of its base; None for nothing.
        trained: the run or the adapter.
        as_trained: the base in dtypes that the training may have had, by which its numbers may have been rounded; loaded one by one.

    Raises:
        RequestError: the base has changed since.
    """
    from ftcli.models.fingerprint import base_fingerprint, is_other_base

    if recorded is None or not is_other_base(base_fingerprint(base), recorded):
        return
    if not all(is_other_base(base_fingerprint(other), recorded) for other in as_trained):
        return
    what = f"was trained on `{name or 'a base made from random weights'}`, which is another model now"
    raise RequestError("the adapter is of another base", [Problem(str(trained), what, "put the base of the training back, or train again")])
