"""A file of ours in llama.cpp, with float32 keys and values: what it makes of each token."""

import numpy as np
import pytest

llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is built from source, 10 to 25 minutes: make test-llama")


def load(path, context):
    return llama_cpp.Llama(
        str(path),
        n_ctx=context,
        n_batch=context,
        n_ubatch=context,
        n_threads=1,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        flash_attn=False,
        verbose=False,
    )


def theirs(model, tokens):
    """(T, V) float32."""
    model.reset()
    model.eval(tokens)
    return np.array(model.scores[: len(tokens)])
