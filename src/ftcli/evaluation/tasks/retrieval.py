"""Retrieval: does the model's own embedding bring the right documents to a query?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from ftcli.data.sources import Source
from ftcli.errors import DataError, Problem
from ftcli.evaluation.rows import Rows, in_parts
from ftcli.evaluation.tasks.columns import checked_template, column, fill, text_column
from ftcli.evaluation.tasks.task import Figure, Progress, Subject, TaskResult, TaskSettings, mean_figure

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ftcli.models.tokenizer import Tokenizer

    Vectors = NDArray[np.float32]

TEXTS_AT_ONCE = 1024
# Scores of queries against documents that are held at once.
MAX_SCORES = 4_000_000
NUM_SHOWN = 10


class Retrieval(TaskSettings):
    """Queries against a corpus, ranked by the cosine of embeddings: recall, mean reciprocal rank, nDCG.

    An embedding is the mean of a text's last hidden states, or the last one. A base model that was trained for nothing of the kind
    gives poor ones: the figures are for models trained to embed, and for how much fine-tuning moved them.
    """

    kind: Literal["retrieval"]
    corpus: Source
    """Where the documents come from."""
    document: Annotated[str, AfterValidator(checked_template)] = "{text}"
    """What is embedded of a document, with columns in braces."""
    document_id: str = "id"
    """Column with the document's name."""
    query: Annotated[str, AfterValidator(checked_template)] = "{query}"
    """What is embedded of a query, with columns in braces: also the place for an instruction."""
    relevant: str = "relevant"
    """Column with the names of the documents that are right: one, a list, or an object that grades each."""
    pooling: Literal["mean", "last"] = "mean"
    """What is taken of a text's hidden states."""
    k: tuple[int, ...] = Field(default=(10, 1, 100), min_length=1)
    """For which k recall@k and nDCG@k are computed; the first is what models are compared by. Reciprocal ranks go to the largest."""

    main_figure: ClassVar[str] = ""

    def measure(self, subject: Subject) -> TaskResult:
        """nDCG@k and recall@k for every k, and the mean reciprocal rank.

        Raises:
            DataError: two documents have one name, or a query names none that there is.
        """
        import numpy as np

        from ftcli.metrics.ranking import ndcg_at, recall_at, reciprocal_rank

        if min(self.k) < 1:
            raise DataError(f"task `{self.name}`", [Problem("k", f"found {min(self.k)}, allowed: 1 or more")])
        embedder = Embedder(subject, self.pooling)
        names, documents = self._corpus(embedder)
        places = {name: place for place, name in enumerate(names)}
        depth = min(max(self.k), len(names))
        rows, gains, ideals, counts = Rows(), [], [], []
        for part, progress in self.parts(subject, TEXTS_AT_ONCE):
            grades = [_graded(row, self.relevant, where, places) for where, row in part]
            queries = embedder.embed([fill(self.query, row, where) for where, row in part], progress)
            for (where, row), graded, best in zip(part, grades, _best(queries, documents, depth), strict=True):
                gain = [graded.get(place, 0.0) for place in best]
                gains.append(gain)
                ideals.append((sorted(graded.values(), reverse=True) + [0.0] * depth)[:depth])
                counts.append(sum(grade > 0 for grade in graded.values()))
                found = {"found": [names[place] for place in best[:NUM_SHOWN]], "relevant": [names[place] for place in graded]}
                rows.append({"where": where, "query": fill(self.query, row, where), **found})
        table, ideal, relevant = np.array(gains), np.array(ideals), np.array(counts, dtype=np.float64)
        figures: dict[str, Figure] = {}
        for k in self.k:
            figures[f"ndcg_at_{k}"] = mean_figure(ndcg_at(table, ideal, k))
        for k in self.k:
            figures[f"recall_at_{k}"] = mean_figure(recall_at(table, relevant, k))
        figures["reciprocal_rank"] = mean_figure(reciprocal_rank(table))
        notes = [f"{embedder.num_cut} texts are longer than the model sees: their ends were cut"] if embedder.num_cut else []
        return TaskResult(figures, rows, notes, embedder.num_tokens)

    def check(self, subject: Subject) -> None:
        places: dict[str, int] = {}
        for where, row in self.corpus.rows():
            places.setdefault(text_column(row, self.document_id, where), len(places))
            fill(self.document, row, where)
        for where, row in self.read_rows():
            fill(self.query, row, where)
            _graded(row, self.relevant, where, places)

    def prompts(self, rows: Sequence[tuple[str, dict[str, Any]]], tokenizer: Tokenizer) -> list[str]:
        return [fill(self.query, row, where) for where, row in rows]

    def fingerprints(self) -> list[str]:
        return [*super().fingerprints(), self.corpus.fingerprint()]

    def _corpus(self, embedder: Embedder) -> tuple[list[str], Vectors]:
        """Names of the documents, and (n, D) their embeddings."""
        import numpy as np

        names: dict[str, str] = {}
        vectors = []
        for part in in_parts(self.corpus.rows(), TEXTS_AT_ONCE):
            for where, row in part:
                name = text_column(row, self.document_id, where)
                if name in names:
                    problem = Problem(where, f"column `{self.document_id}`: `{name}` is the name of the document of {names[name]}, too")
                    raise DataError(f"task `{self.name}`", [problem])
                names[name] = where
            vectors.append(embedder.embed([fill(self.document, row, where) for where, row in part], lambda done, total: None))
        if not names:
            raise DataError(f"task `{self.name}`: `{self.corpus.label()}` has no documents")
        return list(names), np.concatenate(vectors)


