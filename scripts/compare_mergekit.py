"""Runs the same merge recipes with mergekit and with ftcli, and compares every number of every tensor.

    python scripts/compare_mergekit.py --mergekit-python VENV/bin/python [--keep FOLDER] [--json FILE]

mergekit 0.1.5 lives in an environment of its own (`python -m venv VENV; VENV/bin/pip install mergekit==0.1.5`). The models are tiny
Llamas in float32, so that no two magnitudes are equal and a trim has one answer; the results are rounded to bfloat16, and the distance is
counted in its steps. A tensor with a number further away than one step (and than float32's own rounding) is a difference that `DIFFERENT`
must name a reason for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RECIPES = Path(__file__).parent / "merge_recipes"
_LAST = "what is behind the layers gets the last point of a gradient; mergekit gives it the first"
DIFFERENT = {
    ("slerp_gradient", "lm_head.weight"): _LAST,
    ("slerp_gradient", "model.norm.weight"): _LAST,
    ("linear", "lm_head.weight"): _LAST,
    ("linear", "model.norm.weight"): _LAST,
    ("ties", "lm_head.weight"): _LAST,
    ("ties", "model.norm.weight"): _LAST,
    ("karcher", "*"): "mergekit iterates on float32 tensors; ftcli's numbers are those of a float64 computation, rounded",
    ("arcee_fusion", "*"): "numbers whose importance is the threshold but for the last bits of a float32",
}
MERGEKIT = """
import json, os, sys, yaml
os.environ["HF_HUB_OFFLINE"] = "1"
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
results = {}
for recipe, output in json.loads(sys.argv[1]):
    try:
        config = MergeConfiguration.model_validate(yaml.safe_load(open(recipe)))
        run_merge(config, output, options=MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True))
        results[recipe] = None
    except Exception as error:
        results[recipe] = f"{type(error).__name__}: {error}"
print("RESULTS" + json.dumps(results))
"""


def make_models(folder: Path) -> None:
    """`base`, three fine-tunes, and one whose vocabulary stands in another order."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the lamp of the old clockmaker shone over the village by the sea"] * 20, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    size = len(tokenizer.get_vocab(with_added_tokens=True))
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=size, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1)).float()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    start = {name: value.clone() for name, value in base.state_dict().items()}
    shared = {name: 0.03 * torch.randn_like(value) for name, value in start.items()}  # fine-tunes of one base agree in a part
    for name in ("base", "a", "b", "c"):
        if name != "base":
            base.load_state_dict({key: value + shared[key] + 0.03 * torch.randn_like(value) for key, value in start.items()})
        base.save_pretrained(folder / name)
        wrapped.save_pretrained(folder / name)
    _make_shuffled(folder, size)


