"""Every program of every preset as StableHLO text, a file each: python benchmarks/stablehlo.py --output=DIR

For a change that is to change nothing: run it before and after, then `diff -rq BEFORE AFTER`. Train steps for CPU, v5e
and v5p on several meshes; prefill and decode steps for CPU, GPU and TPU, float, int4 and with an int8 cache. Nothing is
compiled. Models have their published widths and three layers; texts are without locations, so moved lines do not show.
"""

import argparse
import dataclasses
import functools
import hashlib
import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"

from phijax.parallel import hardware

hardware.prepare_cpu()

import jax
import jax.numpy as jnp

jax.config.update("jax_traceback_in_locations_limit", 0)  # kernels carry their locations in their bytes

from phijax.inference import placement, programs
from phijax.model import cached, params
from phijax.model.backend import CHOICES
from phijax.model.config import LongRope
from phijax.model.cross_entropy import LossConfig
from phijax.model.kernels import cpu_int4
from phijax.model.presets import PRESETS
from phijax.model.quantized import Quantized
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.planning import decode_step, topology
from phijax.planning.decode_step import Served
from phijax.quantization import policy
from phijax.training.optimizer import OptimizerConfig
from phijax.training.program import Recipe, lower_eval_step, lower_train_step

LAYERS = 3
SLICES = {"v5e": "v5e:4x4", "v5p": "v5p:2x2x4"}
MESHES = {  # name -> mesh of 16 chips, micro-batches
    "fsdp": (MeshConfig(), 1),
    "data_micro": (MeshConfig(data=2), 2),
    "context": (MeshConfig(context=2), 1),
    "tensor": (MeshConfig(tensor=2), 1),
}


def models():
    for name, c in PRESETS.items():
        if c.requires_long_rope:
            ones = (1.0,) * (c.rotary_dim // 2)
            c = dataclasses.replace(c, long_rope=LongRope(ones, ones, original_max_position=4096))
        yield name, dataclasses.replace(c, num_layers=LAYERS)


def train_programs(name, c):
    for platform in ("cpu", "v5e", "v5p"):
        kind = "cpu" if platform == "cpu" else "tpu"
        devices = jax.devices() if platform == "cpu" else topology.tpu_devices(SLICES[platform])
        for mesh_name, (mesh_config, micro) in MESHES.items():
            if platform == "cpu" and mesh_name != "fsdp":
                continue
            backend = CHOICES[kind]
            if name == "phi3_mini" and mesh_name == "fsdp":
                variants = {"": backend, "_int8": dataclasses.replace(backend, mlp_products="int8")}
                variants["_dense"] = dataclasses.replace(backend, attention="dense", remat="full")
            else:
                variants = {"": backend}
            mesh = make_mesh(mesh_config, devices)
            sizes = dict(mesh.shape)
            if c.num_kv_heads % sizes["tensor"] or c.num_heads % sizes["tensor"]:
                continue
            length = min(c.max_position, 512 if platform == "cpu" else 8192 if c.long_rope else 4096)
            rows = max(1, sizes["data"] * sizes["fsdp"])
            for variant, backend in variants.items():
                recipe = Recipe(c, backend, OptimizerConfig(), LossConfig(z_loss=1e-4), 100, 0)
                shape = (micro, rows, length)
                yield (
                    f"train_{platform}_{mesh_name}{variant}",
                    lambda r=recipe, m=mesh, s=shape: lower_train_step(r, m, s),
                )
            if mesh_name == "fsdp":
                yield f"eval_{platform}", functools.partial(lower_eval_step, recipe, mesh, (1, rows, length))


def tpu_programs(c):
    devices = topology.tpu_devices("v5e:2x2")
    int4 = policy.parse("int4_g128" if c.model_dim % 128 == 0 else "int4_g64")
    for tensor in (1, 2, 4):
        mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=tensor), devices[:tensor])
        for kind, schemes, cache in (("bf16", {}, "auto"), ("int4", int4, "int8")):
            served = Served(c, mesh, schemes, cache)
            yield f"step_v5e_{kind}_tensor{tensor}", lambda s=served: decode_step.lower_step(s, 8, 512)
            yield f"prefill_v5e_{kind}_tensor{tensor}", lambda s=served: decode_step.lower_prefill(s, 256, 512)


