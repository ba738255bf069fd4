"""What checkpoints, exports and runs in flight rely on: where each weight is found, and where it started."""

import pathlib
import zlib

import numpy as np

from phijax.model import params
from phijax.model.presets import PRESETS

LEAVES = pathlib.Path(__file__).with_name("leaves.txt")


def leaf_lines() -> str:
    """A line `preset path shape` for each leaf of each preset."""
    return "".join(
        f"{preset} {path} {'x'.join(map(str, shape))}\n"
        for preset, model in PRESETS.items()
        for path, shape in sorted(params.shapes(model).items())
    )


def test_every_preset_keeps_its_leaves():
    """Orbax and manifests store these paths; a preset or a leaf that is new is added to leaves.txt."""
    assert leaf_lines() == LEAVES.read_text()


# The second is of processors without fused multiply-adds (tried with XLA's limits: AVX-512 and AVX2; AVX and SSE4.2).
STARTS = ("1f031460", "166f236a")


def test_tiny_starts_from_the_same_bits():
    """A leaf's key is fold_in(seed, crc32(path)). Not jitted: a compiler that fuses rounds the last bit otherwise."""
    started = params.flat(params.init(PRESETS["tiny"], 0))
    digest = 0
    for path in sorted(started):
        digest = zlib.crc32(np.asarray(started[path]).tobytes(), digest)
    assert f"{digest:08x}" in STARTS
