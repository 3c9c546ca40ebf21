"""Kinds of task: figures that other libraries give, too, and rows that cannot be read are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from sklearn import metrics as sk
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from ftcli.errors import DataError, FtcliError, RequestError, UsageError
from ftcli.evaluation.choices import score_continuations
from ftcli.evaluation.evaluate import open_subject
from ftcli.evaluation.measurement import measure_task
from ftcli.evaluation.rows import Rows, in_parts
from ftcli.evaluation.tasks import Task, multiple_choice
from ftcli.evaluation.tasks.multiple_choice import answer_index
from ftcli.evaluation.tasks.retrieval import Embedder
from ftcli.evaluation.tasks.task import Subject
from ftcli.evaluation.user_metrics import load_user_metrics
from ftcli.metrics.classification import equal_mass_bins
from ftcli.metrics.ranking import ndcg_at, recall_at, reciprocal_rank
from ftcli.models.tokenizer import load_tokenizer

WORDS = ["ball", "dog", "cat", "sun", "tree", "boat"]


@pytest.fixture(scope="module")
def subject() -> Subject:
    return open_subject("builtin:tiny", "cpu")[1]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def task(path: Path, **settings: Any) -> Any:
    return TypeAdapter(Task).validate_python({"name": "t", "source": {"kind": "file", "path": str(path)}, **settings}, strict=False)


# ---- generation --------------------------------------------------------------------------------------------------------------


def generation(path: Path, **settings: Any) -> Any:
    return task(path, kind="generation", max_new_tokens=8, **{"metrics": [{"kind": "exact-match"}], **settings})


def test_of_a_list_of_references_the_best_counts(subject: Subject, tmp_path: Path) -> None:
    rows = [{"prompt": f"Once upon a time there was a {word}", "completion": "x"} for word in WORDS]
    answers = [row["answer"] for row in generation(write(tmp_path / "a.jsonl", rows)).measure(subject).rows]
    listed = [{**row, "completion": ["never", answer]} for row, answer in zip(rows, answers, strict=True)]
    result = generation(write(tmp_path / "b.jsonl", listed)).measure(subject)
    assert result.figures["exact_match"].interval.value == 1.0
    assert result.rows[0]["reference"] == ["never", answers[0]]
    beside = [{**row, "aliases": [answer]} for row, answer in zip(rows, answers, strict=True)]
    assert (
        generation(write(tmp_path / "c.jsonl", beside), references="aliases").measure(subject).figures["exact_match"].interval.value == 1.0
    )
    with pytest.raises(DataError, match=r"c.jsonl:1: column `alias` is missing"):
        generation(tmp_path / "c.jsonl", references="alias").measure(subject)


def test_corpus_metrics_are_of_the_corpus(subject: Subject, tmp_path: Path) -> None:
    rows = [{"prompt": f"Once upon a time there was a {word}", "completion": " named Lily. She was happy."} for word in WORDS]
    kinds = [{"kind": "bleu"}, {"kind": "rouge"}, {"kind": "chrf"}, {"kind": "token-f1"}]
    result = generation(write(tmp_path / "a.jsonl", rows), metrics=kinds).measure(subject)
    assert list(result.figures) == ["bleu", "rouge_l", "chrf", "token_f1", "ended"]
    import sacrebleu

    answers = [row["answer"] for row in result.rows]
    assert result.figures["chrf"].interval.value == pytest.approx(
        sacrebleu.corpus_chrf(answers, [[row["completion"] for row in rows]]).score / 100
    )
    assert result.figures["chrf"].interval.low < result.figures["chrf"].interval.value < result.figures["chrf"].interval.high


def test_a_prompt_longer_than_the_model_sees_counts_as_wrong(subject: Subject, tmp_path: Path) -> None:
    rows = [{"prompt": "Once upon a time", "completion": "x"}, {"prompt": "word " * 5000, "completion": "x"}]
    result = generation(write(tmp_path / "a.jsonl", rows), metrics=[{"kind": "chrf"}, {"kind": "exact-match"}]).measure(subject)
    assert result.rows[1]["answer"] == ""
    assert result.notes == ["1 prompts leave no room for an answer: they count as wrong"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "a.jsonl: is empty"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "a.jsonl:2: column .*completion"),
        ([{"prompt": "a", "completion": []}], "a.jsonl:1: column `completion` is an empty list"),
        ([{"prompt": "a", "completion": ""}], "a.jsonl:1: column `completion` is empty"),
        ([{"prompt": "a", "completion": ["b", 3]}], "a.jsonl:1: column `completion` holds a number among its answers, not a text"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": [None]}], "a.jsonl:2: column `completion` holds null"),
        ([{"prompt": "a", "completion": None}], "a.jsonl:1: column `completion` is null, not a text"),
        ([{"prompt": "a", "completion": {"x": 1}}], "a.jsonl:1: column `completion` is an object, not a text"),
    ],
)
def test_a_row_without_an_answer_is_named(rows: list[dict[str, Any]], message: str, subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(FtcliError, match=message):
        generation(write(tmp_path / "a.jsonl", rows)).measure(subject)


def test_a_column_beside_a_chat_or_an_answer_may_hold_anything(subject: Subject, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    assert len(generation(write(tmp_path / "a.jsonl", [{"messages": chat, "output": [1, 2]}])).measure(subject).rows) == 1
    assert len(generation(write(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b", "answer": [1]}])).measure(subject).rows) == 1


@pytest.mark.parametrize("kind", ["generation", "multiple-choice", "classification"])
def test_no_kind_of_task_shows_a_row_its_own_answer(kind: str, subject: Subject, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "generation": {"metrics": [{"kind": "exact-match"}], "max_new_tokens": 2},
        "multiple-choice": {"choices": [f"W{n}" for n in range(6)]},
        "classification": {"labels": [f"W{n}" for n in range(6)]},
    }[kind]
    question, answer = {"generation": ("prompt", "completion"), "multiple-choice": ("question", "answer")}.get(kind, ("text", "label"))
    rows = [{question: f"Once there was a {word}", answer: f"W{n}"} for n, word in enumerate(WORDS)]
    path = write(tmp_path / "a.jsonl", rows)
    documents = {"kind": "file", "path": str(write(tmp_path / "docs.jsonl", [{"text": f"A {word} is not a toy."} for word in WORDS]))}
    for choose, retrieve in (("nearest", None), ("embedding", None), ("nearest", {"source": documents, "count": 1})):
        shots = {"count": 2, "choose": choose, "source": {"kind": "file", "path": str(path)}}
        if retrieve is not None and kind == "classification":
            retrieve = None
        made = task(path, kind=kind, shots=shots, retrieve=retrieve, **settings)
        result = measure_task(made, subject)
        assert all(row["prompt"].count("W") == 2 and f"W{n}" not in row["prompt"] for n, row in enumerate(result.rows))
        assert "6 of 6 rows are asked in the examples of `a`, too" in result.notes[0]


# ---- user metrics --------------------------------------------------------------------------------------------------------------

OWN = """
import math

