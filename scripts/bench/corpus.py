"""A synthetic corpus of any size: tokenising it, opening it, beginning and going on in its middle; and the same with datasets + HF Trainer.

    python scripts/bench/corpus.py [--megabytes 5000] [--small 10] [--documents 10000000] [--peer-python PEER/bin/python]

Every figure is of a process of its own. `tokenise` is from a jsonl file to a store that is complete, memory the most that was resident
in the main process and in one of its workers; `per processor s` is MB per second of processor time, imports and all, which other work
on the machine changes least. `first step` begins after the imports: open the data from a warm cache, load the model,
make one update; `middle` is the batch of the step in the middle, in a process that has seen none before. `fabricated` is a store of so
many documents that was not tokenised but written, to see what opening costs where tokenising would take hours. `--peer-python` is a
Python with torch, transformers and datasets.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MAX_LENGTH, BATCH = 256, 8
LIMIT_BYTES, LIMIT_SECONDS = 10**9, 1.0


def write_corpus(path: Path, megabytes: float, document_bytes: int) -> int:
    """Documents of sentences drawn from the embedded stories, the same for the same arguments; how many there are."""
    from ftcli.data.sources.builtin import Builtin

    generator = random.Random(7)
    stories = (row["text"] for _, row in Builtin(name="stories").rows())
    parts = {part.strip(" .") for story in stories for part in story.replace("\n", " ").split(". ")}
    # A sentence as JSON writes it, so that a document is only joined.
    sentences = [json.dumps(part + ". ")[1:-1] for part in sorted(parts) if part]
    per_document = max(2, round(document_bytes / (sum(map(len, sentences)) / len(sentences))))
    num_bytes = count = 0
    with path.open("w") as file:
        while num_bytes < megabytes * 1e6:
            sizes = generator.choices(range(2, 2 * per_document - 1), k=1000)
            drawn = iter(generator.choices(sentences, k=sum(sizes)))
            lines = ['{"text": "' + "".join(itertools.islice(drawn, size)) + '"}\n' for size in sizes]
            num_bytes += file.write("".join(lines))
            count += len(lines)
    return count


def recipe(job: dict[str, Any]) -> Any:
    """Continual pre-training of the base on the corpus, alone or beside itself as replay."""
    from ftcli.recipe.load import load_recipe

    source = {"source": {"kind": "file", "path": job["corpus"]}, "format": {"kind": "text"}, "unit": job["unit"]}
    replay = {**source, "name": "again", "role": "replay"}
    document = {
        "version": 1,
        "name": "corpus",
        "model": {"base": job["base"]},
        "data": {"train": [source, replay] if job["replay"] else [source], "holdout": 0.0, "max_length": MAX_LENGTH},
        "method": {"kind": "full"},
        "train": {"epochs": 1, "global_batch_size": BATCH, "lr": 1e-4, "device": "cpu"},
    }
    if job["workers"]:
        document["data"]["workers"] = job["workers"]
    path = Path(job["folder"]) / "corpus.yaml"
    path.write_text(json.dumps(document))
    return load_recipe(path).recipe


def tokenise(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds and memory from the file to a complete store."""
    from ftcli.training.assemble import assemble_data

    began = time.perf_counter()
    data = assemble_data(recipe(job), None)
    seconds = time.perf_counter() - began
    store = data.prepared.train[0]
    return {"seconds": seconds, "tokens": store.report.num_tokens, "documents": store.report.rows_read, "hit": store.report.cache_hit}