def host_programs(c, kind: str, tensor: int, weights_kind: str, cache_dtype: str):
    """On CPU devices, as a CPU or a GPU would be given them."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=tensor), jax.devices()[:tensor])
    layout = placement.choose_layout(c, CHOICES[kind], mesh, cache_dtype)
    weights = jax.eval_shape(lambda: resident_like(c, layout, weights_kind))

    def struct(shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    lengths = programs.piece_lengths(600)
    half = c.rotary_dim // 2
    for rows, count in ((2, struct(())), (8, struct(())), (8, None)):
        cache = jax.eval_shape(lambda n=rows: cached.empty_cache(c, layout, n, lengths))
        yield (
            f"step_{rows}{'_free' if count is None else ''}",
            lambda k=cache, n=rows, t=count: programs.step.lower(
                c, layout, 1.0, weights, k, struct((n,)), struct((n,)), struct((n, half), jnp.float32), t
            ),
        )
    for every in (False, True):
        cache = jax.eval_shape(lambda: cached.empty_cache(c, layout, 1, lengths))
        yield (
            f"prefill{'_every' if every else ''}",
            lambda k=cache, e=every: programs.prefill.lower(
                c, layout, 1.0, e, weights, k, struct((64,)), struct(()), struct(()), struct((half,), jnp.float32)
            ),
        )


def resident_like(c, layout, kind: str):
    """Weights of zeros as `resident.place` lays them; under eval_shape."""
    flat = {name: jnp.zeros(shape, layout.dtype) for name, shape in params.shapes(c).items()}
    if kind != "float":
        for name, scheme in policy.assign(c, policy.parse("int4_g32")).items():
            shape, axis = params.shapes(c)[name], policy.summed_axis(name)
            w = Quantized(jnp.zeros(shape, jnp.int4), jnp.zeros(scheme.scales_shape(shape, axis), jnp.float16))
            layers = [jax.tree.map(lambda a, i=i: a[i], w) for i in range(c.num_layers)] if len(shape) == 3 else [w]
            made = tuple(tiled_like(w, axis) for w in layers) if kind == "tiled" else layers
            flat[name] = (tuple(made) if len(shape) == 3 else made[0]) if kind == "tiled" else w
    if layout.transposed and c.tied_head:
        flat[cached.HEAD] = flat["embedding"]
    laid_out = {path: cached.laid_out(layout, path, leaf, c.num_layers) for path, leaf in flat.items()}
    return cached.assembled(layout, laid_out, c.num_layers)


def tiled_like(w: Quantized, axis: int) -> cpu_int4.Tiled:
    inputs, outputs = w.shape[axis], w.shape[-1 if axis == -2 else -2]
    empty = cpu_int4.Tiled(jnp.zeros((0, 0), jnp.uint8), w.shape, axis == -2, 4, 32, False, "generic")
    size = empty.scale_bytes + 4 * cpu_int4.TILE * (-(-inputs // 32) * 32 // 8)
    return dataclasses.replace(empty, data=jnp.zeros((-(-outputs // cpu_int4.TILE), size), jnp.uint8))


def all_programs(name, c):
    yield from train_programs(name, c)
    yield from tpu_programs(c)
    kinds = [("cpu", 1, "float", "auto"), ("cpu", 1, "float", "int8"), ("cpu", 1, "tiled", "auto")]
    kinds += [("cpu", 1, "tiled", "int8"), ("cpu", 1, "stored", "auto"), ("gpu", 1, "float", "auto")]
    for kind, tensor, weights, cache in kinds:
        for program, lower in host_programs(c, kind, tensor, weights, cache):
            yield f"{program}_{kind}_{weights}_{cache}", lower


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--preset", help="this one alone")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True)
    for name, c in models():
        if arguments.preset not in (None, name):
            continue
        for program, lower in all_programs(name, c):
            text = lower().as_text()
            (arguments.output / f"{name}.{program}.txt").write_text(text)
            print(hashlib.sha256(text.encode()).hexdigest()[:16], len(text), f"{name}.{program}", flush=True)


if __name__ == "__main__":
    main()
