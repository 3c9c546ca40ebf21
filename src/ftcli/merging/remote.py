"""Models on the hub: planned from the headers of their weights, which are fetched whole only once the plan holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ftcli.errors import Problem, RequestError
from ftcli.merging.numbers import ITEM_BYTES
from ftcli.merging.stored import StoredTensor, folder_tensors
from ftcli.models.locate import model_folder

if TYPE_CHECKING:
    from ftcli.merging.planned import Plan
    from ftcli.merging.sources import Source


def has_weights(folder: Path) -> bool:
    """True when a snapshot's weights are there, all of them."""
    try:
        folder_tensors(folder)
    except RequestError:
        return False
    return True


def header_tensors(repository: str, folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model on the hub, from the first bytes of each of its files.

    Args:
        folder: the snapshot with its small files, named after the commit; the weights will be in it.

    Raises:
        RequestError: there are no safetensors weights, or the hub cannot be reached.
    """
    from httpx2 import HTTPError
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

    try:
        found = get_safetensors_metadata(repository, revision=folder.name)
    except NotASafetensorsRepoError as error:
        raise _unreadable(repository, "has no safetensors weights", "pickled weights can run code and are not read") from error
    except SafetensorsParsingError as error:
        raise _unreadable(repository, f"has damaged weights: {error}", None) from error
    except (HfHubHTTPError, HTTPError, OSError) as error:
        hint = "check the connection, or give a local folder"
        raise _unreadable(repository, "is not here whole, and the hub cannot be reached", hint) from error
    tensors = {}
    for file, header in sorted(found.files_metadata.items()):
        for name, entry in header.tensors.items():
            if entry.dtype not in ITEM_BYTES:
                raise _unreadable(repository, f"`{name}` is of dtype {entry.dtype}, which ftcli does not know", None)
            # where it begins in the file is known when the file is here
            tensors[name] = StoredTensor(name, entry.dtype, tuple(entry.shape), folder / file, 0)
    return tensors


def _unreadable(repository: str, what: str, hint: str | None) -> RequestError:
    return RequestError("the model cannot be had", [Problem("", f"`{repository}` {what}", hint)])


def download_bytes(sources: tuple[Source, ...]) -> int:
    """Bytes of weights that are still on the hub."""
    remote = {source.remote: source for source in sources if source.remote is not None}
    return sum(tensor.num_bytes for source in remote.values() for tensor in source.tensors.values())


def fetched(plan: Plan) -> Plan:
    """The plan with every model's weights on this machine.

    Raises:
        RequestError: a model cannot be fetched, or is not what its headers said.
    """
    if all(source.remote is None for source in plan.sources):
        return plan
    return replace(plan, sources=tuple(_fetched(source) for source in plan.sources))


def _fetched(source: Source) -> Source:
    if source.remote is None:
        return source
    folder = model_folder(source.remote, source.folder.name)
    tensors = folder_tensors(folder)
    if source.adapter is not None and source.adapter.own_head is not None:
        tensors = source.adapter.own_head.apart(tensors)
    planned = {name: (tensor.dtype, tensor.shape) for name, tensor in source.tensors.items()}
    if planned != {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}:
        raise _unreadable(source.remote, "holds other tensors than its headers said", "plan the merge again")
    return replace(source, folder=folder, tensors=tensors, remote=None)
