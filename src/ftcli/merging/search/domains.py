"""AdapterSoup: the adapters whose domains are nearest to a text, averaged.

A domain is the mean hidden state, under the base, of some of its rows: each adapter's own training data, or a file of texts. Nearness
is the cosine, after the mean over the adapters' domains is taken off: hidden states have a large part in common, which would make
all domains look alike. Averaged is what the adapters truly add (concatenated factors), never the factors themselves.

Source: Chronopoulou et al. 2023, arXiv:2302.07027, who take sentence embeddings for the hidden states.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ftcli.errors import Problem, RequestError
from ftcli.merging.engine import Say, working_folder
from ftcli.merging.hold import held
from ftcli.merging.lora.adapter import Adapter, open_adapter
from ftcli.merging.lora.merge import CONCAT, AdapterMerge, merge_adapters
from ftcli.merging.outcome import check_output
from ftcli.merging.search.recipe import AdapterSoup
from ftcli.models.locate import model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ftcli.data.settings import EvaluationSource
    from ftcli.models.tokenizer import Tokenizer

Vectors = NDArray[np.float64]
_MAX_TOKENS = 512
_RUN_FILE = "recipe.resolved.yaml"


@dataclass(frozen=True)
class Choice:
    """Which adapters are nearest to a text."""

    similarities: tuple[float, ...]
    """Of each adapter's domain, -1..1."""
    chosen: tuple[int, ...]
    """Indices of the nearest, nearest first."""


def nearest(domains: Vectors, target: Vectors, k: int) -> Choice:
    """The `k` domains with the largest cosine to the target, the mean of the domains taken off; of equal ones the first.

    Args:
        domains: ``(adapters, D)``.
        target: ``(D,)``.
    """
    centre = domains.mean(axis=0) if len(domains) > 1 else np.zeros_like(target)
    moved, aim = domains - centre, target - centre
    scale = np.linalg.norm(moved, axis=1) * np.linalg.norm(aim)
    similarities = np.divide(moved @ aim, scale, out=np.zeros(len(domains)), where=scale > 0)
    order = sorted(range(len(domains)), key=lambda index: (-similarities[index], index))
    return Choice(tuple(float(value) for value in similarities), tuple(order[:k]))


def run_adapter_soup(recipe: AdapterSoup, path: Path, output: Path, *, say: Say = lambda done, total, what: None) -> dict[str, Any]:
    """Write the average of the nearest adapters at `output`, in PEFT's layout.

    Returns:
        The report as JSON has it, with `lines` for people.

    Raises:
        RequestError: an adapter, its domain or the text cannot be read, or the adapters cannot be averaged.
    """
    check_output(output)
    adapters, base = open_soup(recipe, path)
    sources = [_domain_source(domain.texts, adapter, recipe.rows) for domain, adapter in zip(recipe.models, adapters, strict=True)]
    vectors = _embed(base, [*sources, _file_source(recipe.texts, recipe.rows)], say)
    choice = nearest(vectors[:-1], vectors[-1], recipe.k)
    chosen = [adapters[index] for index in choice.chosen]
    weights = (1 / len(chosen),) * len(chosen)
    job = AdapterMerge(CONCAT, tuple(chosen), {"weight": weights}, recipe.base_model, dtype=recipe.dtype)
    with held(working_folder(output), output):
        check_output(output)
        merged = merge_adapters(job, output)
    named = {adapter.name: similarity for adapter, similarity in zip(adapters, choice.similarities, strict=True)}
    lines = [f"{name}: cosine {value:.3f}" for name, value in sorted(named.items(), key=lambda item: -item[1])]
    names = [adapter.name for adapter in chosen]
    lines = [f"nearest to {Path(recipe.texts).name}: {', '.join(names)}", *lines, merged.line(), f"adapter: {output}"]
    return {**merged.to_json(), "merge_method": "adapter_soup", "chosen": names, "similarities": named, "lines": lines}


