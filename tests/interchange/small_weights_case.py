"""Tiny models, quantised as `phijax quantize` does it, and the float32 that their integers stand for."""

import dataclasses
import functools
import pathlib

import jax.numpy as jnp
import numpy as np
from etils import epath
from gguf_case import GPT2, LLAMA, PHI3, everything, opened, random_arrays, tokenizer

from phijax.interchange.facts import Facts
from phijax.interchange.huggingface import export as huggingface_export
from phijax.interchange.huggingface.families.family import Family
from phijax.interchange.native import quantize as native_quantize
from phijax.interchange.open import open_checkpoint
from phijax.interchange.opened import Opened
from phijax.interchange.tensors import Row, tensors
from phijax.quantization import policy
from phijax.quantization.rounding import round_to_nearest

# Inputs of 128 and 256: groups of every size, one or more. Heads are no square of anything.
FUSED = dataclasses.replace(PHI3, model_dim=128, num_heads=2, num_kv_heads=1, head_dim=64, ffn_dim=256)
SPLIT = dataclasses.replace(LLAMA, model_dim=128, num_heads=4, num_kv_heads=2, head_dim=32, ffn_dim=256)

# Of learned positions: a feed-forward width of 4 D, as mlx-lm has it alone.
LEARNED = dataclasses.replace(GPT2, model_dim=64, num_heads=4, num_kv_heads=4, head_dim=16, ffn_dim=256)

CASES = {
    "groups of 32": (FUSED, "int4_g32"),
    "groups of 128": (FUSED, "int4_g128"),
    "channels": (FUSED, "int4"),
    "eight bits": (FUSED, "int8"),
    "mixed": (FUSED, "int4_g64_down8,qkv=int4,head=as_stored"),
    "split and tied": (SPLIT, "int4_g64_head8"),
    "split, o dense": (SPLIT, "int4_g32,o=as_stored,embedding=as_stored"),
}
# For formats that a GPT-2 can be written in.
LEARNED_CASES = {"learned": (LEARNED, "int4_g32_down8,o=as_stored")}
STOPS = ("<|end|>", "<|endoftext|>")


def source(c) -> Opened:
    """The float model, in memory, with a stop token beside the end of text."""
    kind = {FUSED: "Phi3ForCausalLM", SPLIT: "LlamaForCausalLM", LEARNED: "GPT2LMHeadModel"}[c]
    ids = tuple(tokenizer().added_tokens[name] for name in STOPS)
    facts = Facts(architecture=kind, name="tiny")
    return opened(c, random_arrays(c, jnp.bfloat16), stop_ids=ids, facts=facts, path=epath.Path(__file__))


class Small:
    """Quantised checkpoints, each made once a session."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder

    @functools.cache  # noqa: B019
    def __call__(self, case: str) -> Opened:
        c, scheme = (CASES | LEARNED_CASES)[case]
        output = self._folder / case.replace(" ", "_")
        assigned = policy.assign(c, policy.parse(scheme))
        native_quantize.write(source(c), epath.Path(output), assigned, round_to_nearest, method="rtn")
        return open_checkpoint(output)


def expected(opened: Opened, rows: tuple[Row, ...]) -> dict[str, np.ndarray]:
    """Name in a Hugging Face folder -> float32, (out, in): every integer times its scale."""
    leaves, found = everything(opened.weights), {}
    for tensor in tensors(opened.model, rows):
        parts = []
        for part in tensor.parts:
            leaf = leaves[part.leaf] if part.layer is None else leaves[part.leaf][part.layer]
            parts.append(np.asarray(leaf.T if part.transposed else leaf, np.float32))
        found[tensor.name] = np.concatenate(parts)
    return found


def family_of(opened: Opened) -> Family:
    return huggingface_export.choose_family(opened, "hf")


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """(n, words) of 32 bits -> (n, in) unsigned integers: number j of a word in its bits from j b on."""
    shifts = np.arange(0, 32, bits, dtype=np.uint64)
    numbers = (words.view(np.uint32).astype(np.uint64)[..., None] >> shifts) & np.uint64((1 << bits) - 1)
    return numbers.reshape(len(words), -1)