def length(answer, reference, row):
    return len(answer) / row["scale"]

def different(answers, references, rows):
    return len(set(answers)) / len(answers)

def _hidden(x):
    return math.pi
"""


def test_own_metrics_of_rows_and_of_all(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    rows = [{"prompt": f"Once there was a {word}", "completion": "x", "scale": 10} for word in WORDS]
    own = Subject(subject.model, subject.tokenizer, 4096, lambda done, total: None, user_metrics=load_user_metrics(tmp_path / "own.py"))
    result = generation(write(tmp_path / "a.jsonl", rows)).measure(own)
    assert list(result.figures) == ["exact_match", "length", "different", "ended"]
    answers = [row["answer"] for row in result.rows]
    assert result.figures["length"].interval.value == pytest.approx(sum(map(len, answers)) / 60)
    assert result.figures["different"].interval.value == len(set(answers)) / 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def m(answer, reference, row):\n    return 1 / 0\n", r"a.jsonl:1: own.py:2: ZeroDivisionError"),
        ("def m(answer, reference, row):\n    return row['no']\n", r"a.jsonl:1: own.py:2: KeyError: 'no'"),
        ("\n\ndef m(answer, reference, row):\n    return 'good'\n", r"a.jsonl:1: own.py:3: gives 'good', and no number"),
        ("def m(answers, references, rows):\n    return float('nan')\n", r"all rows: own.py:1: gives nan"),
        ("def exact_match(answer, reference, row):\n    return 1\n", "is the name of another figure"),
    ],
)
def test_what_goes_wrong_in_an_own_metric_has_file_line_and_row(text: str, message: str, subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(text)
    own = Subject(subject.model, subject.tokenizer, 4096, lambda done, total: None, user_metrics=load_user_metrics(tmp_path / "own.py"))
    with pytest.raises(RequestError, match=message):
        generation(write(tmp_path / "a.jsonl", [{"prompt": "Once", "completion": "x"}])).measure(own)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def m(a, b):\n    return 1\n", r"own.py:1: `m` takes \(a, b\)"),
        ("x = 1\ny = 1 / 0\n", "own.py:2: ZeroDivisionError"),
        ("def m(:\n", "own.py:1: SyntaxError"),
        ("import math\nfrom os.path import join\n", "defines no function"),
    ],
)
def test_a_file_of_metrics_that_cannot_be_used_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_user_metrics(tmp_path / "own.py")


# ---- classification ------------------------------------------------------------------------------------------------------------

LABELS = ["happy", "sad", "blue"]


def labelled(count: int) -> list[dict[str, Any]]:
    return [{"text": f"Mia saw a {WORDS[n % 6]} and {n} stars.", "label": LABELS[(n * n) % 3]} for n in range(count)]


def test_classification_by_label_words_agrees_with_scikit_learn(subject: Subject, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*labelled(60), {"text": "What?", "label": "odd"}])
    result = task(path, kind="classification", labels=dict.fromkeys(LABELS, "x") | {"sad": "was", "happy": "and", "blue": "the"}).measure(
        subject
    )
    truth, predicted = [row["label"] for row in result.rows], [row["predicted"] for row in result.rows]
    figures = {name: figure.interval.value for name, figure in result.figures.items()}
    assert len(set(predicted)) > 1
    assert figures["accuracy"] == pytest.approx(sk.accuracy_score(truth, predicted))
    assert figures["macro_f1"] == pytest.approx(sk.f1_score(truth, predicted, average="macro", zero_division=0))
    assert figures["micro_f1"] == pytest.approx(sk.f1_score(truth, predicted, average="micro"))
    details = result.details["classification"]
    assert details["confusion"]["counts"] == sk.confusion_matrix(truth[:-1], predicted[:-1], labels=LABELS).tolist()
    bins = details["reliability"]
    error = sum(one["examples"] * abs(one["accuracy"] - one["confidence"]) for one in bins) / 61
    assert figures["calibration_error"] == pytest.approx(error)
    assert sum(one["examples"] for one in bins) == 61
    assert result.figures["macro_f1"].values.mean() == pytest.approx(figures["macro_f1"])
    assert "1 rows have a label that is none of the 3 labels: they count as wrong" in result.notes


def test_bins_hold_equally_many_and_equal_confidences_stay_together() -> None:
    sure = np.random.default_rng(0).permutation(np.linspace(0.3, 0.9, 1000))
    assert set(np.bincount(equal_mass_bins(sure, 10)).tolist()) == {100}
    assert len(set(equal_mass_bins(np.full(50, 0.5), 10).tolist())) == 1
    assert equal_mass_bins(np.array([0.2, 0.2, 0.9, 0.9]), 2).tolist() == [0, 0, 1, 1]


def test_classification_by_a_head_is_that_of_transformers(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("builtin:tiny")
    tokenizer.save(tmp_path / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        id2label=dict(enumerate(LABELS)), label2id={label: n for n, label in enumerate(LABELS)}, pad_token_id=tokenizer.pad_id or 0,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "model")
    _, head = open_subject(str(tmp_path / "model"), "cpu")
    rows = labelled(20)
    result = task(write(tmp_path / "a.jsonl", rows), kind="classification").measure(head)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    for row, found in zip(rows, result.rows, strict=True):
        ids = ([tokenizer.bos_id] if tokenizer.adds_bos else []) + tokenizer.encode(row["text"])[0]
        with torch.inference_mode():
            shares = model(torch.tensor([ids])).logits[0].softmax(-1)
        assert found["predicted"] == LABELS[int(shares.argmax())]
        assert found["probability"] == pytest.approx(float(shares.max()), abs=1e-5)


# ---- multiple choice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "value", "expected"),
    [
        ("auto", 1, 1), ("auto", "b", 1), ("auto", 20, 1), ("auto", "20", 1), ("auto", "3", 2), ("auto", 3, None), ("auto", 0, 0),
        ("index", 3, 3), ("text", 3, 2), ("number", 3, 2), ("number", 0, None), ("number", 4, 3), ("letter", "D", 3), ("letter", 1, None),
        ("index", "3", 3), ("index", 40, None), ("text", 1, None), ("auto", True, None), ("auto", 7, None),
    ],
)  # fmt: skip
def test_an_answer_is_read_as_the_task_says_and_one_that_means_two_choices_is_refused(
    answers: Any, value: Any, expected: int | None
) -> None:
    choices = ["10", "20", "3", "40"]
    if expected is not None:
        assert answer_index(value, choices, "a:1", "answer", answers) == expected
        return
    with pytest.raises(DataError, match="and the text of another choice" if value == 3 else "is none of the choices"):
        answer_index(value, choices, "a:1", "answer", answers)


@pytest.mark.parametrize(
    ("prompt", "premise"),
    [
        (None, "Answer:"),
        ("Q: {question}\nLabel:", "Label:"),
        ("{question} The answer is", "The answer is"),
        ("Read.\n{question}", ""),
        ("{question}\nWell?\nIt is {question}:", ":"),
    ],
)
def test_what_a_choice_has_without_its_question_is_after_the_end_of_the_prompt(
    prompt: str | None, premise: str, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def scored(model: Any, tokenizer: Any, rows: Any, **options: Any) -> Any:
        asked.append([row.context for row in rows])
        return score_continuations(model, tokenizer, rows, **options)

    monkeypatch.setattr(multiple_choice, "score_continuations", scored)
    rows = [{"question": f"Is it a {word}?", "choices": ["yes", "no"], "answer": 0} for word in WORDS]
    settings = {} if prompt is None else {"prompt": prompt}
    task(write(tmp_path / "a.jsonl", rows), kind="multiple-choice", normalise="pmi", **settings).measure(subject)
    assert asked[1] == [premise] * 6


# ---- preference ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rejected": "b "}, "columns `chosen` and `rejected` hold the same answer: `b`"),
        ({"chosen": " "}, "column `chosen` is empty"),
        ({"rejected": ""}, "column `rejected` is empty"),
        ({"rejected": []}, "column `rejected` is empty"),
        ({"chosen": [{"role": "assistant", "content": ""}]}, "column `chosen` is empty"),
        ({"chosen": [{"role": "assistant", "content": "c"}]}, "hold the same answer"),
    ],
)
def test_a_pair_without_a_better_answer_is_refused_before_anything_is_measured(
    changes: dict[str, Any], message: str, subject: Subject, tmp_path: Path
) -> None:
    made = task(write(tmp_path / "a.jsonl", [WHOLE, {**WHOLE, **changes}]), kind="preference")
    with pytest.raises(DataError, match=f"a.jsonl:2: .*{message}"):
        made.check(subject)


# ---- language modelling --------------------------------------------------------------------------------------------------------


def test_a_window_or_a_stride_that_cannot_be_had_is_noted(subject: Subject, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [WHOLE])
    context = subject.model.module.config.max_position_embeddings
    notes = task(path, kind="language-modelling", window=10**6, stride=10**5).measure(subject).notes
    assert notes[0] == f"`window` is {context} tokens, not 1000000: the model sees no more"
    assert notes[1].startswith(f"`stride` is {context - 1} tokens, not 100000: ")
    assert task(path, kind="language-modelling", window=16, stride=8).measure(subject).notes == []


# ---- retrieval -----------------------------------------------------------------------------------------------------------------


def test_ranking_figures_are_those_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    scores, grades = generator.normal(size=(20, 30)), generator.integers(0, 4, size=(20, 30)).astype(float)
    order = np.argsort(-scores, axis=1)
    gains, ideal = np.take_along_axis(grades, order, axis=1), -np.sort(-grades, axis=1)
    for k in (1, 5, 30):
        expected = [sk.ndcg_score(truth[None], score[None], k=k) for truth, score in zip(grades, scores, strict=True)]
        assert ndcg_at(gains, ideal, k).tolist() == pytest.approx(expected)
    binary = (grades > 2).astype(float)
    gains, relevant = np.take_along_axis(binary, order, axis=1), binary.sum(axis=1)
    ranked = scores.argsort(axis=1)[:, ::-1]
    recalls = [sk.recall_score(truth, np.isin(np.arange(30), best[:5])) for truth, best in zip(binary, ranked, strict=True)]
    assert recall_at(gains, relevant, 5).tolist() == pytest.approx(recalls)
    # With one relevant document the mean reciprocal rank is what scikit-learn calls label ranking average precision.
    one = np.eye(30)[generator.integers(0, 30, 20)]
    mean = reciprocal_rank(np.take_along_axis(one, order, axis=1)).mean()
    assert mean == pytest.approx(sk.label_ranking_average_precision_score(one, scores))


def test_a_text_finds_itself(subject: Subject, tmp_path: Path) -> None:
    texts = [f"The {word} was big. {word} and {other} went home." for word in WORDS for other in WORDS]
    corpus = write(tmp_path / "corpus.jsonl", [{"id": n, "text": text} for n, text in enumerate(texts)])
    queries = write(tmp_path / "q.jsonl", [{"query": text, "relevant": n} for n, text in enumerate(texts)])
    for pooling in ("mean", "last"):
        made = task(queries, kind="retrieval", corpus={"kind": "file", "path": str(corpus)}, pooling=pooling, k=[1, 10])
        result = made.measure(subject)
        assert result.figures["recall_at_1"].interval.value == 1.0
        assert result.figures["ndcg_at_1"].interval.value == 1.0
        assert result.figures["reciprocal_rank"].interval.value == 1.0


def test_embeddings_are_the_mean_or_last_of_plain_hidden_states(subject: Subject) -> None:
    texts = ["Once upon a time", "The dog ran to the big red tree and sat down.", "Hi"]
    found = {pooling: Embedder(subject, pooling).embed(texts, lambda done, total: None) for pooling in ("mean", "last")}
    layout = subject.model.layout
    subject.model.use_layout("rows")
    for place, text in enumerate(texts):
        ids = torch.tensor([subject.tokenizer.encode(text)[0]])
        with torch.inference_mode():
            hidden = subject.model.module.base_model(input_ids=ids).last_hidden_state[0]
        for pooling, vector in (("mean", hidden.mean(0)), ("last", hidden[-1])):
            assert found[pooling][place].tolist() == pytest.approx((vector / vector.norm()).tolist(), abs=1e-5)
    subject.model.use_layout(layout)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "a", "relevant": 7}, "q.jsonl:1: column `relevant`: there is no document `7`"),
        ({"query": "a", "relevant": []}, "names no relevant document"),
        ({"query": "a", "relevant": {"0": "high"}}, "neither a document's name"),
        ({"query": "a"}, "column `relevant` is missing"),
        ({"query": " ", "relevant": 0}, "has no tokens"),
    ],
)
def test_a_query_that_cannot_be_asked_is_named(row: dict[str, Any], message: str, subject: Subject, tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.jsonl", [{"id": 0, "text": "one"}, {"id": 1, "text": "two"}])
    made = task(write(tmp_path / "q.jsonl", [row]), kind="retrieval", corpus={"kind": "file", "path": str(corpus)})
    with pytest.raises(FtcliError, match=message):
        made.measure(subject)


# ---- all of them -----------------------------------------------------------------------------------------------------------

WHOLE = {"text": "a", "label": "b", "question": "a", "choices": ["b", "c"], "answer": 0, "prompt": "a", "chosen": "b", "rejected": "c"}
KINDS = {
    "classification": ({"labels": ["b", "c"]}, ["text", "label"]),
    "language-modelling": ({}, ["text"]),
    "multiple-choice": ({}, ["question", "choices", "answer"]),
    "preference": ({}, ["prompt", "chosen", "rejected"]),
}


@pytest.mark.parametrize(("kind", "column"), [(kind, column) for kind, (_, columns) in KINDS.items() for column in columns])
def test_a_missing_column_is_named_with_its_line(kind: str, column: str, subject: Subject, tmp_path: Path) -> None:
    rows = [WHOLE, {name: value for name, value in WHOLE.items() if name != column}]
    with pytest.raises(DataError, match=f"a.jsonl:2: column `{column}` is missing"):
        task(write(tmp_path / "a.jsonl", rows), kind=kind, **KINDS[kind][0]).measure(subject)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_longer_than_the_model_sees_is_measured_and_noted(kind: str, subject: Subject, tmp_path: Path) -> None:
    long = "The dog ran home. " * 900
    rows = [WHOLE, {**WHOLE, "text": long, "question": long, "prompt": long}]
    result = task(write(tmp_path / "a.jsonl", rows), kind=kind, **KINDS[kind][0]).measure(subject)
    assert len(result.rows) == 2
    assert kind == "language-modelling" or "1 " in result.notes[0]


def test_preferences_between_conversations_are_written_by_the_chat_template(subject: Subject, tmp_path: Path) -> None:
    asked, said = {"role": "user", "content": "Are you there?"}, [{"role": "assistant", "content": text} for text in ("Yes.", "No!")]
    forms: list[dict[str, Any]] = [
        {"prompt": [asked], "chosen": [said[0]], "rejected": [said[1]]},
        {"prompt": [asked], "chosen": [asked, said[0]], "rejected": [asked, said[1]]},
        {"chosen": [asked, said[0]], "rejected": [asked, said[1]]},
        {"prompt": asked["content"], "chosen": [said[0]], "rejected": [said[1]]},
        {"prompt": [asked], "chosen": "Yes.", "rejected": "No!"},
    ]
    rows = task(write(tmp_path / "a.jsonl", forms), kind="preference").measure(subject).rows
    assert len({row["margin"] for row in rows}) == 1
    assert rows[0]["prompt"] == subject.tokenizer.render([asked], add_generation_prompt=True)
    assert rows[0]["chosen"] == "Yes.<|im_end|>"
    other = {"chosen": [asked, said[0]], "rejected": [{"role": "user", "content": "Who?"}, said[1]]}
    with pytest.raises(DataError, match="do not answer the same prompt"):
        task(write(tmp_path / "a.jsonl", [other]), kind="preference").measure(subject)


# ---- rows ----------------------------------------------------------------------------------------------------------------------


def test_rows_on_the_disk_read_like_a_list(tmp_path: Path) -> None:
    listed = [{"n": n, "text": "é\n" * n} for n in range(10)]
    rows = Rows(listed)
    assert list(rows) == listed
    assert (rows[3], rows[-1], rows[2:4], len(rows)) == (listed[3], listed[-1], listed[2:4], 10)
    rows.append({"n": 10})
    assert rows[10] == {"n": 10}
    (tmp_path / "rows.jsonl").write_bytes(b"".join(rows.lines()))
    assert list(Rows.of_file(tmp_path / "rows.jsonl")) == list(rows)
    with pytest.raises(IndexError):
        rows[11]


def test_parts_hold_every_row_once() -> None:
    rows = [(str(n), {}) for n in range(10)]
    assert [len(part) for part in in_parts(rows, 4)] == [4, 4, 2]
    assert [row for part in in_parts(rows, 5) for row in part] == rows
    assert [len(part) for part in in_parts(rows, None)] == [10]
