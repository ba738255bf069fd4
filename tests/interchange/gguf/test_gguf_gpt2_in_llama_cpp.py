"""GPT-2 as llama.cpp's server reads it from our GGUF file: the same ids, the same tokens, nearly the same numbers."""

import json

import numpy as np
import pytest
from gguf_case import GPT2, everything, logits, opened, random_arrays
from gguf_tokenizer_case import byte_level

from phijax.interchange.gguf.open import open_gguf
from phijax.interchange.gguf.write import write_gguf

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's server comes as the wheel xllamacpp")

PROMPT, STEPS = "hello world 12", 6
# Of logarithms that span 5.6. ggml looks gelu up in a table of float16 and multiplies Q8_0 by activations in 8 bits:
# measured 3.4e-3 and 7e-2; k and v exchanged give 2.
CLOSE = {"F32": 1e-2, "Q8_0": 0.15}


def weights() -> dict[str, np.ndarray]:
    """Blocks that say more than the embedding, so that the tokens differ."""
    arrays = random_arrays(GPT2)
    loud = {path: 3 * array for path, array in arrays.items() if path.startswith("blocks/") and "scale" not in path}
    return arrays | loud


@pytest.mark.parametrize("kind", CLOSE)
def test_a_prompt_is_continued_alike(kind, tmp_path):
    tokenizer = byte_level("gpt-2")
    path = write_gguf(opened(GPT2, weights(), tokenizer=lambda: tokenizer), tmp_path / "m.gguf", kind=kind)
    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = GPT2.max_position, 1, False, -1
    ask = {"prompt": PROMPT, "max_tokens": STEPS, "temperature": 0, "return_tokens": True, "cache_prompt": False}
    answer = xllamacpp.Server(settings).handle_completions({**ask, "verbose": True, "n_probs": 50, "logprobs": 50})
    answer = (json.loads(answer) if isinstance(answer, str) else answer)["__verbose"]
    read, ids = open_gguf(path), tokenizer.encode(PROMPT)
    assert read.tokenizer().encode(PROMPT) == ids and answer["tokens_evaluated"] == len(ids)
    arrays = everything(read.weights)
    probabilities = answer["completion_probabilities"]  # not of a last token that is half a character
    assert len(answer["tokens"]) == STEPS and len(probabilities) >= STEPS - 2
    for token, said in zip(answer["tokens"], probabilities, strict=False):
        padded = ids + [0] * (len(PROMPT) + STEPS - len(ids))
        ours = logits(GPT2, arrays, padded)[len(ids) - 1].astype(np.float64)
        ours -= np.log(np.exp(ours).sum())
        theirs = {one["id"]: one["logprob"] for one in said["top_logprobs"]}
        assert said["id"] == token and len(theirs) == 50 and np.ptp(ours) > 5
        np.testing.assert_allclose([ours[i] for i in theirs], list(theirs.values()), atol=CLOSE[kind], rtol=0)
        assert token in np.flatnonzero(ours >= ours.max() - CLOSE[kind])
        ids.append(token)
    assert len(set(answer["tokens"])) > 1
