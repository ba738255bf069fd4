"""What training on a CPU takes of the machine: one process at its worst moment, by part, from shapes.

There the device's memory is the process's own, so all that a process has counts: what is imported, what compiling
leaves, the state, the worst program's temporary buffer, which glibc keeps (hardware.keep_freed_memory), and a save's
copy. `benchmarks/cpu_memory.py` holds the sum beside runs: never below what they take, at most 30 % above.
"""

import math
from collections.abc import Mapping, Sequence

from phijax.model import params
from phijax.planning import summary
from phijax.training.program import BatchShape, Recipe

MIB = 2**20
# Resident, by /proc/PID/status of real runs with jax 0.10.2 on x86-64 Linux: when all is imported (326 MiB); what is
# added, beside the state, when the programs are compiled and what the compiler freed is given back (294 MiB with 2
# layers, 239 with 4, 298 with 8, 600 with 30); what saves, reports and the plot at the end add to a small run (107).
IMPORTED = 330 * MIB
COMPILED = 250 * MIB
COMPILED_PER_LAYER = 12 * MIB  # unrolled: traces, kernels and thunks grow with the layers
AROUND = 110 * MIB
MOMENTS = f"{summary.MOMENTS} (float32)"


def memory(
    recipe: Recipe,
    sizes: Mapping[str, int],
    shapes: Sequence[BatchShape],
    *,
    devices: int,
    asynchronous: bool,
) -> dict[str, int]:
    """Part -> bytes of the process at its worst moment: in a step during which a save is written.

    Args:
      sizes: mesh axis -> size. shapes: (A, B, T) of every step, evaluation's among them as (1, B, T).
      devices: of the mesh that are this process's own.
      asynchronous: whether training goes on while a step is saved.
    """
    layers = 1 if recipe.backend.scan_layers else recipe.model.num_layers
    steps = [temporary(recipe, sizes, shape) for shape in shapes]
    worst = max(steps, key=lambda parts: sum(parts.values()))
    # With one device a step is computed within its call; else the next one's buffer is taken before it is freed.
    held = 1 if math.prod(sizes.values()) == 1 else 2
    weights = summary.memory(recipe, sizes, shapes[0])[summary.PARAMETERS]
    # optimizer.moments=host is the same memory here.
    state = {summary.PARAMETERS: weights, MOMENTS: 2 * weights}
    whole = 3 * summary.FLOAT32 * sum(_elements(recipe).values())
    saved = min(whole, devices * sum(state.values()))  # each piece once, however many devices have it
    return {
        "Python, JAX and phijax, imported": IMPORTED,
        "compiled programs, and what compiling them leaves": COMPILED + layers * COMPILED_PER_LAYER,
        **{part: devices * size for part, size in state.items()},
        **{part: held * devices * size for part, size in worst.items()},
        "a save: copy of the state while training goes on": saved if asynchronous else 0,
        "a save: its chunks, compressed on their way": saved,  # TensorStore begins all at once; floats hardly shrink
        "loader, reports, threads of a save": AROUND,
    }


def temporary(recipe: Recipe, sizes: Mapping[str, int], shape: BatchShape) -> dict[str, int]:
    """Part -> bytes of a train step's temporary buffer on one device: what `summary.memory` has beside the state, and
    what XLA:CPU's order of the program, made for speed, holds at the same time."""
    c, (_, rows, length) = recipe.model, shape
    known = summary.memory(recipe, sizes, shape)
    beside = (summary.PARAMETERS, summary.MOMENTS)
    parts = {part: size for part, size in known.items() if not part.startswith(beside)}
    tokens = rows * length // (sizes["data"] * sizes["fsdp"] * sizes["context"])
    if not recipe.backend.scan_layers:
        blocks = sum(n for path, n in _elements(recipe).items() if path.startswith(f"{params.STACKED}/"))
        parts["gradients of layers before they are stacked"] = summary.FLOAT32 * blocks // sizes["tensor"]
    if recipe.backend.attention == "blocked":
        # Recomputed scores, probabilities and their gradients: float32, the half square, of all layers, since nothing
        # in the program makes one layer's wait for another's.
        keys = min(length, c.sliding_window or length)
        pairs = tokens * keys // (2 if keys == length else 1)
        parts["attention's blocks in the backward pass"] = (
            3 * summary.FLOAT32 * pairs * c.num_heads // sizes["tensor"] * c.num_layers
        )
    head = c.padded_vocab_size // sizes["tensor"] * c.model_dim
    parts["gradient of the head, scaled"] = summary.FLOAT32 * head
    return parts


def _elements(recipe: Recipe) -> dict[str, int]:
    return {path: math.prod(shape) for path, shape in params.shapes(recipe.model).items()}
