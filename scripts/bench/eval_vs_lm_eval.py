"""The same model and local tasks by `ftcli eval` and by lm-evaluation-harness 0.4.13, interleaved: time, memory, and equality.

    python scripts/bench/eval_vs_lm_eval.py --peer-python PEER/bin/python --shared ../shared [--rows 120] [--rounds 3]

PEER is an environment of its own with `lm_eval==0.4.13` and this project's torch and transformers. The model is a random Llama of
26 M parameters, made here; the tasks are made from gsm8k: four-choice questions, zero-shot and with five fixed shots, whose choices
are the last steps of solutions (about 30 tokens), and such with the first 160 characters of solutions; bits per byte of the
solutions, and 32 greedy tokens after each question. Each measurement is a process of its own, the two sides taking turns; seconds
are of the processor, which other work on the machine changes least, without imports and loading; both sides have as many threads as
OMP_NUM_THREADS says. Accuracies and answers must agree to the item, and log-likelihoods to 1e-4 relative to their size.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NUM_CHOICES, NUM_SHOTS = 4, 5
CONFIG = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,
}
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}, fewshot: {shots}}}}}
test_split: test
fewshot_split: fewshot
fewshot_config: {{sampler: first_n}}
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: {choices}
doc_to_target: answer
num_fewshot: {count}
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
TEXTS = """task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
ANSWERS = """task: answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: ["###"], max_gen_toks: {most}, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
MAX_NEW_TOKENS = 32
TASKS = {
    "zero-shot choices": "quiz0",
    "zero-shot, long choices": "long0",
    "5-shot choices": "quiz5",
    "texts": "texts",
    "answers": "answers",
}
"""Title by name; behind the name of a quiz stands how many shots it has."""
COLUMNS = {"quiz": "last_steps", "long": "beginnings"}


def make_inputs(folder: Path, shared: Path, rows: int) -> None:
    """Model, rows, and both sides' task files."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from ftcli.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(shared / "data" / "tokenizers" / "gpt2"))
    tokenizer.save(folder / "model")
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=tokenizer.vocab_size, **CONFIG, **ends)).save_pretrained(folder / "model")
    lines = (shared / "data" / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()[: rows + NUM_SHOTS]
    chats = [[turn["content"] for turn in json.loads(line)["messages"]] for line in lines]
    generator = random.Random(0)
    questions = []
    for place, (question, solution) in enumerate(chats):
        others = [chats[other][1] for other in generator.sample([i for i in range(len(chats)) if i != place], NUM_CHOICES - 1)]
        answer = generator.randrange(NUM_CHOICES)
        solutions = (*others[:answer], solution, *others[answer:])
        choices = {
            "last_steps": [text.splitlines()[-2].strip() for text in solutions],
            "beginnings": [text[:160].strip() for text in solutions],
        }
        questions.append({"question": question.strip(), **choices, "answer": answer, "text": solution.strip()})
    for name, part in (("rows", questions[:rows]), ("shots", questions[rows:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    (folder / "tasks").mkdir()
    for name in TASKS.values():
        if name[:4] in COLUMNS:
            files = {"rows": folder / "rows.jsonl", "shots": folder / "shots.jsonl"}
            text = TASK.format(name=name, count=int(name[4:]), choices=COLUMNS[name[:4]], **files)
            (folder / "tasks" / f"{name}.yaml").write_text(text)
    (folder / "tasks" / "texts.yaml").write_text(TEXTS.format(rows=folder / "rows.jsonl"))
    (folder / "tasks" / "answers.yaml").write_text(ANSWERS.format(rows=folder / "rows.jsonl", most=MAX_NEW_TOKENS))


def own_task(folder: Path, name: str) -> Any:
    """The task as a recipe of ftcli says it."""
    from pydantic import TypeAdapter

    from ftcli.evaluation.tasks import Task

    document: dict[str, Any] = {"name": name, "source": {"kind": "file", "path": str(folder / "rows.jsonl")}}
    if name[:4] in COLUMNS:
        document |= {"kind": "multiple-choice", "choices": COLUMNS[name[:4]]}
        if int(name[4:]):
            document["shots"] = {"count": NUM_SHOTS, "source": {"kind": "file", "path": str(folder / "shots.jsonl")}, "choose": "first"}
    elif name == "texts":
        document |= {"kind": "language-modelling", "window": 2048}
    else:
        columns = {"kind": "completion", "prompt": "asked", "completion": "text"}
        document |= {"kind": "generation", "format": columns, "metrics": [{"kind": "exact-match"}], "max_new_tokens": MAX_NEW_TOKENS}
        rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
        asked = [{**row, "asked": f"{row['question']}\nAnswer:"} for row in rows]
        (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
        document |= {"source": {"kind": "file", "path": str(folder / "asked.jsonl")}, "stop": ["###"]}
    return TypeAdapter(Task).validate_json(json.dumps(document))


def run_ftcli(folder: Path, name: str) -> dict[str, Any]:
    from ftcli.evaluation.evaluate import open_subject

    _, subject = open_subject(str(folder / "model"), "cpu")
    task = own_task(folder, name)
    began = time.process_time()
    result = task.measure(subject)
    seconds = time.process_time() - began
    if name == "answers":
        return {"seconds": seconds, "items": [row["answer"] for row in result.rows], "log_likelihoods": []}
    if name == "texts":
        loss = result.figures["loss"]
        nats = [[-float(value * weight)] for value, weight in zip(loss.values, loss.weights, strict=True)]
        return {"seconds": seconds, "items": [], "log_likelihoods": nats, "total": result.figures["bits_per_byte"].interval.value}
    by_character = result.figures["accuracy_by_character"].values.tolist()
    return {
        "seconds": seconds,
        "items": [list(both) for both in zip((row["accuracy"] for row in result.rows), by_character, strict=True)],
        "log_likelihoods": [row["log_likelihoods"] for row in result.rows],
    }


def run_lm_eval(folder: Path, name: str) -> dict[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32")
    peer = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder / "model"), batch_size=8, max_length=2048, device="cpu")
    tasks = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    began = time.process_time()
    result = lm_eval.simple_evaluate(model=peer, tasks=[name], task_manager=tasks, bootstrap_iters=0, log_samples=True)
    seconds = time.process_time() - began
    samples = sorted(result["samples"][name], key=lambda sample: sample["doc_id"])
    responses = [[one[0] if isinstance(one, list) else one for one in sample["resps"]] for sample in samples]
    if name == "answers":
        return {"seconds": seconds, "items": [str(first) for first, *_ in responses], "log_likelihoods": []}
    numbers = [[float(one[0] if isinstance(one, list | tuple) else one) for one in found] for found in responses]
    if name == "texts":
        return {"seconds": seconds, "items": [], "log_likelihoods": numbers, "total": result["results"][name]["bits_per_byte,none"]}
    items = [[float(sample["acc"]), float(sample["acc_norm"])] for sample in samples]
    return {"seconds": seconds, "items": items, "log_likelihoods": numbers}


def measure(python: str, side: str, folder: Path, name: str) -> dict[str, Any]:
    """One side in a process of its own."""
    command = [python, __file__, "--worker", side, "--folder", str(folder), "--task", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return found


def compare(python: str, folder: Path, title: str, rounds: int) -> str:
    """A row of the table."""
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(measure(sys.executable, "ftcli", folder, TASKS[title]))
        theirs.append(measure(python, "lm-eval", folder, TASKS[title]))
    pairs = [
        (mine, other)
        for first, second in zip(ours[0]["log_likelihoods"], theirs[0]["log_likelihoods"], strict=True)
        for mine, other in zip(first, second, strict=True)
    ]
    difference = max((abs(mine - other) for mine, other in pairs), default=0.0)
    relative = max((abs(mine - other) / max(1.0, abs(other)) for mine, other in pairs), default=0.0)
    same = sum(a == b for a, b in zip(ours[0]["items"], theirs[0]["items"], strict=True))
    equal = f"{same}/{len(ours[0]['items'])}" if ours[0]["items"] else f"{ours[0]['total']:.6f}, {theirs[0]['total']:.6f} bits a byte"
    ratios = [other["seconds"] / mine["seconds"] for mine, other in zip(ours, theirs, strict=True)]
    memory = [other["peak_bytes"] / mine["peak_bytes"] for mine, other in zip(ours, theirs, strict=True)]
    seconds = [statistics.median(one["seconds"] for one in side) for side in (ours, theirs)]
    peaks = [statistics.median(one["peak_bytes"] for one in side) / 2**30 for side in (ours, theirs)]
    return (
        f"| {title} | {seconds[0]:.1f} | {seconds[1]:.1f} | {statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f}) | "
        f"{peaks[0]:.2f} | {peaks[1]:.2f} | {statistics.median(memory):.1f} | {equal} | {difference:.1e}, {relative:.1e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--task", help="of a worker; or what to compare alone, such as `texts`")
    options = parser.parse_args()
    if options.worker:
        found = (run_ftcli if options.worker == "ftcli" else run_lm_eval)(options.folder, options.task)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print("RESULT " + json.dumps({**found, "peak_bytes": peak}), flush=True)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, options.shared.resolve(), options.rows)
        print(
            "| task | ftcli CPU s | lm-eval CPU s | times faster | ftcli GiB | lm-eval GiB | times less | items equal | log-likelihoods |"
        )
        print("|---|--:|--:|--:|--:|--:|--:|--:|--:|", flush=True)
        for title, name in TASKS.items():
            if options.task in (None, name):
                print(compare(options.peer_python, folder, title, options.rounds), flush=True)


if __name__ == "__main__":
    main()
