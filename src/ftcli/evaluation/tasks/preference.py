"""Preference: does the model find the better of two answers likelier?"""

from __future__ import annotations

from array import array
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator

from ftcli.evaluation.choices import Continuations, score_continuations
from ftcli.evaluation.rows import Rows
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

        samples, margins, per_token, num_cut, num_tokens = Rows(), array("d"), array("d"), 0, 0
        for part, progress in self.parts(subject):
            read = [
                (where, fill(self.prompt, row, where), text_column(row, self.chosen, where), text_column(row, self.rejected, where))
                for where, row in part
            ]
            rows = [Continuations(prompt, (self.separator + chosen, self.separator + rejected)) for _, prompt, chosen, rejected in read]
            scored = score_continuations(subject.model, subject.tokenizer, rows, batch_tokens=subject.batch_tokens, progress=progress)
            for (where, prompt, chosen, rejected), (better, worse) in zip(read, scored.likelihoods, strict=True):
                margin = better.log_prob - worse.log_prob
                margins.append(margin)
                per_token.append(better.log_prob / better.num_tokens - worse.log_prob / worse.num_tokens)
                asked = {"where": where, "prompt": prompt, "chosen": chosen, "rejected": rejected}
                samples.append({**asked, "margin": margin, "accuracy": float(margin > 0)})
            num_cut, num_tokens = num_cut + scored.num_cut, num_tokens + scored.num_tokens
        figures = {
            "accuracy": share_figure((np.array(margins) > 0).astype(np.float64)),
            "accuracy_by_token": share_figure((np.array(per_token) > 0).astype(np.float64)),
            "margin": mean_figure(np.array(margins)),
        }
        notes = [f"{num_cut} prompts lost their beginning: the model sees too few tokens"] if num_cut else []
        return TaskResult(figures, samples, notes, num_tokens)
