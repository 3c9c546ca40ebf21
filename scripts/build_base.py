"""Make the embedded model and data sets: corpus, tokenizer, pre-training through ftcli, installation into the package.

python scripts/build_base.py corpus      the corpus to build/base, the data sets into the package
python scripts/build_base.py tokenizer   the tokenizer, to build/base/tokenizer
python scripts/build_base.py pretrain    ftcli train recipes/base-tiny.yaml (25 minutes on two cores)
python scripts/build_base.py install     the trained model as bfloat16 into the package, with its card
python scripts/build_base.py all         the four, in this order
python scripts/build_base.py --check     the corpus and data sets made anew have the recorded sha256
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from base import corpus, vocabulary

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "src" / "ftcli" / "builtin" / "data"
MODEL = ROOT / "src" / "ftcli" / "builtin" / "models" / "tiny"
RECIPE = ROOT / "recipes" / "base-tiny.yaml"
RUN = ROOT / "build" / "base" / "run"
HASHES = DATA / "sha256.json"
STEPS = ("corpus", "tokenizer", "pretrain", "install")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", nargs="?", choices=(*STEPS, "all"), help="what to make")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "base", help="where corpus and tokenizer go")
    parser.add_argument("--model", type=Path, default=RUN / "model", help="the model folder that `install` takes")
    parser.add_argument("--check", action="store_true", help="only compare corpus and data sets with the recorded hashes")
    options = parser.parse_args()
    if options.check:
        return check()
    if options.step is None:
        parser.error("name a step, or --check")
    for step in STEPS if options.step == "all" else (options.step,):
        if step == "corpus":
            make_corpus(options.output)
        elif step == "tokenizer":
            vocabulary.write_tokenizer(corpus_texts(options.output), options.output / "tokenizer")
        elif step == "pretrain":
            subprocess.run([sys.executable, "-m", "ftcli.cli.main", "train", str(RECIPE), "--set", f"output={RUN}"], cwd=ROOT, check=True)
        else:
            install(options.model)
    return 0


def make_corpus(output: Path) -> None:
    hashes = corpus.write(output, DATA)
    HASHES.write_text(json.dumps(hashes, indent=2) + "\n")
    for file in sorted(output.glob("corpus-*.jsonl")):
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


def check() -> int:
    """0 if what the grammar gives is what is recorded, and what is recorded is what is in the package."""
    recorded = json.loads(HASHES.read_text())
    with tempfile.TemporaryDirectory() as folder:
        made = corpus.write(Path(folder) / "corpus", Path(folder) / "data")
    embedded = {file.name.removesuffix(".jsonl.gz"): gzip.decompress(file.read_bytes()) for file in DATA.glob("*.jsonl.gz")}
    wrong = sorted(name for name in recorded.keys() | made.keys() if recorded.get(name) != made.get(name))
    wrong += sorted(name for name, plain in embedded.items() if recorded.get(name) != hashlib.sha256(plain).hexdigest())
    for name in wrong:
        print(f"{name}: another sha256 than recorded", file=sys.stderr)
    if not wrong:
        print(f"{len(recorded)} files as recorded")
    return 1 if wrong else 0


def corpus_texts(output: Path) -> Iterator[str]:
    """Every text and every message of the corpus, for the tokenizer."""
    with (output / "corpus-texts.jsonl").open() as lines:
        yield from (json.loads(line)["text"] for line in lines)
    with (output / "corpus-chats.jsonl").open() as lines:
        yield from (message["content"] for line in lines for message in json.loads(line)["messages"])


def install(source: Path) -> None:
    """Put the model folder `source` into the package: bfloat16 weights, tokenizer, a card with its figures."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    # Whatever the run wrote, generation by plain transformers has to stop at the end of a text or of a turn, too.
    model.config.bos_token_id = None
    model.config.eos_token_id = vocabulary.SPECIALS.index(vocabulary.END)
    model.config.pad_token_id = vocabulary.SPECIALS.index(vocabulary.PAD)
    stops = [vocabulary.SPECIALS.index(token) for token in (vocabulary.END, vocabulary.TURN_END)]
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=model.config.pad_token_id)
    model = model.to(torch.bfloat16)
    shutil.rmtree(MODEL, ignore_errors=True)
    model.save_pretrained(MODEL)
    (MODEL / "model.safetensors").chmod(0o644)
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, MODEL / name)
    (MODEL / "README.md").write_text(card(model))
    size = sum(file.stat().st_size for folder in (MODEL, DATA) for file in folder.rglob("*"))
    print(f"{MODEL}: {size / 1e6:.1f} MB with the data sets")


def card(model: object) -> str:
    """The model card, with bits per byte on stories that the model has not seen, of the weights as they are stored."""
    import torch
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    with gzip.open(DATA / "stories-test.jsonl.gz", "rt") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    loss_sum = 0.0
    model = model.float().eval()  # type: ignore[attr-defined]
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer.encode(text + vocabulary.END, add_special_tokens=False).ids])
            loss_sum += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    bits = loss_sum / math.log(2) / sum(len(text.encode()) for text in texts)
    size = f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f}"
    return CARD.format(size=size, config=model.config, bits=bits, texts=len(texts))


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
---

# builtin:tiny

A Llama of {size} M parameters ({config.num_hidden_layers} layers of {config.hidden_size}, {config.num_attention_heads} heads on
{config.num_key_value_heads}, tied embeddings, {config.vocab_size} tokens), small enough to train in a minute on two cores
and good enough to show whether training works. It tells short stories, answers questions about its small world, adds up
small numbers and writes orders as cards. It knows nothing of the real world and is not meant for any use but trying,
testing and teaching.

- weights: bfloat16, safetensors
- tokenizer: byte-level BPE, digits one by one; no text that it cannot encode; `<|endoftext|>` ends a text, `<|im_end|>` a turn
- chat template: ChatML-style; a chat's text begins with the text of each of its prefixes
- held-out stories (`stories`, split test, {texts} texts): {bits:.4f} bits per byte

## How it was made

`python scripts/build_base.py all`: a corpus from the project's own grammar (scripts/base/), the same bytes for the same
seed, and pre-training through ftcli itself (recipes/base-tiny.yaml). No text, weight or output of anyone else's went into
it. Licence: Apache-2.0.
"""


if __name__ == "__main__":
    raise SystemExit(main())
