"""Classification: which of a fixed set of labels a text has, and whether the model's certainty can be believed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from ftcli.data.formats.label import Label
from ftcli.errors import DataError, Problem, RequestError
from ftcli.evaluation.choices import Continuations, score_continuations
from ftcli.evaluation.rows import ROWS_AT_ONCE, Rows
from ftcli.evaluation.statistics import bootstrap_counts
from ftcli.evaluation.tasks.columns import checked_template, fill, text_column
from ftcli.evaluation.tasks.shots import Examples, Questions, Shots, before_each, embedding_of
from ftcli.evaluation.tasks.task import Figure, Subject, TaskResult, TaskSettings, mean_figure, share_figure

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]
    Listed = Sequence[tuple[str, dict[str, Any]]]

MAX_LABELS = 1000


class Classification(TaskSettings):
    """A label for each row: by the log-likelihood of label words, or by the classification head of a model that has one.

    Probabilities are those of the labels among themselves. The calibration error is over bins of equal numbers of rows: Nixon et
    al. 2019, arXiv:1904.01685 (ACE, for the likeliest label); the Brier score is summed over labels, 0 to 2.
    """

    kind: Literal["classification"]
    text: str = "text"
    """Column with the text."""
    label: str = "label"
    """Column with the right label; a label that is none of `labels` counts as wrong."""
    labels: tuple[str, ...] | dict[str, str] | None = Field(default=None, min_length=2)
    """The labels, or for each label the word that the model is asked for; the default is those of the rows (a head brings its own)."""
    prompt: Annotated[str, AfterValidator(checked_template)] | None = None
    """What the model reads, with columns in braces; the default is `{text}` with `Label:` on a line of its own. A head reads the text."""
    separator: str = " "
    """What stands between prompt and label word."""
    normalise: Literal["none", "tokens"] = "none"
    """What a label word's log-likelihood is divided by; `tokens` is for words of different length."""
    num_bins: int = Field(default=15, ge=2)
    """Of the calibration error; a larger value sees more and is noisier."""
    shots: Shots | None = None
    """Solved examples before every text; a head takes none."""

    main_figure: ClassVar[str] = "accuracy"

    def check_rows(self, rows: Listed, subject: Subject) -> None:
        from ftcli.layout.model import inner_model
        from ftcli.models.classifier import is_classifier

        has_head = is_classifier(inner_model(subject.model.module))
        for where, row in rows:
            text_column(row, self.label, where)
            text_column(row, self.text, where) if has_head or self.prompt is None else fill(self.prompt, row, where)

    def measure(self, subject: Subject) -> TaskResult:
        """Accuracy, macro- and micro-F1, calibration error and Brier score; the tables of labels, confusion and reliability beside."""
        import numpy as np

        from ftcli.layout.model import inner_model
        from ftcli.models.classifier import is_classifier

        has_head = is_classifier(inner_model(subject.model.module))
        labels = _head_labels(subject) if has_head else self._words()
        names, places = list(labels), {label: place for place, label in enumerate(labels)}
        rows, notes, truths, probabilities, tokens = Rows(), _Notes(), [], [], 0
        scored = self._by_head(subject, notes) if has_head else self._by_words(subject, labels, notes)
        for part, prompts, shares, num_tokens in scored:
            tokens += num_tokens
            truth = np.array([places.get(text_column(row, self.label, where).strip(), -1) for where, row in part])
            truths.append(truth)
            probabilities.append(shares)
            for (where, row), prompt, right, share in zip(part, prompts, truth.tolist(), shares, strict=True):
                best = int(share.argmax())
                rows.append(
                    {
                        "where": where,
                        "text": str(row.get(self.text, ""))[:500],
                        **({} if has_head else {"prompt": prompt}),
                        "label": text_column(row, self.label, where),
                        "predicted": names[best],
                        "probability": float(share[best]),
                        "accuracy": float(best == right),
                    }
                )
        truth, shares = np.concatenate(truths), np.concatenate(probabilities)
        if unseen := int((truth < 0).sum()):
            notes.add(f"{unseen} rows have a label that is none of the {len(names)} labels: they count as wrong")
        return TaskResult(*_figures(shares, truth, names, self.num_bins, rows, notes.listed, tokens))

    def prompts(self, rows: Any, tokenizer: Any) -> list[str]:
        template = self.prompt or f"{{{self.text}}}\nLabel:"
        return [fill(template, row, where) for where, row in rows]

    def _words(self) -> dict[str, str]:
        """The word of each label.

        Raises:
            DataError: the rows have too few labels, or too many.
        """
        if isinstance(self.labels, dict):
            return self.labels
        if self.labels is not None:
            return {label: label for label in self.labels}
        found = sorted({text_column(row, self.label, where).strip() for where, row in self.read_rows()})
        if not 2 <= len(found) <= MAX_LABELS:
            what = f"{len(found)} different labels in column `{self.label}`"
            raise DataError(f"task `{self.name}`", [Problem("labels", what, "name them in `labels`")])
        return {label: label for label in found}

    def _by_words(self, subject: Subject, labels: dict[str, str], notes: _Notes) -> Iterator[tuple[Listed, list[str], Numbers, int]]:
        """(rows, what was asked, probabilities, tokens computed) part by part."""
        import numpy as np

        words = tuple(self.separator + word for word in labels.values())
        cut = 0
        for part, progress in self.parts(subject, None if self.shots is not None else ROWS_AT_ONCE):
            prompts = self.prompts(part, subject.tokenizer)
            shots = self._shots(subject, labels, part)
            for note in shots.notes:
                notes.add(note)
            prompts = [shot + prompt for shot, prompt in zip(shots.texts, prompts, strict=True)]
            asked = [Continuations(prompt, words, where) for prompt, (where, _) in zip(prompts, part, strict=True)]
            scored = score_continuations(subject.model, subject.tokenizer, asked, batch_tokens=subject.batch_tokens, progress=progress)
            cut += scored.num_cut
            divided = [
                [one.log_prob / (one.num_tokens if self.normalise == "tokens" else 1) for one in found] for found in scored.likelihoods
            ]
            yield part, prompts, _softmax(np.array(divided)), scored.num_tokens
        if cut:
            notes.add(f"{cut} contexts lost their beginning: the model sees too few tokens")

    def _shots(self, subject: Subject, labels: dict[str, str], part: Listed) -> Examples:
        """What stands before each prompt."""

        def solved(rows: Listed, bare: Sequence[str] = ()) -> Questions:
            prompts = self.prompts(rows, subject.tokenizer)
            words = [labels.get(text_column(row, self.label, where).strip(), "") for where, row in rows]
            answered = [prompt + self.separator + word for prompt, word in zip(prompts, words, strict=True)]
            return Questions([where for where, _ in rows], prompts, answered, bare)

        bare = self.bare_prompts(subject.tokenizer) if self.shots is not None else ()
        return before_each(self.shots, solved(part, bare), solved, embedding_of(subject))

    def _by_head(self, subject: Subject, notes: _Notes) -> Iterator[tuple[Listed, list[str], Numbers, int]]:
        """(rows, nothing for each, probabilities, tokens computed) part by part, by the model's own head.

        Raises:
            RequestError: the model's head gives several labels or a number.
        """
        import numpy as np
        import torch

        from ftcli.data.overflow import fit
        from ftcli.data.tokenise import Tokeniser
        from ftcli.layout.build import build_batch
        from ftcli.layout.plan import plan_micro_batches
        from ftcli.models.generate import context_length

        settings, tokeniser = Label(text=self.text, label=self.label), Tokeniser(subject.tokenizer)
        limit, device, cut = context_length(subject.model.module), next(subject.model.parameters()).device, 0
        subject.model.eval()
        for part, progress in self.parts(subject):
            encoded = [
                tokeniser.encode(settings.question(row, subject.tokenizer, where), where, place) for place, (where, row) in enumerate(part)
            ]
            cut += sum(limit is not None and tree.longest_branch > limit for tree in encoded)
            trees = [tree for one in encoded for tree in fit(one, limit or one.longest_branch, "truncate_prompt")]
            shares, num_tokens = np.zeros((len(part), len(_head_labels(subject)))), 0
            with torch.inference_mode():
                for chosen in plan_micro_batches([len(tree) for tree in trees], 1, subject.batch_tokens)[0]:
                    weights = [np.zeros(len(trees[place]), dtype=np.float32) for place in chosen]
                    batch = build_batch(subject.model.layout, [trees[place] for place in chosen], weights, subject.tokenizer.pad_id or 0)
                    shares[chosen] = _softmax(subject.model(batch.to(device)).double().cpu().numpy())
                    num_tokens += batch.num_tokens
            progress(1, 1)
            yield part, [""] * len(part), shares, num_tokens
        if cut:
            notes.add(f"{cut} texts are longer than the model sees: they were cut")


