"""What llama.cpp computes for some token ids and texts; run as a program of its own, because a file it cannot run may end it.

Reads `{"path": ..., "probe": [[ids]], "texts": [...], "stops": [ids], "num_threads": ...}` from stdin, writes logits to the file named
by the first argument, and prints the ids of the texts, and the stops at which it would go on, as JSON.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Answer one question from stdin."""
    import numpy as np
    from llama_cpp import Llama
    from llama_cpp import llama_cpp as native

    _use_plain_kernels()
    asked = json.load(sys.stdin)
    longest = max(map(len, asked["probe"]))
    float32 = 0  # of ggml's types: the cache of keys and values is otherwise rounded to float16
    threads = asked["num_threads"]
    sizes = {"n_ctx": longest, "n_batch": longest, "n_threads": threads, "n_threads_batch": threads}
    runtime = Llama(asked["path"], logits_all=True, verbose=False, type_k=float32, type_v=float32, **sizes)
    rows = []
    for ids in asked["probe"]:
        runtime.reset()
        runtime.eval(ids)
        rows.append(np.array(runtime.scores[: len(ids)], dtype=np.float32))
    np.save(sys.argv[1], np.concatenate(rows))
    vocabulary = native.llama_model_get_vocab(runtime.model)
    unknown_stops = [token for token in asked["stops"] if not native.llama_vocab_is_eog(vocabulary, token)]
    ids = [runtime.tokenize(text.encode("utf-8"), add_bos=False, special=True) for text in asked["texts"]]
    print(json.dumps({"ids": ids, "unknown_stops": unknown_stops}))


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
