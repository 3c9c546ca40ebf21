"""Preference: does the model find the better of two answers likelier?"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator

from ftcli.evaluation.choices import Continuations, score_continuations
from ftcli.evaluation.tasks.columns import checked_template, fill, text_column
from ftcli.evaluation.tasks.task import Subject, TaskResult, TaskSettings, mean_figure, share_figure


class Preference(TaskSettings):
    """Pairs of answers to one prompt: accuracy is the share of rows whose chosen answer has the higher log-likelihood."""

    kind: Literal["preference"]
    prompt: Annotated[str, AfterValidator(checked_template)] = "{prompt}"
    """What comes before the answers, with columns in braces."""
    chosen: str = "chosen"
    """Column with the better answer."""
    rejected: str = "rejected"
    """Column with the worse one."""
    separator: str = "\n"
    """What stands between prompt and answer."""

    main_figure: ClassVar[str] = "accuracy"

    def measure(self, subject: Subject) -> TaskResult:
        """Accuracy by the sum and by the mean over tokens, and the mean margin in nats."""
        import numpy as np

        read = [
            (where, fill(self.prompt, row, where), text_column(row, self.chosen, where), text_column(row, self.rejected, where))
            for where, row in self.read_rows()
        ]
        rows = [Continuations(prompt, (self.separator + chosen, self.separator + rejected)) for _, prompt, chosen, rejected in read]
        scored = score_continuations(subject.model, subject.tokenizer, rows, batch_tokens=subject.batch_tokens, progress=subject.progress)
        pairs = np.array([[one.log_prob for one in both] for both in scored.likelihoods])
        sizes = np.array([[one.num_tokens for one in both] for both in scored.likelihoods])
        margins, per_token = pairs[:, 0] - pairs[:, 1], (pairs / sizes)[:, 0] - (pairs / sizes)[:, 1]
        figures = {
            "accuracy": share_figure((margins > 0).astype(np.float64)),
            "accuracy_by_token": share_figure((per_token > 0).astype(np.float64)),
            "margin": mean_figure(margins),
        }
        samples = [
            {
                "where": where,
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
                "margin": float(margin),
                "accuracy": float(margin > 0),
            }
            for (where, prompt, chosen, rejected), margin in zip(read, margins, strict=True)
        ]
        notes = [f"{scored.num_cut} prompts lost their beginning: the model sees too few tokens"] if scored.num_cut else []
        return TaskResult(figures, samples, notes, scored.num_tokens)
