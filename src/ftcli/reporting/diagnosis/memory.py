"""Whether the model has lost what it could do before."""

from __future__ import annotations

from ftcli.reporting.diagnosis.facts import Facts
from ftcli.reporting.diagnosis.finding import Finding, Unjudged, Verdict

WORSE, LEAST_NATS = 1.1, 0.03
"""A retained loss that has risen by this factor and so many nats: less is what a healthy run with a little replay costs."""


def forgetting(facts: Facts) -> Verdict:
    """The loss on retained text has risen."""
    retained = [name for name, role in facts.roles.items() if role == "retained"]
    both = {name: found for name in retained if len(found := facts.evaluations(name)) > 1 and found[0][0] == 0}
    if not both and retained:
        # A run that was stopped has measured them before its first step alone.
        return Unjudged("the retained sources were not measured both before and after training")
    if not both:
        return Unjudged("no evaluation source has role: retained")
    worse = {name: found for name, found in both.items() if found[-1][1] > WORSE * found[0][1] and found[-1][1] - found[0][1] > LEAST_NATS}
    if not worse:
        return None
    evidence = []
    for name, found in worse.items():
        before, (step, after) = found[0][1], found[-1]
        bits = [value for _, value in facts.evaluations(name, "bits_per_byte")]
        told = f", {bits[0]:.4f} to {bits[-1]:.4f} bits per byte" if len(bits) > 1 else ""
        evidence.append(f"loss on `{name}`: {before:.4f} before, {after:.4f} at step {step} ({100 * (after / before - 1):+.0f} %){told}")
    has_replay = any(source.get("role") == "replay" for source in facts.sources)
    advice = [
        "a larger weight of the replay source"
        if has_replay
        else "replay: a training source with role: replay, weight 0.05 to 0.1, of such text"
    ]
    advice += ["a lower train.lr, or fewer steps", "an adapter instead of full fine-tuning, or a smaller rank"]
    return Finding("forgetting", f"the model has lost on {', '.join(f'`{name}`' for name in worse)}", tuple(evidence), tuple(advice))
