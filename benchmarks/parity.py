"""How far our logits are from transformers', in float32: python benchmarks/parity.py [--write]

Small random models of transformers' own classes, saved as it saves them and opened by phijax.load. Decoding is compared
step by step with transformers' `generate`, which computes its cache anew where LongRoPE changes lists.
tests/inference/test_parity.py holds every line below 1e-4.
"""

import argparse
import dataclasses
import os
import pathlib
import tempfile
from functools import lru_cache, partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from phijax.parallel import hardware

hardware.prepare_cpu()

import jax
import jax.numpy as jnp
import numpy as np

from phijax.inference.model import load
from phijax.inference.sampling import Sampling
from phijax.interchange.load import load_params
from phijax.interchange.open import open_checkpoint
from phijax.model import params
from phijax.model.backend import CHOICES
from phijax.parallel.mesh import MeshConfig, make_mesh

L0 = 40  # tokens up to which LongRoPE's short list holds
VOCABULARY = 300


@dataclasses.dataclass(frozen=True)
class Shape:
    """What distinguishes the models; grouped heads of 48, which is no power of two, in all of them."""

    window: int | None = None
    long_rope: bool = False
    partial_rotary_factor: float = 1.0
    tied: bool = False
    llama: bool = False


PLAIN, WINDOW, LONG = Shape(), Shape(window=7), Shape(long_rope=True)
PARTIAL = Shape(long_rope=True, partial_rotary_factor=0.75, tied=True)
LLAMA = Shape(llama=True, tied=True)


def transformers_model(shape: Shape):
    """A random model of transformers' class: matrices of unit gain, norms around one, so that no mistake is small."""
    import torch
    import transformers

    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 192,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4 * L0 if shape.long_rope else 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": shape.tied,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if shape.llama:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, head_dim=48, rope_parameters=rope))
    else:
        rope["partial_rotary_factor"] = shape.partial_rotary_factor
        if shape.long_rope:
            half = int(48 * shape.partial_rotary_factor) // 2
            rope |= {
                "rope_type": "longrope",
                "short_factor": [1.0 + 0.05 * i for i in range(half)],
                "long_factor": [1.5 + 0.9 * i for i in range(half)],
            }
        config |= {"sliding_window": shape.window, "rope_parameters": rope}
        config["original_max_position_embeddings"] = L0 if shape.long_rope else 4096
        model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if weight.ndim == 1 else noise * weight.shape[1] ** -0.5)
    return model.eval()


@lru_cache(maxsize=8)
def both(shape: Shape):
    """The model of transformers, ours of the folder that it saves, and our parameters for the training path."""
    theirs = transformers_model(shape)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        opened = open_checkpoint(folder)
        weights = load_params(opened, make_mesh(MeshConfig(), jax.devices()[:1]))
        return theirs, load(folder), weights


def random_tokens(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length, dtype=np.int32)


