"""What a run will be, said before anything is taken: shapes, memory by part and device, data, schedule. Analytic.

The parts that live from step to step are exact; activations and workspace are estimates from the shapes.
"""

import math
from collections.abc import Mapping

from phijax.model import cross_entropy, params
from phijax.model.config import Activation, ModelConfig
from phijax.model.decoder import remat_names
from phijax.model.flops import train_flops_per_token
from phijax.parallel import sharding
from phijax.training.program import BatchShape, Recipe

GIB = 2**30
FLOAT32 = 4
PARAMETERS, MOMENTS = "parameters (float32)", "optimizer moments"  # parts of memory; the second, its beginning
# Arrays (..., F) that autodiff keeps of an activation: its input, what its derivative needs, its result.
KEPT_OF: dict[Activation, int] = {"silu": 4, "gelu_tanh": 6}
KEPT_OF_GATE = 2  # up, and the product with it


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
    # A layer's, and the next one's on their way; with nothing recomputed the backward pass finds them all kept.
    layers_gathered = c.num_layers if remat_names(recipe.backend.remat) is None else 2
    gathered = layers_gathered * layer_rows * sizes["fsdp"] * compute
    head = c.padded_vocab_size // sizes["tensor"] * c.model_dim
    rows = c.padded_vocab_size // sizes["tensor"]
    logits = cross_entropy.chunk_tokens(tokens, rows) * rows * FLOAT32
    moments = {f"{MOMENTS} (float32)": 2 * weights}
    if recipe.optimizer.moments_on_host:
        moments = {f"{MOMENTS} (float32, {2 * weights / GIB:.3f} GiB on the host)": 0}
    return {
        PARAMETERS: weights,
        **moments,
        "gradients (float32)": weights * (2 if shape[0] > 1 else 1),  # the sum, and a micro-batch's own
        "saved activations (estimate)": tokens * saved_per_token(recipe, sizes["tensor"], shape[2]),
        "one layer's backward pass (estimate)": tokens * recomputed_per_token(recipe, sizes["tensor"], shape[2]),
        "gathered weights (estimate)": gathered,
        "loss: head, logits of a chunk, gradients (estimate)": head * (compute + FLOAT32)
        + 2 * logits
        + 2 * tokens * c.model_dim * compute,
    }


def saved_per_token(recipe: Recipe, tensor: int, length: int) -> int:
    """Bytes kept for the backward pass for each token of this device: all layers, and what stands around them.

    What autodiff keeps, before the compiler merges or recomputes any of it.
    """
    c, compute = recipe.model, recipe.backend.dtype.itemsize
    names = remat_names(recipe.backend.remat)
    if names is None:
        # Scanned, dense attention's mask and its fill value are the same for all layers; unrolled, each has its own.
        masks = 1 if recipe.backend.scan_layers else c.num_layers
        layers = c.num_layers * _everything_per_token(recipe, tensor, length)
        layers += masks * _mask_per_token(recipe, tensor, length)
    else:
        sizes = _named_per_token(c, tensor)
        layers = c.num_layers * compute * (c.model_dim + sum(sizes[name] for name in names))
    rope = 2 * c.rotary_dim * compute
    ids = 4 * (2 if c.positions == "learned" else 1)  # what rows of tables are looked up by
    return layers + rope + ids + _norm_per_token(c, compute)


def recomputed_per_token(recipe: Recipe, tensor: int, length: int) -> int:
    """Bytes that one layer's backward pass makes anew and drops again; 0 where nothing is recomputed."""
    names = remat_names(recipe.backend.remat)
    if names is None:
        return 0
    sizes = _named_per_token(recipe.model, tensor)
    kept = recipe.backend.dtype.itemsize * sum(sizes[name] for name in names)
    return _everything_per_token(recipe, tensor, length) + _mask_per_token(recipe, tensor, length) - kept


def _named_per_token(c: ModelConfig, tensor: int) -> dict[str, int]:
    """Name that a remat policy can save -> numbers a token and layer."""
    rows, kv_rows = c.num_heads * c.head_dim // tensor, c.num_kv_heads * c.head_dim // tensor
    ffn = c.ffn_dim // tensor
    return {
        "query": rows,
        "key": kv_rows,
        "value": kv_rows,
        "attention": rows,
        "attention_residuals": 0,  # the same array as `attention`, and one number a head
        "mid": c.model_dim,
        "gate": ffn if c.gated else 0,
        "up": ffn,
        "activation": ffn,
    }


def _everything_per_token(recipe: Recipe, tensor: int, length: int) -> int:
    """Bytes a token that autodiff keeps of one layer when nothing is recomputed."""
    c, compute = recipe.model, recipe.backend.dtype.itemsize
    heads = c.num_heads // tensor
    rows, kv_rows, ffn = heads * c.head_dim, c.num_kv_heads * c.head_dim // tensor, c.ffn_dim // tensor
    activated = KEPT_OF[c.activation] + (KEPT_OF_GATE if c.gated else 0)
    # Two norms and their results; attention's inputs; the feed-forward layer's.
    kept = 2 * (_norm_per_token(c, compute) + c.model_dim * compute) + compute * (2 * kv_rows + activated * ffn)
    if recipe.backend.attention == "dense":  # scores in float32 and probabilities, of every key
        return kept + 2 * rows * compute + heads * (8 + (4 + compute) * length)
    return kept + 3 * rows * compute + 4 * heads  # query, output, output as heads, logsumexp


def _mask_per_token(recipe: Recipe, tensor: int, length: int) -> int:
    """Bytes of dense attention's mask (bool) and the scores' fill value (float32) for every key and head."""
    return 5 * length * recipe.model.num_heads // tensor if recipe.backend.attention == "dense" else 0


def _norm_per_token(c: ModelConfig, compute: int) -> int:
    """A norm's input and normalised value in float32, two numbers, and what is multiplied with its factors: RMSNorm
    casts that back before."""
    return 2 * c.model_dim * 4 + 2 * 4 + c.model_dim * (compute if c.norm == "rms" else 4)


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


def describe(
    recipe: Recipe,
    sizes: Mapping[str, int],
    shapes: Mapping[str, BatchShape],
    process: Mapping[str, int] | None = None,
) -> list[str]:
    """The plan as lines of text.

    Args:
      shapes: what a phase is called -> its batch shape.
      process: part -> bytes of this process, where its memory is the devices' (cpu_process); it stands instead of
        theirs.
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
        tokens = math.prod(shape)
        flops = train_flops_per_token(recipe.model, shape[2]) * tokens
        lines.append(
            f"{name}: {shape[0]} micro-batches x {shape[1]} rows x {shape[2]} tokens = {tokens:,} tokens and "
            f"{flops:.4g} FLOP a step"
        )
        if process is None:
            lines += ["  memory of one device:", *_parts("sum", memory(recipe, sizes, shape))]
    if process is not None:
        lines += ["memory:", *_parts("memory of this process at its worst", process)]
    return lines


def _parts(total: str, parts: Mapping[str, int]) -> list[str]:
    rows = [*parts.items(), (total, sum(parts.values()))]
    return [f"    {part:<56} {size / GIB:8.3f} GiB" for part, size in rows]
