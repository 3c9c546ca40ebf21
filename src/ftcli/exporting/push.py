"""An export, uploaded to the hub with its card."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from ftcli.errors import Problem, RequestError, RunError, UsageError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_repository(repository: str) -> None:
    """Refuse what cannot be a repository, and a hub without a login, before any work is done.

    Raises:
        RequestError: why it cannot be pushed to.
    """
    from huggingface_hub import get_token

    if not _REPOSITORY.fullmatch(repository):
        raise UsageError(f"--push {repository} is no repository", hint="--push OWNER/NAME")
    if get_token() is None:
        raise RequestError("the hub cannot be pushed to", [Problem("--push", "there is no login", "hf auth login")])


def push_folder(folder: Path, repository: str) -> str:
    """Upload `folder` in one commit; the repository is made, private, if there is none.

    Returns:
        the address of the commit.

    Raises:
        RunError: the hub refuses or cannot be reached; `folder` stays.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export with ftcli")
    except (HfHubHTTPError, HTTPError, OSError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        again = f"hf upload --private {repository} {shlex.quote(str(folder))}"
        raise RunError(f"`{repository}` could not be pushed to: {first_line}", hint=f"the export is whole; to send it: {again}") from error
    return str(commit)