def first_step(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds to open the data, to the first update, and to the batch in the middle."""
    from ftcli.training.assemble import assemble_data, assemble_learner, assemble_model, load_base, make_accelerator
    from ftcli.training.step import optimizer_step

    settings = recipe(job)
    accelerator = make_accelerator(settings, None)
    if not job["at_middle"]:
        # imports what loading a model imports
        load_base(settings, settings.model.load_tokenizer(), accelerator.device)
    began = time.perf_counter()
    data = assemble_data(settings, None)
    opened = time.perf_counter()
    if job["at_middle"]:
        step = data.order.num_steps // 2
        for source, tree in data.order.examples_at(step):
            data.prepared.train[source].tree(tree)
        return {"opened": opened - began, "middle": time.perf_counter() - opened, "steps": data.order.num_steps}
    parts = assemble_model(settings, data, accelerator)
    learner, batches = assemble_learner(settings, data, parts, accelerator)
    learner.model.train()
    optimizer_step(learner, batches.at(1), 1.0)
    return {"opened": opened - began, "first_step": time.perf_counter() - began, "steps": data.order.num_steps}


def fabricate(job: dict[str, Any]) -> dict[str, Any]:
    """A store of `documents` documents in the cache, made of one chunk again and again; the corpus file is only what it is named for."""
    import numpy as np

    from ftcli.data.cache import default_cache_folder, key_of_source
    from ftcli.data.chunks import Tally, Work, chunk_path, tokenise_chunk, write_chunk
    from ftcli.data.store import StoreWriter, report_of, write_meta
    from ftcli.models.tokenizer import load_tokenizer

    entry = recipe(job).data.train[0]
    policy = "block" if job["unit"] == "block" else "split"
    work = Work(entry.format, load_tokenizer(job["base"]), MAX_LENGTH, policy)
    rows = [(index, where, row) for index, (where, row) in enumerate(entry.source.rows())]
    texts = [(index, where, {"text": row["text"][:40]}) for index, where, row in rows]
    arrays, tally = tokenise_chunk(texts, work)
    key = key_of_source(entry.source.fingerprint(), work, limit=None, holdout=None)
    folder = default_cache_folder() / "trees" / key
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    part = folder / "chunks"
    part.mkdir()
    generator = np.random.default_rng(1)
    count = max(1, job["documents"] // len(arrays["trees"]))
    # Written piece by piece, so that a digest is not shared by millions.
    totals: list[Any] = []
    paths = []
    for number in range(min(count, 64)):
        arrays["trees"]["digest"] = generator.integers(0, 2**63, len(arrays["trees"]), dtype=np.uint64)
        write_chunk(chunk_path(part, number), arrays, tally)
        paths.append(chunk_path(part, number))
    with StoreWriter(folder, work.tokenizer.vocab_size) as writer:
        for number in range(count):
            writer.add(paths[number % len(paths)])
        total, row_lengths = writer.finish()
    shutil.rmtree(part)
    assert isinstance(total, Tally)
    report = report_of(total, row_lengths, name="corpus", format_kind="text", on_overflow=policy, cache_key=key)
    write_meta(folder, report, created=time.time())
    return {"documents": total.num_examples, "totals": len(totals)}


def peer_data(job: dict[str, Any]) -> Any:
    """datasets: load the file, tokenise it in batches, group it to blocks, as run_clm does; from its cache where it is there."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    data = datasets.load_dataset("json", data_files=job["corpus"], split="train")
    end = tokenizer.eos_token_id

    def encode(rows: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": [[*ids, end] for ids in tokenizer(rows["text"], add_special_tokens=False)["input_ids"]]}

    def group(rows: dict[str, Any]) -> dict[str, Any]:
        ids = [token for row in rows["input_ids"] for token in row]
        blocks = [ids[i : i + MAX_LENGTH] for i in range(0, len(ids) // MAX_LENGTH * MAX_LENGTH, MAX_LENGTH)]
        return {"input_ids": blocks, "labels": blocks}

    options = {"batched": True, "num_proc": job["workers"] or None}
    return data.map(encode, remove_columns=data.column_names, **options).map(group, **options)


def peer_tokenise(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds and memory from the file to blocks on the disk."""
    began = time.perf_counter()
    data = peer_data(job)
    return {"seconds": time.perf_counter() - began, "tokens": len(data) * MAX_LENGTH, "documents": len(data), "hit": False}


def peer_first_step(job: dict[str, Any]) -> dict[str, Any]:
    """HF Trainer over the mapped data from its warm cache: seconds to the first update."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

    AutoModelForCausalLM.from_pretrained(job["model"])
    began = time.perf_counter()
    data = peer_data(job)
    opened = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(job["model"])
    arguments = TrainingArguments(
        output_dir=job["folder"], max_steps=1, per_device_train_batch_size=BATCH, report_to=[], save_strategy="no", use_cpu=True
    )
    Trainer(model, arguments, train_dataset=data, data_collator=default_data_collator).train()
    return {"opened": opened - began, "first_step": time.perf_counter() - began, "steps": len(data) // BATCH}


PARTS = {part.__name__: part for part in (tokenise, first_step, fabricate, peer_tokenise, peer_first_step)}


def in_process(python: str, part: str, job: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """The result of a part in a process of its own, with its peak memory."""
    command = [python, __file__, "--part", part, "--job", json.dumps(job)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{part} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.rpartition("RESULT ")[2])
    return result


def run_part(name: str, job: dict[str, Any]) -> None:
    result = PARTS[name](job)
    own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    processor_seconds = own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime
    more = {"peak": own.ru_maxrss * 1024, "peak_child": others.ru_maxrss * 1024, "processor_seconds": processor_seconds}
    print("RESULT " + json.dumps({**result, **more}), flush=True)


def compare(arguments: argparse.Namespace, folder: Path) -> bool:
    """Run and print everything; whether the limits held."""
    from ftcli.models.locate import model_folder

    environment = {"FTCLI_CACHE": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "datasets"), "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    job: dict[str, Any] = {"base": arguments.base, "model": str(model_folder(arguments.base)), "workers": arguments.workers}
    sides = [("ftcli", sys.executable, ("tokenise", "first_step"))]
    if arguments.peer_python:
        sides.append(("datasets + Trainer", arguments.peer_python, ("peer_tokenise", "peer_first_step")))
    corpora, sizes = {}, {"small": arguments.small, "middle": arguments.peer_megabytes, "large": arguments.megabytes}
    if not 0 < arguments.peer_megabytes < arguments.megabytes:
        sizes.pop("middle")
    for name, megabytes in sizes.items():
        corpora[name] = folder / f"{name}.jsonl"
        write_corpus(corpora[name], megabytes, arguments.document_bytes)
    print(
        "| side | corpus | MB | documents | tokens | MB/s | per processor s | peak MiB | of a worker | opened s | first step s | middle s |"
    )
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|", flush=True)
    held, seconds = True, {}
    for name, path in corpora.items():
        # One side right after the other, so that both meet the same load.
        for side, python, (make, begin) in sides:
            if side != "ftcli" and name == "large" and "middle" in corpora:
                continue
            this = {**job, "corpus": str(path), "folder": str(folder), "unit": arguments.unit, "replay": False, "at_middle": False}
            made, begun = in_process(python, make, this, environment), in_process(python, begin, this, environment)
            megabytes = path.stat().st_size / 1e6
            middle = "-"
            if side == "ftcli":
                middle = f"{in_process(python, begin, {**this, 'at_middle': True}, environment)['middle']:.3f}"
                held &= max(made["peak"], made["peak_child"]) <= LIMIT_BYTES
                seconds[name] = begun["first_step"]
            print(
                f"| {side} | {name} | {megabytes:.0f} | {made['documents']:,} | {made['tokens']:,} | {megabytes / made['seconds']:.2f} "
                f"| {megabytes / made['processor_seconds']:.2f} "
                f"| {made['peak'] / 2**20:.0f} | {made['peak_child'] / 2**20:.0f} | {begun['opened']:.2f} | {begun['first_step']:.2f} "
                f"| {middle} |",
                flush=True,
            )
    held &= seconds["large"] <= seconds["small"] + LIMIT_SECONDS
    if arguments.documents:
        open_fabricated(arguments, folder, job, environment)
    return held


def open_fabricated(arguments: argparse.Namespace, folder: Path, job: dict[str, Any], environment: dict[str, str]) -> None:
    """Open stores of a thousand and of very many documents, alone and in a schedule of replay."""
    print("\n| fabricated documents | mixture | first opening s | opened s | first step s | middle s | steps | peak MiB |")
    print("|--:|---|--:|--:|--:|--:|--:|--:|", flush=True)
    for count in (1000, arguments.documents):
        path = folder / f"fabricated-{count}.jsonl"
        write_corpus(path, 1.0, arguments.document_bytes)
        this = {**job, "corpus": str(path), "folder": str(folder), "unit": arguments.unit, "documents": count, "at_middle": False}
        in_process(sys.executable, "fabricate", {**this, "replay": False}, environment)
        for replay in (False, True):
            one = {**this, "replay": replay}
            once, begun, middle = (
                in_process(sys.executable, "first_step", {**one, "at_middle": at_middle}, environment) for at_middle in (True, False, True)
            )
            peak = max(result["peak"] for result in (once, begun, middle)) / 2**20
            print(
                f"| {count:,} | {'replay' if replay else 'one source'} | {once['opened']:.2f} | {begun['opened']:.2f} "
                f"| {begun['first_step']:.2f} | {middle['middle']:.3f} | {begun['steps']:,} | {peak:.0f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=5000, help="size of the large corpus")
    parser.add_argument("--small", type=float, default=10, help="size of the small one, in MB")
    parser.add_argument("--documents", type=int, default=10_000_000, help="documents of the fabricated store; 0 leaves it out")
    parser.add_argument("--document-bytes", type=int, default=500)
    parser.add_argument("--unit", choices=("row", "block"), default="block")
    parser.add_argument("--workers", type=int, default=0, help="tokenising processes; 0 is the default of each side")
    parser.add_argument("--base", default="builtin:tiny")
    parser.add_argument("--peer-python", help="Python of an environment with datasets and transformers")
    parser.add_argument("--peer-megabytes", type=float, default=0, help="the peer does a corpus of so many MB, and ftcli this one, too")
    parser.add_argument("--folder", type=Path, help="where there is room for several times the corpus")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        run_part(arguments.part, json.loads(arguments.job))
        return
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        if not compare(arguments, folder):
            sys.exit("a limit did not hold")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
