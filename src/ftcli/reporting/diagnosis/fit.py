"""Whether a run learnt too long, too little, or not long enough."""

from __future__ import annotations

from ftcli.reporting.diagnosis.facts import Facts, mean
from ftcli.reporting.diagnosis.finding import Finding, Unjudged, Verdict

RISE, LEAST_RISE, FALLEN = 1.05, 0.03, 0.7
"""A held-out loss that ends so far above its best, as a factor and in nats, has risen; a training loss at this share has fallen far."""
GAP_RATIO, LEAST_GAP, GAP_REPEATS = 0.3, 0.5, 3.0
"""With one evaluation alone: a training loss so far below the held-out one, after so many passes over the rows."""
PLATEAU, POOR_SHARE, POOR_NATS, PLATEAU_REPEATS = 0.03, 0.5, 0.3, 2.0
"""A loss that moves less than this share in its last third, and is still this share of the first one and so many nats."""
STILL_FALLING, LEAST_FALL = 0.1, 0.2
"""A loss that falls by this share, and by so many nats, in its last quarter; of a few logged steps, from one to the next."""
FEW_STEPS = 10
"""Where only the first and the last step were logged, a run of so many steps or fewer is a short one."""


def overfitting(facts: Facts) -> Verdict:
    """The held-out loss rises while the training loss falls on."""
    held_out = {name: facts.evaluations(name) for name, role in facts.roles.items() if role != "retained"}
    if not any(len(found) > 1 for found in held_out.values()):
        return Unjudged("there is no held-out loss before and after")
    for name, found in held_out.items():
        after = [(step, loss) for step, loss in found if step > 0]
        if not after:
            continue
        (best_step, best), (last_step, last) = min(found, key=lambda point: point[1]), after[-1]
        has_risen = last > RISE * best and last - best > LEAST_RISE
        # Where the best is before the first step, only a training loss that fell far says that rows were learnt by heart.
        earlier = [loss for step, loss in facts.losses if step <= best_step] or [FALLEN * facts.start]
        if has_risen and facts.losses and facts.end < mean(earlier[-3:]):
            return _overfitted(
                facts, name, f"held-out loss of `{name}`: {best:.4f} at step {best_step}, {last:.4f} at step {last_step}", best_step
            )
        is_gap = facts.end < GAP_RATIO * last and last - facts.end > LEAST_GAP and (facts.repeats or 0) >= GAP_REPEATS
        if is_gap and facts.has_curve and last > found[0][1] * 0.5:
            return _overfitted(facts, name, f"held-out loss of `{name}`: {last:.4f} at step {last_step}", None)
    return None


def _overfitted(facts: Facts, name: str, evidence: str, best_step: int | None) -> Finding:
    seen = f"every row was seen {facts.repeats:.1f} times" if facts.repeats else f"{facts.run.step} steps"
    where = f" after step {best_step}" if best_step else ""
    return Finding(
        "overfitting",
        f"the model learns its training rows by heart{where}: what it does on held-out rows of `{name}` gets worse meanwhile",
        (evidence, f"training loss at the end: {facts.end:.4f}", seen),
        (
            "train.early_stopping with every.evaluate set: the best step's weights are kept"
            if best_step
            else "every.evaluate and train.early_stopping: the best step's weights are kept",
            "fewer epochs, or more and more varied rows",
            "a smaller rank, a lower train.lr, dropout, or weight decay",
        ),
    )


def underfitting(facts: Facts) -> Verdict:
    """The loss has come to rest high, on rows it has seen more than once."""
    if not facts.has_curve:
        return Unjudged("too few steps were logged for a curve")
    if facts.is_text_only:
        return Unjudged("of plain text nobody knows how low its loss can be")
    third, last = mean(facts.part(0.66, 0.84)), facts.end
    rests = abs(third - last) < PLATEAU * third
    is_poor = last > POOR_SHARE * facts.start and last > POOR_NATS
    if not (rests and is_poor and (facts.repeats or 0) >= PLATEAU_REPEATS) or (facts.lr_ratio or 1.0) < 0.1:
        return None
    trainable = facts.run.manifest.get("parameters", {})
    share = f"{trainable.get('trainable', 0):,} of {trainable.get('total', 0):,} numbers train" if isinstance(trainable, dict) else ""
    return Finding(
        "underfitting",
        "the loss has come to rest while it is still high: what trains has no room for the task",
        (
            f"training loss {facts.start:.4f} at the start, {third:.4f} after two thirds, {last:.4f} at the end",
            f"every row was seen {facts.repeats or 0:.1f} times",
            share,
        ),
        (
            "more that trains: a larger method.rank, target_modules: all-linear, or kind: full",
            "a higher train.lr, then more epochs",
            "a larger base model",
        ),
    )


def too_few_steps(facts: Facts) -> Verdict:
    """The loss was still falling when the run ended."""
    if len(facts.losses) < 2 or (len(facts.losses) == 2 and facts.run.step > FEW_STEPS):
        return Unjudged("too few steps were logged to see whether the loss was falling")
    # Where the schedule ends near 0 the last steps hardly move: the last quarter is compared with the one before it.
    before, last = mean(facts.part(0.5, 0.75)), mean(facts.part(0.75, 1.0))
    where = "in the third quarter, {last} in the last,"
    if len(facts.losses) < 4:
        (earlier, before), (_, last) = facts.losses[-2:]
        where = f"at step {earlier}, {{last}}"
    falls = before - last > max(STILL_FALLING * before, LEAST_FALL) and last < facts.start
    if not falls or (facts.lr_ratio or 1.0) < 0.1:
        return None
    repeats = "" if facts.repeats is None else f"every row was seen {facts.repeats:.2f} times"
    return Finding(
        "too few steps",
        "the run ended while its loss was falling fast",
        (f"training loss {before:.4f} {where.format(last=f'{last:.4f}')} after {facts.run.step} steps", repeats),
        ("more train.epochs or train.steps", "a higher train.lr, if the time is limited"),
    )