def their_logits(model, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return model(torch.tensor(tokens, dtype=torch.long)[None], use_cache=False).logits[0].numpy()


def their_decoding(model, prompt: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens (T,) with the prompt in front, logits (steps, V)) of greedy decoding with a cache."""
    import torch

    ids = torch.tensor(prompt, dtype=torch.long)[None]
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences[0].numpy(), np.concatenate([step.numpy() for step in out.logits])


def packed_documents() -> list[np.ndarray]:
    """Documents that share a row, each longer than the window."""
    return [random_tokens(n, seed=n) for n in (31, 12, 24)]


def forward(shape: Shape, length: int) -> float:
    """All logits of one text."""
    theirs, ours, _ = both(shape)
    tokens = random_tokens(length)
    return difference(ours.logits(tokens), their_logits(theirs, tokens))


def packed(shape: Shape) -> float:
    """Documents of one row of the training path, against each document alone."""
    theirs, ours, weights = both(shape)
    documents = packed_documents()
    positions = np.concatenate([np.arange(len(d), dtype=np.int32) for d in documents])[None]
    segments = np.concatenate([np.full(len(d), i + 1, np.int32) for i, d in enumerate(documents)])[None]
    tokens = np.concatenate(documents)[None]

    @jax.jit
    def logits(weights):
        decoder = params.module(ours.config, weights)
        hidden = decoder.hidden(tokens, positions, segments, CHOICES["cpu"], length=tokens.shape[1])
        return decoder.logits(hidden)[0]

    got = np.asarray(logits(jax.tree.map(jnp.asarray, weights)))
    return difference(got, np.concatenate([their_logits(theirs, d) for d in documents]))


def decoded(shape: Shape, start: int, steps: int) -> float:
    """Logits of every step of greedy decoding with a cache, as long as both sides choose the same tokens."""
    theirs, ours, _ = both(shape)
    prompt = random_tokens(start)
    tokens, expected = their_decoding(theirs, prompt, steps)
    pieces = list(ours.generator.stream([prompt], Sampling(temperature=0, max_tokens=steps), with_logits=True))
    worst = 0.0
    for piece, row, token in zip(pieces, expected, tokens[start:].tolist(), strict=True):
        worst = max(worst, difference(piece.logits, row))
        second, first = np.sort(row)[-2:]
        if piece.token != token:
            assert first - second < 1e-3, f"tokens {piece.token} and {token}, and their gap is {first - second}"
            break
    return worst


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape and np.abs(theirs).max() > 1, "logits too small to show mistakes"
    return float(np.abs(ours - theirs).max())


CASES: dict[str, partial[float]] = {
    "4K": partial(forward, PLAIN, 300),
    "window shorter than the text": partial(forward, WINDOW, 60),
    "LongRoPE below the switch": partial(forward, LONG, L0 - 1),
    "LongRoPE at the switch": partial(forward, LONG, L0),
    "LongRoPE one above the switch": partial(forward, LONG, L0 + 1),
    "LongRoPE far above the switch": partial(forward, LONG, 3 * L0),
    "partial rotary, tied head": partial(forward, PARTIAL, 50),
    "Llama, tied head, grouped heads": partial(forward, LLAMA, 50),
    "packed rows": partial(packed, PLAIN),
    "packed rows, window": partial(packed, WINDOW),
    "cached decoding, 64 tokens": partial(decoded, PLAIN, 10, 64),
    "cached decoding, window": partial(decoded, WINDOW, 10, 64),
    "cached decoding wholly below the switch": partial(decoded, LONG, 5, L0 - 6),
    "cached decoding across the switch": partial(decoded, LONG, L0 - 10, 64),
    "cached decoding wholly above the switch": partial(decoded, LONG, L0 + 5, 64),
    "cached decoding, partial rotary, tied, across": partial(decoded, PARTIAL, L0 - 10, 64),
    "cached decoding, Llama": partial(decoded, LLAMA, 10, 64),
}


PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "parity.md"


def with_columns(page: str, columns: dict[str, dict[str, str]]) -> str:
    """The page with columns of its table, each head -> case -> cell, in place of those whose heads begin alike."""
    lines = page.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| case |"))
    heads = _cells(lines[start])
    for head, cells in columns.items():
        place = next(i for i, old in enumerate(heads) if old.split()[0] == head.split()[0])
        for number in range(start, start + 2 + len(CASES)):
            row = _cells(lines[number])
            row[place] = head if number == start else cells.get(row[0], row[place])
            lines[number] = "| " + " | ".join(row) + " |"
    return "\n".join(lines) + "\n"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split(" | ")]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name} too")
    write = parser.parse_args(arguments).write
    import torch
    import transformers

    print(f"| float32, against transformers {transformers.__version__} on torch {torch.__version__} | max abs |")
    print("|---|---|")
    found = {}
    for name, measure in CASES.items():
        found[name] = f"{measure():.1e}"
        print(f"| {name} | {found[name]} |", flush=True)
    if write:
        PAGE.write_text(with_columns(PAGE.read_text(), {"phijax": found}))


if __name__ == "__main__":
    main()
