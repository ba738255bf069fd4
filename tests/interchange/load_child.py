"""One of two processes that load a checkpoint: load_child.py CHECKPOINT NUMBER PORT. Prints what it read, as JSON."""

import json
import math
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax

path, number, port = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(number), heartbeat_timeout_seconds=10)

import dataclasses  # noqa: E402

import numpy as np  # noqa: E402

from phijax.interchange.load import load_params  # noqa: E402
from phijax.interchange.open import open_checkpoint  # noqa: E402
from phijax.model import params  # noqa: E402
from phijax.parallel.mesh import MeshConfig, make_mesh  # noqa: E402

opened = open_checkpoint(path)
read: dict[str, int] = {}


class Counting:
    """The source of `opened`, counting elements."""

    shapes, dtype = opened.weights.shapes, opened.weights.dtype

    def read(self, name, index):
        read[name] = read.get(name, 0) + math.prod(part.stop - part.start for part in index)
        return opened.weights.read(name, index)


mesh = make_mesh(MeshConfig(data=1, fsdp=4), jax.devices())
loaded = load_params(dataclasses.replace(opened, weights=Counting()), mesh)
for name, leaf in params.flat(loaded).items():
    rows = opened.weights.shapes()[name]
    for shard in leaf.addressable_shards:
        bounds = [part.indices(size)[:2] for part, size in zip(shard.index, leaf.shape, strict=True)]
        inside = tuple(slice(min(a, n), min(b, n)) for (a, b), n in zip(bounds, rows, strict=True))
        held = np.asarray(shard.data)[tuple(slice(0, part.stop - part.start) for part in inside)]
        np.testing.assert_array_equal(held, opened.weights.read(name, inside), err_msg=name)
print(json.dumps(read), flush=True)
os._exit(0)