class Embedder:
    """Texts to vectors of length 1."""

    def __init__(self, subject: Subject, pooling: Literal["mean", "last"]) -> None:
        from ftcli.models.generate import context_length

        self._subject, self._pooling = subject, pooling
        self._limit = context_length(subject.model.module)
        self.num_cut = 0
        """Texts that lost their ends."""
        self.num_tokens = 0

    def embed(self, texts: Sequence[str], progress: Progress) -> Vectors:
        """(n, D) float32.

        Raises:
            DataError: a text is empty.
        """
        import numpy as np
        import torch

        from ftcli.data.tree import SPAN, path_tree
        from ftcli.layout.build import build_batch
        from ftcli.layout.plan import plan_micro_batches

        subject, vectors, done = self._subject, {}, 0
        trees = [path_tree(np.array(self._tokens(text), dtype=np.int32), np.zeros(0, dtype=SPAN), 0, 0) for text in texts]
        subject.model.eval()
        with torch.inference_mode():
            for part in plan_micro_batches([len(tree) for tree in trees], 1, subject.batch_tokens)[0]:
                nothing = [np.zeros(len(trees[place]), dtype=np.float32) for place in part]
                batch = build_batch(subject.model.layout, [trees[place] for place in part], nothing, subject.tokenizer.pad_id or 0)
                batch = batch.to(next(subject.model.parameters()).device)
                hidden = subject.model.hidden_states(batch).float()
                for place, end in zip(part, batch.readout.tolist(), strict=True):
                    states = hidden[end - len(trees[place]) + 1 : end + 1] if self._pooling == "mean" else hidden[end : end + 1]
                    vector = states.mean(dim=0)
                    vectors[place] = (vector / vector.norm().clamp(min=1e-12)).cpu().numpy()
                self.num_tokens += batch.num_tokens
                done += len(part)
                progress(done, len(texts))
        return np.stack([vectors[place] for place in range(len(texts))])

    def _tokens(self, text: str) -> list[int]:
        from ftcli.models.generate import prompt_ids

        if not text.strip():
            raise DataError("a text cannot be embedded", [Problem("an empty text", "has no tokens", "leave the row out")])
        tokens = prompt_ids(self._subject.tokenizer, text)
        if self._limit is not None and len(tokens) > self._limit:
            self.num_cut += 1
        return tokens[: self._limit]


def _best(queries: Vectors, documents: Vectors, depth: int) -> Iterator[list[int]]:
    """For each query the places of its best documents, the best first; of equal ones the earlier."""
    import numpy as np

    size = max(1, MAX_SCORES // len(documents))
    for start in range(0, len(queries), size):
        scores = queries[start : start + size] @ documents.T
        for row in scores:
            # Equal scores at the border are all candidates, so that which one is taken does not depend on how they were found.
            border = np.partition(row, len(row) - depth)[len(row) - depth]
            candidates = np.flatnonzero(row >= border)
            yield candidates[np.argsort(-row[candidates], kind="stable")][:depth].tolist()


def _graded(row: dict[str, Any], name: str, where: str, places: dict[str, int]) -> dict[int, float]:
    """Grade of each relevant document by its place.

    Raises:
        DataError: the column is neither a name, a list of names nor grades, or names a document that is not there.
    """
    value = column(row, name, where)
    listed = value if isinstance(value, list | dict) else [value]
    grades: list[tuple[Any, Any]] = list(value.items()) if isinstance(value, dict) else [(item, 1.0) for item in listed]
    found: dict[int, float] = {}
    for item, grade in grades:
        if (
            isinstance(item, bool | list | dict)
            or item is None
            or isinstance(grade, bool)
            or not isinstance(grade, int | float)
            or grade < 0
        ):
            what = f"column `{name}` is neither a document's name, a list of them, nor an object of grades from 0 up"
            raise DataError("a row cannot be read", [Problem(where, what)])
        if str(item) not in places:
            raise DataError("a row cannot be read", [Problem(where, f"column `{name}`: there is no document `{item}` in the corpus")])
        found[places[str(item)]] = float(grade)
    if not any(grade > 0 for grade in found.values()):
        raise DataError("a row cannot be read", [Problem(where, f"column `{name}` names no relevant document", "leave the row out")])
    return found