def open_soup(recipe: AdapterSoup, path: Path) -> tuple[list[Adapter], str]:
    """The adapters and their base, looked at and found to fit.

    Raises:
        RequestError: they do not.
    """
    folder = path.resolve().parent
    adapters = []
    for domain in recipe.models:
        local = next((place for place in (folder / domain.model, Path(domain.model)) if place.exists()), None)
        adapters.append(open_adapter(domain.model, local if local is not None else model_folder(domain.model)))
    if recipe.k > len(adapters):
        problem = Problem("k", f"found {recipe.k}, there are {len(adapters)} adapters")
        raise RequestError("the adapters cannot be chosen", [problem])
    weights = (1 / len(adapters),) * len(adapters)
    job = AdapterMerge(CONCAT, tuple(adapters), {"weight": weights}, recipe.base_model)
    job.check()
    texts = [recipe.texts, *(domain.texts for domain in recipe.models if domain.texts is not None)]
    missing = [text for text in texts if not glob.has_magic(text) and not Path(text).exists()]
    if missing:
        raise RequestError("the adapters cannot be chosen", [Problem("texts", f"`{text}` is not there") for text in missing])
    if job.base_name is None:
        raise RequestError("the adapters cannot be chosen", [Problem("base_model", "no adapter names its base", "base_model: MODEL")])
    return adapters, job.base_name


def _domain_source(texts: str | None, adapter: Adapter, rows: int) -> list[EvaluationSource]:
    """The texts of an adapter's domain."""
    from ftcli.data.settings import EvaluationSource

    if texts is not None:
        return _file_source(texts, rows)
    run = adapter.folder.parent
    if not (run / _RUN_FILE).is_file():
        what = "is no run, so its training data are not known"
        problem = Problem(adapter.name, what, "give the texts of its domain: {model: ..., texts: FILE}")
        raise RequestError("an adapter has no domain", [problem])
    from ftcli.recipe.load import load_recipe

    sources = [source for source in load_recipe(run / _RUN_FILE).recipe.data.train if source.role == "new"]
    return [EvaluationSource(source=source.source, format=source.format, limit=rows) for source in sources]


def _file_source(texts: str, rows: int) -> list[EvaluationSource]:
    from ftcli.data.settings import EvaluationSource
    from ftcli.data.sources.file import File

    return [EvaluationSource(source=File(kind="file", path=texts), limit=rows)]


def _embed(base: str, domains: Sequence[Sequence[EvaluationSource]], say: Say) -> Vectors:
    """``(domains, D)`` mean of the rows' mean hidden states, each row counted once."""
    import torch

    from ftcli.data.prepare import prepare
    from ftcli.data.settings import Data
    from ftcli.models.load import load_model
    from ftcli.models.quiet import quiet_libraries
    from ftcli.models.settings import Model
    from ftcli.models.tokenizer import load_tokenizer
    from ftcli.training.assemble import cache_folder

    tokenizer = load_tokenizer(base)
    with quiet_libraries():
        model = load_model(Model(base=base), tokenizer, dtype="float32", device="cuda" if torch.cuda.is_available() else "cpu")
    vectors = []
    for index, sources in enumerate(domains):
        say(index, len(domains), "read the domains")
        # what is beyond a window says little more of the domain
        data = Data.model_construct(train=(), evaluation=tuple(sources), max_length=_longest(model), on_overflow="drop")
        stores = prepare(data, tokenizer, cache_folder=cache_folder()).evaluation
        trees = [store.tree(row).tokens for store in stores for row in range(len(store))]
        vectors.append(np.mean([_mean_state(model, tokenizer, tokens.tolist()) for tokens in trees], axis=0))
    return np.stack(vectors)


def _longest(model: PreTrainedModel) -> int:
    from ftcli.models.generate import context_length

    return min(_MAX_TOKENS, context_length(model) or _MAX_TOKENS)


def _mean_state(model: PreTrainedModel, tokenizer: Tokenizer, tokens: Sequence[int]) -> Vectors:
    """(D,) mean over the tokens of the decoder's last hidden state."""
    import torch

    with torch.inference_mode():
        ids = torch.tensor([list(tokens)], device=model.device)
        found = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return np.asarray(found[0].double().mean(dim=0).cpu().numpy())
