"""What llama.cpp computes for some token ids and texts; run as a program of its own, because a file it cannot run may end it.

Reads `{"path": ..., "probe": [[ids]], "texts": [...]}` from stdin, writes logits to the file named by the first argument, and prints
the ids of the texts as JSON.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Answer one question from stdin."""
    import numpy as np
    from llama_cpp import Llama

    _use_plain_kernels()
    asked = json.load(sys.stdin)
    longest = max(map(len, asked["probe"]))
    float32 = 0  # of ggml's types: the cache of keys and values is otherwise rounded to float16
    runtime = Llama(
        asked["path"], n_ctx=longest, n_batch=longest, logits_all=True, verbose=False, n_threads=1, type_k=float32, type_v=float32
    )
    rows = []
    for ids in asked["probe"]:
        runtime.reset()
        runtime.eval(ids)
        rows.append(np.array(runtime.scores[: len(ids)], dtype=np.float32))
    np.save(sys.argv[1], np.concatenate(rows))
    print(json.dumps([runtime.tokenize(text.encode("utf-8"), add_bos=False, special=True) for text in asked["texts"]]))


def _use_plain_kernels() -> None:
    """Leave weights in the order of the file: kernels with an order of their own end the process on some virtual machines."""
    from llama_cpp import llama_cpp as native

    default = native.llama_model_default_params

    def plain() -> object:
        parameters = default()
        if hasattr(parameters, "use_extra_bufts"):
            parameters.use_extra_bufts = False
        return parameters

    native.llama_model_default_params = plain


if __name__ == "__main__":
    main()
