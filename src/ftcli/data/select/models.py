"""What a model makes of texts: the mean of its hidden states, or the bits that it needs for a byte of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ftcli.errors import Problem, RequestError
from ftcli.units import NATS_PER_BIT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ftcli.models.tokenizer import Tokenizer

CHARS_PER_TOKEN = 12
"""No text is cut before so many characters per token: the rest could not be reached and need not be tokenised."""
BATCH_TOKENS_CPU, BATCH_TOKENS_GPU = 2048, 32768


class TextModel:
    """A language model, or an encoder, that reads texts."""

    def __init__(self, reference: str, *, max_tokens: int, device: str = "auto", has_head: bool = False) -> None:
        """
        Args:
            reference: builtin:NAME, a folder, or a hub id.
            max_tokens: of each text; the rest of a longer one is not read.
            has_head: it is to tell probabilities, which an encoder cannot.

        Raises:
            RequestError: it cannot be loaded.
        """
        import torch

        from ftcli.models.locate import model_folder
        from ftcli.models.settings import Model
        from ftcli.models.tokenizer import load_tokenizer

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        self.tokenizer: Tokenizer = load_tokenizer(reference)
        self.device = device
        folder = model_folder(reference)
        if _is_language_model(folder / "config.json"):
            from ftcli.models.load import load_model

            self.module: Any = load_model(Model(base=reference), self.tokenizer, device=device)
        elif has_head:
            problem = Problem("", f"`{reference}` is no causal language model", "`--by embeddings` takes encoders, too")
            raise RequestError("the model tells no probabilities", [problem])
        else:
            self.module = _load_encoder(reference, str(folder), device)
        config = self.module.config.get_text_config()
        self.max_tokens = min(max_tokens, int(getattr(config, "max_position_embeddings", None) or max_tokens))

    def vectors(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, D) mean of the last hidden states over the tokens of each text; zeros for a text without tokens."""
        import torch

        base = self.module.base_model
        result = np.zeros((len(texts), int(self.module.config.get_text_config().hidden_size)), dtype=np.float32)
        with torch.inference_mode():
            for part, ids, mask in self._batches([ids for ids, _ in self._read(texts)]):
                hidden = base(input_ids=ids, attention_mask=mask).last_hidden_state.float()
                weights = mask[:, :, None].to(hidden.dtype)
                result[part] = ((hidden * weights).sum(dim=1) / weights.sum(dim=1)).cpu().numpy()
        return result

    def bits_per_byte(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """(n,) bits for a byte of what of each text is read; infinite where the model predicts none of it."""
        import torch

        from ftcli.models.head import head_transform, target_log_probs

        read = self._read(texts)
        result = np.full(len(texts), np.inf)
        head, transform = self.module.get_output_embeddings(), head_transform(self.module)
        with torch.inference_mode():
            for part, ids, mask in self._batches([ids for ids, _ in read]):
                hidden = self.module.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
                is_target = mask[:, 1:].bool()
                log_probs = target_log_probs(hidden[:, :-1][is_target], ids[:, 1:][is_target], head, transform).double()
                rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(is_target)[is_target]
                nats = -torch.zeros(len(ids), dtype=torch.float64, device=ids.device).index_add(0, rows, log_probs).cpu().numpy()
                num_bytes = np.array([read[place][1] for place in part])
                told = (is_target.sum(dim=1).cpu().numpy() > 0) & (num_bytes > 0)
                result[part] = np.where(told, nats / NATS_PER_BIT / np.maximum(1, num_bytes), np.inf)
        return result

    def _read(self, texts: Sequence[str]) -> list[tuple[list[int], int]]:
        """(token ids with what the model puts around a text, UTF-8 bytes that they stand for) of each text."""
        special, encode = self.tokenizer.special, self.tokenizer.encode_batch
        first, last = special.get("cls_token"), special.get("sep_token")
        before: list[Any] = [self.tokenizer.bos_id] if self.tokenizer.adds_bos else []
        after: list[Any] = []
        if first is not None and last is not None:
            before, after = [self.tokenizer.backend.token_to_id(first)], [self.tokenizer.backend.token_to_id(last)]
        room = max(1, self.max_tokens - len(before) - len(after))
        result = []
        for text, (ids, offsets) in zip(texts, encode([text[: room * CHARS_PER_TOKEN] for text in texts]), strict=True):
            # Without a token in front, the first one is not predicted, and its bytes are not told.
            start = 0 if before or not ids else offsets[0][1]
            end = offsets[min(room, len(ids)) - 1][1] if ids else 0
            result.append(([*before, *ids[:room], *after], len(text[start:end].encode("utf-8", "surrogatepass"))))
        return result

    def _batches(self, rows: list[list[int]]) -> Iterator[tuple[list[int], Any, Any]]:
        """(places, (n, L) ids, (n, L) mask) of rows of like length."""
        import torch

        from ftcli.layout.plan import plan_micro_batches

        budget = BATCH_TOKENS_CPU if self.device == "cpu" else BATCH_TOKENS_GPU
        filled = [place for place, row in enumerate(rows) if row]
        for part in plan_micro_batches([len(rows[place]) for place in filled], 1, budget)[0] if filled else []:
            places = [filled[place] for place in part]
            width = max(len(rows[place]) for place in places)
            ids = torch.full((len(places), width), self.tokenizer.pad_id or 0, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for number, place in enumerate(places):
                ids[number, : len(rows[place])] = torch.tensor(rows[place])
                mask[number, : len(rows[place])] = 1
            yield places, ids.to(self.device), mask.to(self.device)


def _is_language_model(config: Any) -> bool:
    """Does the folder hold a causal language model? What says nothing of it is read as one, and its loader says what is wrong."""
    try:
        names = json.loads(config.read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError):
        return True
    return not names or any(str(name).endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in names)


def _load_encoder(reference: str, folder: str, device: str) -> Any:
    """An encoder without its head, complete but for a pooler.

    Raises:
        RequestError: it cannot be read, or weights are missing.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModel

    from ftcli.models.quiet import quiet_libraries

    try:
        with quiet_libraries():
            model, info = AutoModel.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True, dtype=torch.float32
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise RequestError("the encoder cannot be loaded", [Problem("", f"`{reference}`: {first_line}")]) from error
    missing = sorted(name for name in map(str, info["missing_keys"]) if "pooler" not in name)
    if missing:
        shown = ", ".join(missing[:5])
        raise RequestError("the encoder cannot be loaded", [Problem("", f"`{reference}`: weights are missing: {shown}")])
    return model.to(device).eval()
