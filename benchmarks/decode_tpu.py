"""A decoding step on TPU, compiled ahead of time: python benchmarks/decode_tpu.py [--model=phi3_mini]

Nothing runs. For each scheme of weights, type of cache and number of rows, one line: the estimated step of the very
program that would run, beside the time that its bytes take out of HBM, and the temporaries that the compiler asks for.
The estimate replays the compiler's schedule. It has no cycles of the Pallas kernels (products of groups, attention);
`phijax/planning/decode_kernels.py` says what they are taken for.

All positions are taken to be at the end of a cache of --context places. --tensor cuts heads over so many chips.
"""

import itertools

from absl import app, flags

from phijax.model.presets import PRESETS
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.planning import decode_step, estimator
from phijax.planning.assumptions import chip_of
from phijax.planning.topology import torus_of, tpu_devices
from phijax.quantization import policy

FLAGS = flags.FLAGS
flags.DEFINE_string("model", "phi3_mini", "A preset.")
flags.DEFINE_string("topology", "v5e:2x2", "Of its chips --tensor are used.")
flags.DEFINE_integer("tensor", 1, "Chips over which heads are cut.")
flags.DEFINE_list("schemes", ["int4", "int4_g128", "int8", "bf16"], "Of phijax quantize, or bf16.")
flags.DEFINE_list("caches", ["bf16", "int8"], "bf16 and int8.")
flags.DEFINE_list("rows", ["1", "8", "32"], "Rows that are decoded together.")
flags.DEFINE_integer("context", 512, "Places of the cache.")

COLUMNS = "weights|cache|rows|read GB|HBM floor ms|est. step ms|products|kernels|vector|temp MB|tokens/s".split("|")


def main(_) -> None:
    chip = chip_of(FLAGS.topology)
    devices = tpu_devices(FLAGS.topology)[: FLAGS.tensor]
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=FLAGS.tensor), devices)
    print(f"{FLAGS.model}, {FLAGS.tensor} of {FLAGS.topology}, context {FLAGS.context}\n\n| {' | '.join(COLUMNS)} |")
    print("|" + "---|" * len(COLUMNS))
    for scheme, cache, rows in itertools.product(FLAGS.schemes, FLAGS.caches, map(int, FLAGS.rows)):
        schemes = {} if scheme == "bf16" else policy.parse(scheme)
        served = decode_step.Served(PRESETS[FLAGS.model], mesh, schemes, "int8" if cache == "int8" else "auto")
        print(line(served, scheme, cache, rows, chip, torus_of(FLAGS.topology, devices)), flush=True)


def line(served, scheme, cache, rows, chip, torus) -> str:
    read = decode_step.bytes_read(served, rows, FLAGS.context)
    floor = read / chip.hbm_bandwidth
    try:
        compiled = decode_step.lower_step(served, rows, FLAGS.context).compile()
    except Exception as error:  # the compiler's own; what does not fit is a line too
        return f"| {scheme} | {cache} | {rows} | {read / 1e9:.2f} | {1e3 * floor:.2f} | {str(error).splitlines()[0]} |"
    step = estimator.estimate(compiled.as_text(), chip, torus, window=served.model.sliding_window)
    parts = " | ".join(f"{1e3 * t:.2f}" for t in (step.step, step.matrix, step.attention, step.vector))
    temporary = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return (
        f"| {scheme} | {cache} | {rows} | {read / 1e9:.2f} | {1e3 * floor:.2f} | {parts} | {temporary:.1f} "
        f"| {rows / step.step:.0f} |"
    )


if __name__ == "__main__":
    app.run(main)
