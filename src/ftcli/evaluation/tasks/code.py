"""Code: programs that the model writes are run against tests."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from ftcli.errors import UsageError
from ftcli.evaluation.rows import Rows
from ftcli.evaluation.tasks.columns import checked_template, fill, text_column, texts_column
from ftcli.evaluation.tasks.task import Progress, Subject, TaskResult, TaskSettings, mean_figure

if TYPE_CHECKING:
    from ftcli.evaluation.sandbox import Outcome
    from ftcli.models.tokenizer import Tokenizer

FENCE = "```"
# What begins a line after a function that is complete: Chen et al. 2021, section 3.2.
AFTER_A_FUNCTION = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", f"\n{FENCE}")
PROBLEMS_AT_ONCE = 64


class Code(TaskSettings):
    """pass@k: the chance that one of k programs passes all tests, estimated without bias from n of them.

    Programs are run, so the command line has to allow it: `--allow-code`. They run in a process without network where the kernel
    can take it away, with limits on time, memory and files.
    Source: Chen et al. 2021, arXiv:2107.03374, equation 1; its columns (HumanEval) are the defaults, and those of MBPP are
    `prompt: "{text}\\n"`, `tests: test_list`, `continues: false`.
    """

    kind: Literal["code"]
    prompt: Annotated[str, AfterValidator(checked_template)] = "{prompt}"
    """What the model reads, with columns in braces."""
    tests: str = "test"
    """Column with the tests: Python that raises where the program is wrong, a text or a list of them."""
    entry_point: str = "entry_point"
    """Column with the name of the function; a row that has it is tested by `check(NAME)` after its tests."""
    setup: str = "test_setup_code"
    """Column with Python that comes before everything, in rows that have it."""
    continues: bool = True
    """The answer goes on with the prompt, which is Python itself; else the program is the answer's first block of code, or all of it."""
    chat: bool = False
    """Put the prompt into the tokenizer's chat template."""
    samples: int = Field(default=1, ge=1)
    """Programs for each row."""
    k: tuple[int, ...] = Field(default=(1,), min_length=1)
    """For which k pass@k is estimated, none above `samples`; the first is what models are compared by."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token each time, which more than one sample has no use for."""
    seed: int = Field(default=17, ge=0)
    """Of drawn programs."""
    max_new_tokens: int = Field(default=256, ge=1)
    """A program is cut here."""
    stop: tuple[str, ...] | None = None
    """Texts at which an answer is cut; the default is what begins a line after a function, where the answer goes on with the prompt."""
    timeout_seconds: float = Field(default=10.0, gt=0)
    """Of processor time, and of wall time twice as many."""
    memory_mib: int = Field(default=1024, ge=64)
    """Address space of a program."""

    main_figure: ClassVar[str] = ""

    @model_validator(mode="after")
    def _samples_suffice(self) -> Self:
        if min(self.k) < 1 or max(self.k) > self.samples:
            raise ValueError(f"found k {list(self.k)}, allowed: 1 to `samples` ({self.samples})")
        if len(set(self.k)) < len(self.k):
            raise ValueError(f"found k {list(self.k)}, allowed: each once")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"found {self.samples} samples at temperature 0, which are all the same; allowed: a temperature above 0")
        return self

    def measure(self, subject: Subject) -> TaskResult:
        """pass@k for every k.

        Raises:
            UsageError: the command line does not allow programs to be run.
        """
        import numpy as np

        from ftcli.evaluation.sandbox import run_programs

        self.require_permission(subject.allow_code)
        rows, chances, isolated, tokens = Rows(), {k: array("d") for k in self.k}, True, 0
        for part, progress in self.parts(subject, PROBLEMS_AT_ONCE):
            answers, num_tokens = self._answers(subject, self.prompts(part, subject.tokenizer), progress)
            tests = [self._tests(row, where) for where, row in part]
            programs = [
                self._program(row, where, answer, test)
                for (where, row), own, test in zip(part, answers, tests, strict=True)
                for answer in own
            ]
            outcomes = run_programs(programs, seconds=self.timeout_seconds, memory_mib=self.memory_mib)
            isolated, tokens = isolated and all(outcome.is_isolated for outcome in outcomes), tokens + num_tokens
            for place, ((where, row), own) in enumerate(zip(part, answers, strict=True)):
                found = outcomes[place * self.samples : (place + 1) * self.samples]
                passes = sum(outcome.passed for outcome in found)
                scores = {k: pass_at_k(self.samples, passes, k) for k in self.k}
                for k, score in scores.items():
                    chances[k].append(score)
                rows.append(_shown(where, fill(self.prompt, row, where), own, found) | {_name(k): score for k, score in scores.items()})
        notes = (
            []
            if isolated
            else ["the kernel refused a part of the sandbox: programs ran with limits, but may have reached files, sockets and the network"]
        )
        return TaskResult({_name(k): mean_figure(np.array(values)) for k, values in chances.items()}, rows, notes, tokens)

    def require_permission(self, allow_code: bool) -> None:
        """Nothing, if programs may be run.

        Raises:
            UsageError: they may not.
        """
        if not allow_code:
            raise UsageError(f"task `{self.name}` runs programs that the model writes", hint="allow it with --allow-code")

    def check_rows(self, rows: Sequence[tuple[str, dict[str, Any]]], subject: Subject) -> None:
        self.prompts(rows, subject.tokenizer)
        for where, row in rows:
            self._program(row, where, "", self._tests(row, where))

    def prompts(self, rows: Sequence[tuple[str, dict[str, Any]]], tokenizer: Tokenizer) -> list[str]:
        texts = [fill(self.prompt, row, where) for where, row in rows]
        return [_in_chat(text, tokenizer, where) for text, (where, _) in zip(texts, rows, strict=True)] if self.chat else texts

    def _answers(self, subject: Subject, prompts: list[str], progress: Progress) -> tuple[list[list[str]], int]:
        """The answers to each prompt, and how many tokens they have; a prompt that leaves no room for one gets empty answers."""
        from ftcli.evaluation.answer_scores import Told
        from ftcli.models.generate import Sampling, context_length, generate, prompt_ids

        context = context_length(subject.model.module)
        fits = [context is None or len(prompt_ids(subject.tokenizer, prompt)) < context for prompt in prompts]
        asked = [prompt for prompt, has_room in zip(prompts, fits, strict=True) if has_room for _ in range(self.samples)]
        found = generate(
            subject.model.module,
            subject.tokenizer,
            asked,
            max_new_tokens=self.max_new_tokens,
            sampling=Sampling(self.temperature, seed=self.seed),
            stop=self._stops(),
            progress=Told(progress),
        )
        texts = iter([answer.text for answer in found])
        return [[next(texts) if has_room else "" for _ in range(self.samples)] for has_room in fits], sum(len(one.tokens) for one in found)

    def _stops(self) -> tuple[str, ...]:
        return self.stop if self.stop is not None else AFTER_A_FUNCTION if self.continues else ()

    def _tests(self, row: dict[str, Any], where: str) -> str:
        tests = "\n".join(texts_column(row, self.tests, where))
        return f"{tests}\n\ncheck({text_column(row, self.entry_point, where)})" if self.entry_point in row else tests

    def _program(self, row: dict[str, Any], where: str, answer: str, tests: str) -> str:
        before = [text_column(row, self.setup, where)] if row.get(self.setup) else []
        written = fill(self.prompt, row, where) + answer if self.continues else first_block(answer)
        return "\n".join([*before, written, "", tests])


