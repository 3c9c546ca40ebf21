"""Rows of a data set on the hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from ftcli.errors import DataError, Problem
from ftcli.spec import ExpandedName, Spec

if TYPE_CHECKING:
    from datasets import Dataset


_COMMIT = re.compile(r"[0-9a-f]{40}")


class Hub(Spec):
    """Rows of a data set on the hub, fetched once and kept in the cache of the datasets library."""

    kind: Literal["hub"] = "hub"
    dataset: ExpandedName
    """Its id, owner/name."""
    config: ExpandedName | None = None
    """Its configuration, where it has several."""
    split: ExpandedName = "train"
    """Its split; slices such as `train[:1000]` are allowed."""
    revision: ExpandedName | None = None
    """Branch, tag or commit; without one, what the hub has today."""
    streaming: bool = False
    """Read the rows as they come, without keeping the files: for data sets larger than the disk, with a `limit`. What is tokenised
    of them is kept like that of any source, so order and resume are the same."""

    def label(self) -> str:
        return self.dataset.rsplit("/", 1)[-1]

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(where, row) of every row, in order."""
        number = 0
        for number, row in enumerate(self._load(), start=1):
            yield f"{self.dataset}/{self.split}:{number}", dict(row)
        if number == 0:
            raise DataError("a data set is empty", [Problem(f"{self.dataset}/{self.split}", "has no rows")])

    def fingerprint(self) -> str:
        """Hash of what was asked for and of the data it led to."""
        if self.streaming:
            parts = [self.dataset, self.config, self.split, self._commit(), "streaming"]
            return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
        data: Dataset = self._load()
        checksums = sorted(map(str, (data.info.download_checksums or {}).items()))
        parts = [self.dataset, self.config, self.split, self.revision, data._fingerprint, *checksums]
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()

    def _commit(self) -> str:
        """The commit that is read: the hub is asked, unless `revision` is one.

        Raises:
            DataError: the hub does not say.
        """
        from httpx2 import HTTPError
        from huggingface_hub import dataset_info
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        if self.revision is not None and _COMMIT.fullmatch(self.revision):
            return self.revision
        try:
            return str(dataset_info(self.dataset, revision=self.revision).sha)
        except (HfHubHTTPError, HFValidationError, HTTPError, OSError) as error:
            problem = Problem(self.dataset, "the hub does not say which commit it has", "give `revision`: a commit, forty digits")
            raise DataError("a data set cannot be had", [problem]) from error

    def _load(self) -> Any:
        """A `Dataset`, or with `streaming` an `IterableDataset`."""
        from datasets import load_dataset
        from datasets.exceptions import DatasetNotFoundError, DatasetsError

        where = f"{self.dataset}/{self.split}"
        try:
            options = {"streaming": True} if self.streaming else {}
            data = load_dataset(self.dataset, self.config, split=self.split, revision=self.revision, **options)
        except DatasetNotFoundError as error:
            what, hint = (
                "is not on the hub, or the hub cannot be reached",
                "check the name; private and gated data sets need `hf auth login`",
            )
            raise DataError("a data set cannot be had", [Problem(where, what, hint)]) from error
        except (DatasetsError, OSError, ValueError) as error:
            # The library's own message lists the configurations or splits that exist.
            unreachable = "check the connection, or download it and use a `file` source"
            problem = Problem(where, str(error).strip().splitlines()[0], unreachable if isinstance(error, ConnectionError) else None)
            raise DataError("a data set cannot be had", [problem]) from error
        return data