class _Notes:
    """What a reader must know, gathered on the way."""

    def __init__(self) -> None:
        self.listed: list[str] = []

    def add(self, note: str) -> None:
        self.listed.append(note)


def _head_labels(subject: Subject) -> dict[str, str]:
    """The labels of the model's own head.

    Raises:
        RequestError: it gives several labels, or a number.
    """
    from ftcli.layout.model import inner_model

    config: Any = inner_model(subject.model.module).config
    if config.num_labels < 2 or config.problem_type in ("multi_label_classification", "regression"):
        what = f"its head is for {str(config.problem_type or 'regression').replace('_', ' ')}"
        raise RequestError("the model gives no single label", [Problem("kind: classification", what, None)])
    return {str(config.id2label[place]): str(config.id2label[place]) for place in range(config.num_labels)}


def _softmax(logits: Numbers) -> Numbers:
    """(n, C) shares that sum to 1."""
    import numpy as np

    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def _figures(
    shares: Numbers, truth: NDArray[np.int64], names: list[str], num_bins: int, rows: Rows, notes: list[str], tokens: int
) -> tuple[dict[str, Figure], Rows, list[str], int, dict[str, Any]]:
    """What a result is made of."""
    import numpy as np

    from ftcli.metrics.classification import UNSEEN, equal_mass_bins, macro_f1_of_counts, reliability, report

    predicted, sure = shares.argmax(axis=1), shares.max(axis=1)
    is_right = predicted == truth
    accuracy = share_figure(is_right.astype(np.float64))
    # Rows with the same label and prediction count alike: the table of confusion is all that macro-F1 depends on.
    cells, which, repeats = np.unique(np.stack([truth, predicted], axis=1), axis=0, return_inverse=True, return_counts=True)
    counts, lines = np.zeros((len(cells), 3 * len(names) + 1)), np.arange(len(cells))
    seen = cells[:, 0] != UNSEEN
    counts[lines[cells[:, 0] == cells[:, 1]], cells[cells[:, 0] == cells[:, 1], 0]] = 1
    counts[lines, len(names) + cells[:, 1]] = 1
    counts[lines[seen], 2 * len(names) + cells[seen, 0]] = 1
    counts[:, -1] = ~seen
    macro, pulls = bootstrap_counts(counts, macro_f1_of_counts, repeats=repeats)
    bins = equal_mass_bins(sure, num_bins)
    gaps = np.zeros((len(truth), int(bins.max()) + 2))
    gaps[np.arange(len(truth)), bins] = is_right - sure
    gaps[:, -1] = 1
    error, error_pulls = bootstrap_counts(gaps, lambda sums: np.abs(sums[..., :-1]).sum(axis=-1) / np.maximum(sums[..., -1], 1))
    chosen = np.where(truth == UNSEEN, 0.0, shares[np.arange(len(truth)), np.maximum(truth, 0)])
    figures = {
        "accuracy": accuracy,
        "macro_f1": Figure(macro, pulls[which.reshape(-1)]),
        "micro_f1": accuracy,
        "calibration_error": Figure(error, error_pulls, higher_is_better=False),
        "brier": mean_figure((shares**2).sum(axis=1) + 1 - 2 * chosen, higher_is_better=False),
    }
    table = report(shares, truth, names)
    details = {
        "classes": table["classes"],
        "confusion": table["confusion"],
        "reliability": reliability(sure, is_right, bins),
    }
    return figures, rows, notes, tokens, {"classification": details}
