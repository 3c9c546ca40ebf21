"""Where a model's files are: embedded, in a local folder, or fetched from the hub."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from ftcli.errors import Problem, RequestError

# Everything but weights: what the tokenizer, the configuration and the template need.
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")
# Weights are read from safetensors only: a pickle can run code when it is opened.
WEIGHT_FILES = ("*.safetensors",)


def model_folder(reference: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local folder that holds the files of a model.

    Args:
        reference: builtin:NAME, a local folder, or a hub id.
        revision: branch, tag or commit of a hub id.
        weights: False fetches the configuration, tokenizer and template files of a hub id only.

    Raises:
        RequestError: there is no such model, or it cannot be fetched.
    """
    if reference.startswith("builtin:"):
        from ftcli.builtin import catalogue

        return catalogue.model_folder(reference.removeprefix("builtin:"))
    folder = Path(reference).expanduser()
    # pathlib raises where a name is too long for a file
    if os.path.isdir(folder):
        return folder
    if os.path.isfile(folder):
        raise _not_a_model(reference, "is a file, not a folder", f"`{folder.parent}` is the folder it is in")
    if not _is_hub_id(reference):
        raise _not_a_model(reference, "is no folder", _near_folder(folder))
    return _snapshot(reference, revision, weights)


def _snapshot(reference: str, revision: str | None, weights: bool) -> Path:
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [*SMALL_FILES, *WEIGHT_FILES] if weights else [*SMALL_FILES]
    try:
        return Path(snapshot_download(reference, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise _not_a_model(reference, "is gated on the hub", "ask its authors for access, then log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise _not_a_model(reference, f"has no revision `{revision}` on the hub", None) from error
    except RepositoryNotFoundError as error:
        raise _not_a_model(reference, "is neither a local folder nor a model on the hub", "private models need `hf auth login`") from error
    except HFValidationError as error:
        raise _not_a_model(reference, "is neither a local folder nor a hub id", None) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, HTTPError, OSError) as error:
        hint = "check the connection, or give a local folder or `builtin:tiny`"
        raise _not_a_model(reference, "is not a local folder, and the hub cannot be reached", hint) from error


def is_on_hub(reference: str) -> bool:
    """Is `reference` the name of a model on the hub, and neither embedded nor a folder here?"""
    return not reference.startswith("builtin:") and _is_hub_id(reference) and not os.path.exists(Path(reference).expanduser())


def _is_hub_id(reference: str) -> bool:
    """`name` or `owner/name`; a longer, absolute or dotted path is meant as a folder."""
    return reference.count("/") <= 1 and not reference.startswith(("/", ".", "~"))


def _near_folder(folder: Path) -> str | None:
    """The hint for a folder that does not exist: its nearest neighbour, or the part of the path that is missing."""
    if not os.path.isdir(folder.parent):
        return f"there is no folder `{folder.parent}` either"
    near = difflib.get_close_matches(folder.name, [path.name for path in folder.parent.iterdir() if path.is_dir()], n=1)
    return f"did you mean `{folder.parent / near[0]}`?" if near else None


def _not_a_model(reference: str, what: str, hint: str | None) -> RequestError:
    return RequestError("the model cannot be had", [Problem("", f"`{reference}` {what}", hint)])