def _make_shuffled(folder: Path, size: int) -> None:
    """Model `a` with its tokens, and their rows, in another order."""
    import shutil

    from safetensors.numpy import save_file

    from ftcli.merging.stored import OpenFiles, folder_tensors

    shutil.copytree(folder / "a", folder / "shuffled")
    order = np.concatenate([[0, 1], 2 + np.random.default_rng(0).permutation(size - 2)])  # row of each old token in the new order
    with OpenFiles() as files:
        tensors = {name: files.whole(tensor) for name, tensor in folder_tensors(folder / "a").items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = np.empty_like(tensors[name])
        rows[order] = tensors[name]
        tensors[name] = rows
    save_file(tensors, folder / "shuffled" / "model.safetensors", {"format": "pt"})
    path = folder / "shuffled" / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["vocab"] = {token: int(order[row]) for token, row in document["model"]["vocab"].items()}
    for token in document["added_tokens"]:
        token["id"] = int(order[token["id"]])
    path.write_text(json.dumps(document))


def steps_apart(first: NDArray[np.uint16], second: NDArray[np.uint16]) -> NDArray[np.int64]:
    """How many bfloat16 numbers lie between, plus one; 0 for equal ones and for the two zeros."""

    def ordered(bits: NDArray[np.uint16]) -> NDArray[np.int64]:
        wide = bits.astype(np.int64)
        return np.where(wide < 0x8000, wide, 0x8000 - wide)

    return np.abs(ordered(first) - ordered(second))


def compare(name: str, ours: Path, theirs: Path) -> dict[str, Any]:
    """One row of the table."""
    from ftcli.merging.stored import OpenFiles, folder_tensors

    first, second = folder_tensors(ours), folder_tensors(theirs)
    row: dict[str, Any] = {"recipe": name, "tensors": len(second), "equal": 0, "one_step": 0, "further": []}
    row["missing"] = sorted(set(first) ^ set(second))
    num_numbers = num_apart = 0
    with OpenFiles() as files:
        for key in sorted(set(first) & set(second)):
            if first[key].shape != second[key].shape or first[key].dtype != second[key].dtype:
                row["further"].append((key, "another shape or dtype"))
                continue
            apart = steps_apart(*(files.stored(tensor[key], 0, tensor[key].size) for tensor in (first, second)))
            values = [files.whole(tensor[key]).reshape(-1) for tensor in (first, second)]
            # near 0, where large terms cancel, float32 itself is coarser than a step of bfloat16
            is_further = (apart > 1) & (np.abs(values[0] - values[1]) > 2e-7 * np.abs(values[1]).max())
            num_numbers, num_apart = num_numbers + apart.size, num_apart + int((apart > 0).sum())
            if is_further.any():
                row["further"].append((key, f"{100 * float(is_further.mean()):.2g} % of its numbers"))
            else:
                row["equal" if not apart.any() else "one_step"] += 1
    row["apart_percent"] = 100 * num_apart / max(1, num_numbers)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit-python", required=True, help="the Python of an environment with mergekit==0.1.5")
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it")
    parser.add_argument("--json", type=Path, help="write the table here, too")
    arguments = parser.parse_args()
    folder = arguments.keep or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "shuffled").is_dir():
        make_models(folder)
    recipes = sorted(RECIPES.glob("*.yaml"))
    for recipe in recipes:
        (folder / recipe.name).write_text(recipe.read_text())
    jobs = [[recipe.name, f"mergekit-{recipe.stem}"] for recipe in recipes]
    command = [arguments.mergekit_python, "-c", MERGEKIT, json.dumps(jobs)]
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if "RESULTS" not in finished.stdout:
        sys.exit(finished.stderr)
    failed = json.loads(finished.stdout.rpartition("RESULTS")[2])
    rows = []
    from ftcli.merging.outcome import merge_models

    for recipe in recipes:
        output = folder / f"ftcli-{recipe.stem}"
        if not output.exists():
            merge_models(folder / recipe.name, output, verify=False)
        if failed[recipe.name] is not None:
            rows.append({"recipe": recipe.stem, "mergekit_failed": failed[recipe.name]})
            continue
        rows.append(compare(recipe.stem, output, folder / f"mergekit-{recipe.stem}"))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    report(rows)


def report(rows: list[dict[str, Any]]) -> None:
    """The table, and whether every difference has a reason."""
    unexplained = 0
    print("| recipe | tensors | all bits equal | within 1 step | further | numbers that differ |\n|---|--:|--:|--:|---|--:|")
    for row in rows:
        if "mergekit_failed" in row:
            print(f"| {row['recipe']} | | | | mergekit fails: {row['mergekit_failed'].splitlines()[0][:100]} | |")
            continue
        reasons = [DIFFERENT.get((row["recipe"], name)) or DIFFERENT.get((row["recipe"], "*")) for name, _ in row["further"]]
        unexplained += reasons.count(None) + len(row["missing"])
        further = "; ".join(f"`{name}` ({what})" for name, what in row["further"][:3]) + (" ..." if len(row["further"]) > 3 else "")
        cells = (row["recipe"], row["tensors"], row["equal"], row["one_step"], further, f"{row['apart_percent']:.2f} %")
        print(f"| {' | '.join(map(str, cells))} |")
        if row["missing"]:
            print(f"  names of one tool only: {row['missing'][:5]}")
    print(f"\n{unexplained} differences without a reason")
    sys.exit(unexplained > 0)


if __name__ == "__main__":
    main()
