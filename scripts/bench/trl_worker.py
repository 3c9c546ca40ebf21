"""One measured run of TRL's SFTTrainer on the same chats, with a meter as a callback. Runs in TRL's own environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from inputs import LORA_ALPHA_OVER_RANK, Setting
from meter import Meter, peak_bytes
from peft import LoraConfig
from transformers import AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

IGNORED = -100
"""A label that is no target."""
FASTER = {"gradient_checkpointing": False}
"""TRL recomputes activations unless told otherwise; it is faster without."""


class MeterCallback(TrainerCallback):
    """Hands every finished step to the meter."""

    def __init__(self, meter: Meter, counts: list[tuple[int, int]]) -> None:
        self.meter, self.counts = meter, counts

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.after_step(state.global_step, *self.counts[state.global_step - 1])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.meter.losses.append(logs["loss"])


def make_trainer(folder: Path, setting: Setting, changes: dict[str, Any]) -> SFTTrainer:
    """The trainer as TRL's guide sets it up: a model folder, prompt and completion, and a `peft_config`."""
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.eos_token
    model_arguments: dict[str, Any] = {"dtype": "float32"}
    if setting.method == "qlora":
        model_arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
        )
    arguments = {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": setting.batch_size,
        "max_steps": setting.steps,
        "learning_rate": setting.lr,
        "lr_scheduler_type": "constant",
        "max_grad_norm": setting.max_grad_norm,
        "weight_decay": 0.0,
        "max_length": setting.max_length,
        "train_sampling_strategy": "sequential",
        "seed": setting.seed,
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "model_init_kwargs": model_arguments,
        **FASTER,
        **changes,
    }
    alpha = LORA_ALPHA_OVER_RANK * setting.rank
    low_rank = LoraConfig(r=setting.rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return SFTTrainer(
        model=str(folder / "model"),
        args=SFTConfig(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=None if setting.method == "full" else low_rank,
    )


def step_counts(trainer: SFTTrainer, batch_size: int) -> list[tuple[int, int]]:
    """(tokens, targets) of every step; packed rows hold several examples, and are counted as they are."""
    sizes = [(len(row["input_ids"]), sum(label != IGNORED for label in row["labels"])) for row in trainer.train_dataset]
    steps = [sizes[start : start + batch_size] for start in range(0, len(sizes), batch_size)]
    return [(sum(tokens for tokens, _ in step), sum(targets for _, targets in step)) for step in steps]


def main() -> None:
    """Arguments: setting file, changes to SFTConfig as JSON."""
    path, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
    setting = Setting.read(path)
    torch.set_num_threads(setting.threads)
    trainer = make_trainer(path.parent, setting, changes)
    rows_of_step = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    meter = Meter(setting.warm_up_steps)
    trainer.add_callback(MeterCallback(meter, step_counts(trainer, rows_of_step)))
    before = peak_bytes()
    trainer.train()
    meter.report(peak_bytes_before_training=before)


if __name__ == "__main__":
    main()
