"""The audit of stores that were audited before: it looks at every example, and opening a large corpus must not."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.data.audit import AuditReport, audit
from ftcli.errors import RunError

if TYPE_CHECKING:
    from ftcli.data.store import TreeStore

# Part of every key. Raise it when the same stores give another report than before.
CODE_VERSION = 1
KEY_LENGTH = 32


def kept_audit(cache_folder: Path, train: Sequence[TreeStore], evaluation: Sequence[TreeStore]) -> AuditReport:
    """What `audit` finds, from the cache where these very stores were audited under these names.

    A cache that cannot be written is done without.

    Raises:
        RunError: the disk is full.
    """
    stores = [[(store.name, store.report.cache_key) for store in part] for part in (train, evaluation)]
    key = hashlib.sha256(json.dumps([CODE_VERSION, stores]).encode()).hexdigest()[:KEY_LENGTH]
    path = cache_folder / "audits" / f"{key}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        return _report(json.loads(path.read_text(encoding="utf-8")))
    scratch = None
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.parent if os.access(path.parent, os.W_OK) else None
    try:
        found = audit(train, evaluation, scratch)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        hint = f"free space under `{scratch or tempfile.gettempdir()}`"
        raise RunError("the disk is full: examples that stand in the data twice cannot be looked for", hint=hint) from error
    with suppress(OSError):
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(found.to_json(), ensure_ascii=False), encoding="utf-8")
        partial.replace(path)
    return found


def _report(values: dict[str, Any]) -> AuditReport:
    pairs = {name: [(first, second) for first, second in values[name]] for name in ("duplicates", "overlap")}
    return AuditReport(**{**values, **pairs})
