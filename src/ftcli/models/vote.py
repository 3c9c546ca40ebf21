"""Several answers to one prompt, and the one that most of them are. Source: Lester et al. 2021, arXiv:2104.08691, section 6."""

from __future__ import annotations

from collections.abc import Sequence


def vote(answers: Sequence[str], log_probs: Sequence[float]) -> int:
    """Index of the answer that wins: of the text that most members gave, the one that its member held the likeliest.

    Texts are compared without the white space around them; nothing is an answer, too. Among texts with as many votes the summed
    log-probability of their voters decides, so that without any majority the likeliest answer wins; among equals the first.

    Args:
        answers: one of each member.
        log_probs: of each answer, in nats, summed over its tokens.

    Example:
        >>> vote(["tea", "milk", "tea "], [-3.0, -0.1, -2.0]), vote(["tea", "milk"], [-3.0, -0.1])
        (2, 1)
    """
    texts = [answer.strip() for answer in answers]
    votes = {text: [log_prob for other, log_prob in zip(texts, log_probs, strict=True) if other == text] for text in texts}
    # The first of equals: dicts keep their order, and so does max.
    winner = max(votes, key=lambda text: (len(votes[text]), sum(votes[text])))
    return max((index for index, text in enumerate(texts) if text == winner), key=lambda index: log_probs[index])


def is_unanimous(answers: Sequence[str]) -> bool:
    """Whether all members gave the same text.

    Example:
        >>> is_unanimous(["tea", "tea "]), is_unanimous(["tea", ""])
        (True, False)
    """
    return len({answer.strip() for answer in answers}) == 1
