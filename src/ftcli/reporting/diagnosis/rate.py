"""Whether the learning rate was too high or too low, and whether what trains did anything at all."""

from __future__ import annotations

from ftcli.reporting.diagnosis.facts import Facts, mean, points
from ftcli.reporting.diagnosis.finding import Finding, Unjudged, Verdict

PEAK_RATIO, END_RATIO, REBOUND_RATIO, LEAST_NATS = 1.5, 1.1, 2.0, 0.3
"""Against the first loss: a peak, an end; against the lowest stretch: a rise again; each by at least so many nats."""
FIRST_STEPS = 3
COLLAPSE_RATIO, COLLAPSE_NATS, FAST = 4.0, 2.0, 3.0
"""What a retained loss grows by when the model comes apart, as a factor and in nats, at so many times the default rate."""
LOW_RATIO, SMALL_DROP = 0.1, 0.15
"""Of the method's default rate; of the first loss."""
DEAD_NATS = 1e-4
"""A change of the probe that is less than this is rounding."""


def rate_too_high(facts: Facts) -> Verdict:
    """The loss goes up: a peak far above the start, an end above it, or a rise from the lowest point."""
    if not facts.losses:
        return Unjudged("no step was logged")
    # A rate that is right may take most of the loss away in three steps: what comes later is held against the highest of them.
    start = max(value for step, value in facts.losses if step < facts.losses[0][0] + FIRST_STEPS)
    last, is_fast = facts.end, facts.lr_ratio is not None and facts.lr_ratio >= FAST
    peak_step, peak = max(facts.losses, key=lambda point: point[1])
    reasons = []
    if peak > PEAK_RATIO * start and peak - start > LEAST_NATS:
        reasons.append(f"training loss {start:.4f} at the start, up to {peak:.4f} at step {peak_step}")
    # Two or three logged steps may be of hard rows: then the rate has to be unusual, too.
    if last > END_RATIO * start and last - start > LEAST_NATS and (facts.has_curve or is_fast or last > PEAK_RATIO * start):
        reasons.append(f"training loss {start:.4f} at the start, {last:.4f} at the end")
    if facts.has_curve:
        low = min(mean(facts.part(share / 8, (share + 1) / 8)) for share in range(8))
        if last > REBOUND_RATIO * low and last - low > LEAST_NATS:
            reasons.append(f"training loss down to {low:.4f}, and up again to {last:.4f}")
    if is_fast:
        reasons += _collapsed(facts)
    if facts.run.state == "failed" and len(facts.losses) > 1 and facts.losses[-1][1] > PEAK_RATIO * start:
        reasons.append("the run failed while its loss rose")
    if not reasons:
        return None
    gradients = points(facts.run.metrics.of_kind("train"), "grad_norm")
    if gradients:
        reasons.append(f"gradient norm {gradients[0][1]:.3g} at step {gradients[0][0]}, at most {max(value for _, value in gradients):.3g}")
    advice = ["a tenth of train.lr, and from there up by factors of 2 or 3"]
    if facts.lr_ratio is not None:
        reasons.append(f"the peak rate {facts.lr:.3g} is {facts.lr_ratio:.3g} times the method's default for this model")
        advice += ["no train.lr at all: the method has a default for this width"] if facts.lr_ratio > 2 else []
    advice += ["a longer warm-up (train.schedule.warmup_ratio)", "a smaller train.max_grad_norm"]
    return Finding("rate too high", "the learning rate is too high: the loss goes up instead of down", tuple(reasons), tuple(advice))


def _collapsed(facts: Facts) -> list[str]:
    """Retained text that has become strange to the model, which less than a collapse does not do; and all held-out losses higher."""
    found = {name: both for name in facts.roles if len(both := facts.evaluations(name)) > 1 and both[0][0] == 0}
    ends = {name: (both[0][1], both[-1][1]) for name, both in found.items()}
    rise = {name: (first, last) for name, (first, last) in ends.items() if last > END_RATIO * first and last - first > LEAST_NATS}
    reasons = [
        f"loss on `{name}`: {first:.4f} before, {last:.4f} at the end: more is lost than what new rows put in its place"
        for name, (first, last) in rise.items()
        if facts.roles[name] == "retained" and last > COLLAPSE_RATIO * first and last - first > COLLAPSE_NATS
    ]
    if len(rise) == len(ends) > 1 and not reasons:
        told = ", ".join(f"`{name}` {first:.4f} to {last:.4f}" for name, (first, last) in rise.items())
        reasons.append(f"every held-out loss has risen: {told}")
    return reasons


def rate_too_low(facts: Facts) -> Verdict:
    """The loss hardly moves, and the rate is far below what the method usually takes."""
    if not facts.has_curve:
        return Unjudged("too few steps were logged for a curve")
    if facts.lr_ratio is None:
        return Unjudged("the manifest does not say what the method's default rate is")
    drop = (facts.start - facts.end) / facts.start if facts.start else 0.0
    if facts.lr_ratio >= LOW_RATIO or drop > SMALL_DROP or facts.end < LEAST_NATS:
        return None
    evidence = [
        f"the peak rate {facts.lr:.3g} is {facts.lr_ratio:.2g} times the method's default for this model",
        f"training loss {facts.start:.4f} at the start, {facts.end:.4f} after {facts.run.step} steps ({100 * drop:.1f} % less)",
    ]
    if facts.probe_change is not None:
        evidence.append(f"a token's log-probability has moved by {facts.probe_change['mean']:.2g} nats on average")
    return Finding(
        "rate too low",
        "the learning rate is too low: the model is nearly where it began",
        tuple(evidence),
        ("ten times train.lr, or none at all: the method has a default for this width", "more steps help only when the rate is right"),
    )


def dead_adapter(facts: Facts) -> Verdict:
    """What was trained changes nothing that the model says."""
    if facts.run.step == 0 or facts.run.state != "finished":
        return Unjudged("the run has not finished")
    moved = _largest_move(facts)
    if moved is None:
        return Unjudged("the run did not note what the model said before")
    if moved > DEAD_NATS or (facts.lr_ratio is not None and facts.lr_ratio < 1e-3):
        return None
    evidence = [f"after {facts.run.step} steps no log-probability has moved by more than {moved:.1e} nats"]
    gradients = points(facts.run.metrics.of_kind("train"), "grad_norm")
    if gradients:
        evidence.append(f"gradient norm at most {max(value for _, value in gradients):.1e}")
    scale = {key: facts.method[key] for key in ("alpha", "scaling", "rank", "dropout") if facts.method.get(key) is not None}
    if scale:
        evidence.append("method: " + ", ".join(f"{key} {value}" for key, value in scale.items()))
    return Finding(
        "dead adapter",
        "what was trained does nothing: the model says what it said before the first step",
        tuple(evidence),
        ("method.alpha (or scaling) of the size of method.rank", "target_modules: all-linear", "init: the method's default"),
    )


def _largest_move(facts: Facts) -> float | None:
    """The largest change of anything measured before and after."""
    if facts.probe_change is not None:
        return facts.probe_change["largest"]
    both = [(found[0], found[-1]) for name in facts.roles if len(found := facts.evaluations(name)) > 1]
    moves = [abs(after - before) for (first, before), (last, after) in both if first == 0 < last]
    return max(moves, default=None)
