"""Every file that goes into a merge: weights and statistics, and the small ones that decide about names, rows and templates."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ftcli.merging.stored import INDEX_FILE
from ftcli.models.tokenizer import TOKENIZER_FILES

if TYPE_CHECKING:
    from ftcli.merging.planned import TensorPlan
    from ftcli.merging.recipe import MergeRecipe
    from ftcli.merging.sources import Source

CARRIED_ON = ("generation_config.json", "preprocessor_config.json", "processor_config.json", "*.py")
"""Files of the donor, beside configuration and tokenizer, that the merged model has, too."""


def input_files(recipe: MergeRecipe, sources: Sequence[Source]) -> dict[str, Path]:
    """Every file that decides a byte of the merge, by the name that the recipe gives its model, and its own."""
    found: dict[str, Path] = {}
    for source in sources:
        paths = [*source.files, source.folder / "config.json", source.folder / INDEX_FILE]
        paths += [source.tokenizer_folder / name for name in TOKENIZER_FILES]
        paths += [path for pattern in CARRIED_ON for path in sorted(source.folder.glob(pattern))]
        found |= {f"{source.reference}/{path.name}": path for path in paths if path.is_file()}
    return found | statistics_files(recipe)


def statistics_files(recipe: MergeRecipe) -> dict[str, Path]:
    """The files of statistics, by the names that the recipe gives them; relative ones count from its folder."""
    parts = [part for module in recipe.modules for piece in module.slices for part in piece.parts]
    names = dict.fromkeys(part.statistics for part in parts if part.statistics is not None)
    return {name: recipe.path.resolve().parent / Path(name).expanduser() for name in names}


def fingerprint_of_files(files: Mapping[str, Path]) -> str:
    """Changes with any of the files: large ones are known by size and time, small ones by what is in them."""
    digest = hashlib.sha256()
    for name, path in files.items():
        status = path.stat()
        digest.update(repr((name, str(path.resolve()), status.st_size)).encode())
        if path.suffix == ".safetensors":
            digest.update(repr((status.st_mtime_ns, status.st_ino)).encode())
        else:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def fingerprint_of_tensors(tensors: Sequence[TensorPlan]) -> str:
    """Changes with how any tensor comes to be, and with where it is written."""
    digest = hashlib.sha256()
    for tensor in tensors:
        made_of = (tensor.inputs, tensor.base, tensor.labels, tensor.is_copy, tensor.is_vocabulary, tensor.statistics)
        place = (tensor.name, tensor.shape, tensor.dtype, tensor.shard, tensor.offset)
        digest.update(repr((place, made_of, sorted(tensor.settings.items()))).encode())
    return digest.hexdigest()