def pass_at_k(samples: int, passes: int, k: int) -> float:
    """The chance that k programs drawn from the samples hold one that passes.

    Source: Chen et al. 2021, arXiv:2107.03374, equation 1: 1 - C(n - c, k) / C(n, k), as a product that does not overflow.

    Example:
        >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 4, 1), pass_at_k(4, 0, 4)
        (0.25, 0.5, 1.0, 0.0)
    """
    missed = 1.0
    for place in range(samples - passes + 1, samples + 1):
        missed *= max(0.0, 1 - k / place)
    return 1 - missed


def first_block(answer: str) -> str:
    """The first block of code between fences in an answer; all of it where there is none.

    Example:
        >>> first_block("Sure:\\n```python\\nx = 1\\n```\\nDone")
        'x = 1\\n'
    """
    _, fence, rest = answer.partition(FENCE)
    if not fence:
        return answer
    _, _, code = rest.partition("\n")
    return code.partition(FENCE)[0]


def _name(k: int) -> str:
    return f"pass_at_{k}"


def _in_chat(prompt: str, tokenizer: Tokenizer, where: str) -> str:
    """The prompt as a user's turn, with whatever the template puts before the answer."""
    from ftcli.data.example import question_of
    from ftcli.data.messages import read_messages
    from ftcli.data.template import chat_example

    turns = read_messages([{"role": "user", "content": prompt}, {"role": "assistant", "content": "x"}], where, "prompt")
    return question_of(chat_example(turns, tokenizer, where, tools=None, weight=1.0, turns="last"), tokenizer.end_texts)[0]


def _shown(where: str, prompt: str, answers: list[str], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {"where": where, "prompt": prompt, "answers": answers, "outcomes": [outcome.said for outcome in outcomes]}
