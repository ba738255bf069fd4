"""How far the plan's analytic figures are from compiled ones: python benchmarks/plan_accuracy.py [CASE ...]

Each case is compiled for its slice by the TPU compiler (.venv/bin/pip install -e '.[tpu]'; a minute or two and 3 to
6 GB each) and set beside what `phijax.planning.analytic` says from shapes alone. Nothing is run.
"""

import argparse
import dataclasses

from phijax.parallel import hardware

hardware.prepare_cpu()

from phijax.model.backend import CHOICES
from phijax.model.cross_entropy import LossConfig
from phijax.model.presets import PRESETS
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.planning import analytic
from phijax.planning.assumptions import GIB
from phijax.planning.compiled import DoesNotFit, compile_step
from phijax.planning.topology import tpu_devices
from phijax.training.optimizer import OptimizerConfig
from phijax.training.program import Recipe


@dataclasses.dataclass(frozen=True)
class Case:
    """rows: sequences that data x fsdp chips take at once, for each of them. From profile on: of the config."""

    model: str
    topology: str
    mesh: MeshConfig
    rows: int = 1
    micro_batches: int = 1
    length: int = 4096
    remat: str = "save_all"
    profile: str = "none"
    products: str = "float"
    moments: str = "device"


POD, SIXTEEN, LONG = MeshConfig(data=2, fsdp=64), MeshConfig(fsdp=16), MeshConfig(fsdp=16, context=8)
HOSTED = Case("phi3_medium", "v6e:2x4", MeshConfig(fsdp=8), moments="host")
CASES = (
    Case("phi3_mini", "v5e:16x16", MeshConfig(data=2, fsdp=128)),
    Case("phi3_mini", "v5e:16x16", MeshConfig(data=2, fsdp=128), micro_batches=4),
    Case("phi3_mini", "v5e:16x16", MeshConfig(data=2, fsdp=128), products="int8"),
    Case("phi3_mini", "v5e:4x4", SIXTEEN, remat="save_attention"),
    Case("phi3_mini", "v5e:4x4", SIXTEEN, micro_batches=64, remat="save_all_but_activation", profile="fill_memory"),
    Case("phi3_mini", "v5e:4x4", SIXTEEN, micro_batches=64, remat="save_all_but_activation", moments="host"),
    Case("phi3_mini", "v5e:2x2", MeshConfig(fsdp=4), micro_batches=256, remat="full", moments="host"),
    Case("phi3_medium", "v5p:4x4x8", POD, rows=2, profile="sparse_core"),
    Case("phi3_medium", "v5p:4x4x8", POD, rows=4, remat="save_all_but_activation", profile="sparse_core"),
    Case("phi3_medium", "v5p:2x2x4", SIXTEEN, rows=4, micro_batches=16, remat="save_mid_gate_up"),
    Case("phi3_mini", "v5p:2x2x2", MeshConfig(fsdp=4, tensor=2), rows=2),
    Case("phi3_mini", "v6e:16x16", MeshConfig(data=2, fsdp=128), rows=2),
    Case("phi3_medium", "v6e:16x16", MeshConfig(data=4, fsdp=64), remat="save_mid_gate_up", profile="sparse_core"),
    dataclasses.replace(HOSTED, rows=2, micro_batches=64, remat="full"),
    dataclasses.replace(HOSTED, micro_batches=128, remat="save_attention", profile="sparse_core"),
    Case("phi3_mini", "v5p:4x4x8", LONG, length=131_072),
    Case("phi3_mini", "v5p:4x4x8", LONG, length=131_072, profile="sparse_core"),
)


def compare(case: Case) -> str:
    """One line of the table."""
    model = dataclasses.replace(PRESETS[case.model], sliding_window=None)
    if case.length > model.max_position:
        model = dataclasses.replace(model, max_position=case.length)
    backend = dataclasses.replace(CHOICES["tpu"], remat=case.remat, mlp_products=case.products)
    where = analytic.make_slice(case.topology, case.mesh)
    optimizer = OptimizerConfig(moments=case.moments)
    options = hardware.compiler_options(
        hardware.CompilerConfig(case.profile), where.chip.name, moments_on_host=optimizer.moments_on_host
    )
    recipe = Recipe(model, backend, optimizer, LossConfig(), 10_000, 0, options)
    shape = (case.micro_batches, case.rows * where.sizes["data"] * where.sizes["fsdp"], case.length)
    shapes = analytic.estimate(recipe, where, shape)
    held = sum(analytic.memory(recipe, where.sizes, shape).values())
    mesh = " x ".join(str(size) for size in where.sizes.values())
    rows = f"{case.rows} x {case.micro_batches} x {case.length}"
    name = f"{case.model.removeprefix('phi3_'):<7}{case.topology:<11}{mesh:<17}{rows:<17}"
    how = f"{case.remat} {case.profile} {case.products} {case.moments}"
    devices = tpu_devices(case.topology)
    compiled = compile_step(recipe, make_mesh(case.mesh, devices), case.topology, shape)
    if isinstance(compiled, DoesNotFit):
        return f"{name} does not fit: {compiled.message}"
    e, parts = compiled.estimate, sum(compiled.hbm_parts.values())
    kinds = ("matrix", "vector", "attention", "exposed", "host")
    pairs = " ".join(f"{getattr(shapes, kind):7.3f}/{getattr(e, kind):7.3f}" for kind in kinds)
    return (
        f"{name}{shapes.step:8.3f}{e.step:9.3f}{shapes.step / e.step - 1:+8.1%}  {pairs}"
        f"{held / GIB:8.2f}{compiled.hbm_peak / GIB:8.2f}{held / compiled.hbm_peak - 1:+8.1%}"
        f"{parts / compiled.hbm_peak - 1:+8.2%}{compiled.compile_seconds:8.0f}  {how}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", type=int, help=f"numbers of cases, 0 to {len(CASES) - 1}; none: all")
    numbers = parser.parse_args().cases
    if not all(0 <= number < len(CASES) for number in numbers):
        parser.error(f"there are cases 0 to {len(CASES) - 1}")
    print(
        f"{'model':<7}{'slice':<11}{'mesh':<17}{'rows x A x T':<17}seconds compiled   error  matrix, vector, "
        f"attention, exposed, host: shapes/compiled{'':25}GiB compiled   error   parts compile s"
    )
    for case in [CASES[number] for number in numbers] or CASES:
        print(compare(case), flush=True)


if __name__ == "__main__":
    main()
