"""What a recipe may say under `data`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from ftcli.data.formats import Format
from ftcli.data.mixtures import Mixture
from ftcli.data.mixtures.passes import Passes
from ftcli.data.mixtures.replay import Replay
from ftcli.data.sources import Source
from ftcli.metrics import Metric
from ftcli.metrics.metric import without_doubles
from ftcli.spec import ExpandedName, Spec

OnOverflow = Literal["auto", "error", "drop", "truncate_prompt", "split"]


class TrainSource(Spec):
    """Rows to train on, how to read them, and how much they count."""

    source: Source
    """Where the rows come from."""
    format: Format | None = None
    """How a row becomes an example; left out, it is detected from the columns and named in the log."""
    name: ExpandedName | None = None
    """What logs and metrics call it; the default is made from the source."""
    role: Literal["new", "replay"] = "new"
    """`replay` marks rows from the distribution the base model already knows."""
    weight: float = Field(default=1.0, gt=0)
    """How much of it the mixture takes, in the mixture's own unit; a larger value means more of it."""
    loss_weight: float = Field(default=1.0, gt=0)
    """Factor on the loss of every target of this source; rows and turns may carry a `weight` of their own, too."""
    limit: int | None = Field(default=None, ge=1)
    """Take only the first so many rows."""
    unit: Literal["row", "block"] = "row"
    """What one example is: `row` makes it of one row; `block`, for texts, lines them up, each with its EOS, and cuts every
    `data.max_length` tokens, so that steps are equally long. No text sees another in either."""


class Generate(Spec):
    """Answers are generated for the held-out prompts and compared with the reference, before and after training."""

    metrics: Annotated[tuple[Metric, ...], AfterValidator(without_doubles)] = Field(min_length=1)
    """How an answer is compared with its reference; a corpus metric such as `bleu` is one figure of all answers."""
    max_new_tokens: int = Field(default=128, ge=1)
    """An answer is cut here; a larger value costs time."""
    limit: int | None = Field(default=200, ge=1)
    """Generate for the first so many rows only."""


class EvaluationSource(Spec):
    """Held-out rows: loss, perplexity and bits per byte during training, and generated answers where asked for."""

    source: Source
    """Where the rows come from."""
    format: Format | None = None
    """How a row becomes an example; left out, it is detected from the columns and named in the log."""
    name: ExpandedName | None = None
    """What logs and metrics call it; the default is made from the source."""
    role: Literal["target", "retained"] = "target"
    """`retained` is what must not be lost: its change from before training is reported."""
    limit: int | None = Field(default=None, ge=1)
    """Take only the first so many rows."""
    holdout: float | None = Field(default=None, gt=0, lt=1)
    """Take only this share of these rows, at most 1000, chosen by their content; where the run trains on the same source, it leaves them
    out. For what an earlier run held out by itself; the default takes all rows."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest example of this source in tokens; the default is `data.max_length`. What an earlier run or stage has measured is measured
    with that one's, so that the figures are of the same text."""
    on_overflow: OnOverflow | None = None
    """What happens to a longer one of this source; the default is `data.on_overflow`."""
    generate: Generate | None = None
    """Also generate answers and score them."""


def default_mixture(data: dict[str, Any]) -> Mixture:
    """The mixture of sources that are not told how to mix: `replay` where some are replayed and none of these says how much."""
    sources: tuple[TrainSource, ...] = data["train"]
    replayed = [source for source in sources if source.role == "replay"]
    has_both = 0 < len(replayed) < len(sources)
    return Replay() if has_both and all(source.weight == 1.0 for source in replayed) else Passes()


class Data(Spec):
    """What is seen, in which order and proportion."""

    train: tuple[TrainSource, ...] = Field(min_length=1)
    """The sources to train on."""
    evaluation: tuple[EvaluationSource, ...] = ()
    """Held-out sources; with none, `holdout` of the training rows is held out, if there is one training source."""
    holdout: float = Field(default=0.05, ge=0, lt=1)
    """Share of rows held out when `evaluation` is empty and there is one training source; 0 holds out nothing. At most 1000 rows."""
    mixture: Mixture = Field(default_factory=default_mixture)
    """How the sources are mixed. Left out, it is `replay` with its schedule where there are sources of both roles and no replayed one
    has a `weight`, else `passes`."""
    max_length: int = Field(default=1024, ge=2)
    """Longest example in tokens, along its longest branch."""
    on_overflow: OnOverflow = "auto"
    """What happens to a longer one: `error` refuses to train and lists it, `drop` leaves it out and counts it, `truncate_prompt`
    cuts the prompt from its beginning, `split` makes several examples of it. `auto` splits texts and is `error` for the rest."""
    workers: int | None = Field(default=None, ge=1)
    """Tokenising processes; the default is the number of cores, at most 8."""

    def longest(self) -> int:
        """Tokens of the longest example that any of the sources may have."""
        return max(self.max_length, *(source.max_length or 0 for source in self.evaluation), 0)

    def held_out(self) -> EvaluationSource | None:
        """The rows that a run holds out of its one training source by itself, for later runs to measure; None where it holds out none."""
        if self.evaluation or len(self.train) != 1 or self.holdout == 0:
            return None
        entry = self.train[0]
        name = f"{entry.name or entry.source.label()}-holdout"
        return EvaluationSource(source=entry.source, format=entry.format, limit=entry.limit, name=name, holdout=self.holdout)
