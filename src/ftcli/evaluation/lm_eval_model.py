"""Our model as lm-evaluation-harness sees one: its tasks, our forest. Imports lm_eval, which is an extra."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from ftcli.data.tree import SPAN, path_tree
from ftcli.evaluation.choices import Continuations, score_continuations
from ftcli.evaluation.tasks.task import Subject
from ftcli.evaluation.windows import windows
from ftcli.models.generate import GREEDY, Sampling, context_length, generate, prompt_ids

MAX_NEW_TOKENS, MAX_LENGTH = 256, 2048


class FtcliLM(LM):  # type: ignore[misc]  # the harness has no types
    """The model under evaluation, in memory. Contexts that several requests have in common are computed once.

    Texts are encoded as the harness's own Hugging Face model encodes them. Where `loglikelihood_rolling` cuts a text that is longer
    than the model sees, its windows are one token shorter than the harness's.
    """

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self._subject = subject
        self._limit = context_length(subject.model.module) or MAX_LENGTH
        self.num_tokens = 0

    @property
    def tokenizer_name(self) -> str:
        return "ftcli"

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(nats, whether greedy decoding gives it) of each continuation after its context."""
        asked = [request.args for request in requests]
        rows = [Continuations(context, tuple(choice for _, choice in group)) for context, group in groupby(asked, key=lambda one: one[0])]
        subject = self._subject
        scored = score_continuations(
            subject.model,
            subject.tokenizer,
            rows,
            with_greedy=True,
            batch_tokens=subject.batch_tokens,
            progress=subject.progress,
        )
        self.num_tokens += scored.num_tokens
        return [(one.log_prob, bool(one.is_greedy)) for found in scored.likelihoods for one in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Nats of each text, all of its tokens predicted, the first one from the token that texts begin with."""
        import numpy as np
        import torch

        from ftcli.layout.build import build_batch
        from ftcli.layout.plan import plan_micro_batches

        tokenizer, model = self._subject.tokenizer, self._subject.model
        first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        encoded = [[*([] if first is None else [first]), *tokenizer.encode(request.args[0])[0]] for request in requests]
        pieces = [(row, *piece) for row, tokens in enumerate(encoded) for piece in windows(len(tokens), self._limit, self._limit - 1)]
        sums, done = np.zeros(len(encoded)), 0
        model.eval()
        with torch.inference_mode():
            for part in plan_micro_batches([end - start for _, start, _, end in pieces], 1, self._subject.batch_tokens)[0]:
                chosen = [pieces[index] for index in part]
                trees = [
                    path_tree(np.array(encoded[row][start:end], dtype=np.int32), np.zeros(0, dtype=SPAN), 0, row)
                    for row, start, _, end in chosen
                ]
                weights = [(np.arange(start, end) >= begin).astype(np.float32) for _, start, begin, end in chosen]
                batch = build_batch(model.layout, trees, weights, tokenizer.pad_id or 0).to(next(model.parameters()).device)
                owners = np.array([chosen[place][0] for place in batch.example.tolist()])
                np.add.at(sums, owners, model(batch).double().cpu().numpy())
                self.num_tokens += batch.num_tokens
                done += len(part)
                self._subject.progress(done, len(pieces))
        return [float(total) for total in sums]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to the first of the texts that end it."""
        found: list[str] = [""] * len(requests)
        by_settings: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            by_settings.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(place)
        for places in by_settings.values():
            for place, text in zip(places, self._continued([requests[place].args for place in places]), strict=True):
                found[place] = text
        return found

    def _continued(self, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        from ftcli.evaluation.answer_scores import Told

        settings, subject = asked[0][1], self._subject
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        most = int(settings.get("max_gen_toks", MAX_NEW_TOKENS))
        sampling = GREEDY
        if settings.get("do_sample", False):
            sampling = Sampling(float(settings.get("temperature", 1.0)), settings.get("top_p"), settings.get("top_k"))
        answers = generate(
            subject.model.module,
            subject.tokenizer,
            [self._shortened(context, most) for context, _ in asked],
            max_new_tokens=most,
            sampling=sampling,
            stop=stops,
            progress=Told(subject.progress),
        )
        self.num_tokens += sum(len(answer.tokens) for answer in answers)
        return [answer.text for answer in answers]

    def _shortened(self, context: str, most: int) -> str:
        """The end of a context that would leave no room for `most` tokens."""
        tokens, room = prompt_ids(self._subject.tokenizer, context), max(1, self._limit - most)
        return context if len(tokens) <= room else self._subject.tokenizer.decode(tokens[-room:])
