"""What a run will be, said before anything is taken: shapes, memory by part and device, data, schedule. Analytic.

The parts that live from step to step are exact; activations and workspace are estimates from the shapes.
"""

import math
from collections.abc import Mapping

from phijax.model import params
from phijax.model.config import ModelConfig
from phijax.model.decoder import remat_names
from phijax.model.flops import train_flops_per_token
from phijax.parallel import sharding
from phijax.training import cross_entropy
from phijax.training.program import BatchShape, Recipe

GIB = 2**30
FLOAT32 = 4


def memory(recipe: Recipe, sizes: Mapping[str, int], shape: BatchShape) -> dict[str, int]:
    """Part -> bytes on one device.

    Args:
      sizes: mesh axis -> size. shape: (A, B, T) of a step's batch.
    """
    c, axes = recipe.model, params.axes(recipe.model)
    elements = {
        path: math.prod(n // sharding.parts(a, sizes) for n, a in zip(dims, axes[path], strict=True))
        for path, dims in params.shapes(c).items()
    }
    weights = FLOAT32 * sum(elements.values())
    compute = recipe.backend.dtype.itemsize
    tokens = shape[1] * shape[2] // (sizes["data"] * sizes["fsdp"] * sizes["context"])
    layer_rows = sum(n for path, n in elements.items() if path.startswith(f"{params.STACKED}/")) // c.num_layers
    gathered = layer_rows * sizes["fsdp"] * compute
    head = c.padded_vocab_size // sizes["tensor"] * c.model_dim
    logits = min(cross_entropy.CHUNK, tokens) * c.padded_vocab_size // sizes["tensor"] * FLOAT32
    return {
        "parameters (float32)": weights,
        "optimizer moments (float32)": 2 * weights,
        "gradients (float32)": weights * (2 if shape[0] > 1 else 1),  # the sum, and a micro-batch's own
        "saved activations (estimate)": tokens * saved_per_token(recipe, sizes["tensor"]) * compute,
        "gathered weights (estimate)": 2 * gathered,
        "loss: head, its gradient, logits of a chunk (estimate)": head * (compute + FLOAT32) + 2 * logits,
    }


def saved_per_token(recipe: Recipe, tensor: int) -> int:
    """Numbers kept for the backward pass for each token of this device, all layers."""
    c = recipe.model
    # On TPU the last dimension of a saved array fills whole lanes of 128.
    head = -(-c.head_dim // 128) * 128 if recipe.backend.attention == "splash" else c.head_dim
    rows, kv_rows = c.num_heads * head // tensor, c.num_kv_heads * head // tensor
    ffn = c.ffn_dim // tensor
    sizes = {
        "query": rows,
        "key": kv_rows,
        "value": kv_rows,
        "attention": rows,
        "attention_residuals": 0,  # the same array as `attention`, and one number a head
        "mid": c.model_dim,
        "gate": ffn,
        "up": ffn,
        "activation": ffn,
    }
    names = remat_names(recipe.backend.remat)
    kept = sum(sizes[name] for name in (sizes if names is None else names))
    return c.num_layers * (c.model_dim + kept)


def describe_model(c: ModelConfig) -> list[str]:
    lines = [
        f"model: {params.count(c):,} parameters, {c.num_layers} layers of {c.model_dim}, {c.num_heads} heads of "
        f"{c.head_dim} ({c.num_kv_heads} kv), ffn {c.ffn_dim}, vocabulary {c.vocab_size} (rows padded to "
        f"{c.padded_vocab_size}), window {c.sliding_window}"
    ]
    names = params.axes(c)
    width = max(map(len, names))
    for path, shape in params.shapes(c).items():
        lines.append(f"  {path:<{width}}  {shape!s:<20} {', '.join(names[path])}")
    return lines


def describe(recipe: Recipe, sizes: Mapping[str, int], shapes: Mapping[str, BatchShape]) -> list[str]:
    """The plan as lines of text.

    Args:
      shapes: what a phase is called -> its batch shape.
    """
    lines = describe_model(recipe.model)
    backend = recipe.backend
    lines.append(
        f"mesh: {' x '.join(f'{name} {size}' for name, size in sizes.items())} = {math.prod(sizes.values())} devices; "
        f"attention {backend.attention}, remat {backend.remat}, compute {backend.compute_dtype}, "
        f"layers {'scanned' if backend.scan_layers else 'unrolled'}"
    )
    lines += [f"warning: {text}" for text in params.check_mesh(recipe.model, sizes)]
    for name, shape in shapes.items():
        parts = memory(recipe, sizes, shape)
        total = sum(parts.values())
        tokens = math.prod(shape)
        flops = train_flops_per_token(recipe.model, shape[2]) * tokens
        lines.append(
            f"{name}: {shape[0]} micro-batches x {shape[1]} rows x {shape[2]} tokens = {tokens:,} tokens and "
            f"{flops:.4g} FLOP a step"
        )
        lines.append("  memory of one device:")
        lines += [f"    {part:<56} {size / GIB:8.3f} GiB" for part, size in parts.items()]
        lines.append(f"    {'sum':<56} {total / GIB:8.3f} GiB")
    return lines
