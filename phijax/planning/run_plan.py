"""A whole run planned: its phases' steps, time, chip-hours, cost, memory of the hosts; as text and as a dict."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from phijax.planning.assumptions import GIB
from phijax.planning.step_plan import FLOP_CONVENTION, StepPlan
from phijax.training.program import BatchShape

DAY = 86400.0


@dataclasses.dataclass(frozen=True)
class HostMemory:
    """Bytes that a save holds on one host, asynchronous or not, and what a host of this kind has.

    moments: Adam's, where they lie there throughout; not part of the other two.
    """

    asynchronous: int
    synchronous: int
    host: int
    moments: int = 0

    def needed(self, is_asynchronous: bool) -> int:
        return self.moments + (self.asynchronous if is_asynchronous else self.synchronous)

    def fits(self, is_asynchronous: bool) -> bool:
        return self.needed(is_asynchronous) < self.host

    def line(self, is_asynchronous: bool) -> str:
        needed = self.needed(is_asynchronous)
        verdict = "fits" if self.fits(is_asynchronous) else "DOES NOT FIT"
        what = "Adam's moments and checkpoints" if self.moments else "checkpoints"
        moments = f"moments {self.moments / 1e9:.1f}; a save " if self.moments else ""
        return (
            f"host memory for {what}: {needed / 1e9:.1f} of {self.host / 1e9:.0f} GB a host as configured: {verdict} "
            f"({moments}asynchronous {self.asynchronous / 1e9:.1f}, synchronous {self.synchronous / 1e9:.1f})"
        )


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """price: of a chip and hour, in whatever currency the user thinks in; None: not told."""

    topology: str
    slices: int
    sizes: Mapping[str, int]
    description: str
    steps: tuple[StepPlan, ...]
    host_memory: HostMemory
    asynchronous: bool
    price: float | None
    warnings: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return all(step.fits for step in self.steps) and self.host_memory.fits(self.asynchronous)

    @property
    def chips(self) -> int:
        return self.steps[0].chips

    @property
    def tokens(self) -> int:
        return sum(step.steps * step.tokens for step in self.steps)

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)

    @property
    def chip_hours(self) -> float:
        return self.seconds * self.chips / 3600

    @property
    def cost(self) -> float | None:
        return None if self.price is None else self.price * self.chip_hours

    def to_dict(self) -> dict[str, Any]:
        return {
            "topology": self.topology,
            "slices": self.slices,
            "chips": self.chips,
            "mesh": dict(self.sizes),
            "fits": self.fits,
            "warnings": list(self.warnings),
            "steps": [step.to_dict() for step in self.steps],
            "flop_convention": FLOP_CONVENTION,
            "tokens": self.tokens,
            "days": self.seconds / DAY,
            "chip_hours": self.chip_hours,
            "price_per_chip_hour": self.price,
            "cost": self.cost,
            "host_memory_bytes": dataclasses.asdict(self.host_memory),
        }

    def lines(self) -> list[str]:
        mesh = " x ".join(f"{name} {size}" for name, size in self.sizes.items())
        slices = f"{self.slices} slices of " if self.slices > 1 else ""
        out = [f"{slices}{self.topology}, {self.chips} chips: {mesh}; {self.description}"]
        out += [f"warning: {text}" for text in self.warnings]
        told: dict[BatchShape, str] = {}
        for step in self.steps:
            if step.shape in told:
                out += ["", f"{step.name}: the same step as {told[step.shape]}; {step.seconds / DAY:.2f} days"]
            else:
                told[step.shape] = step.name.split(" (")[0]
                out += ["", *step_lines(step)]
        out += [
            "",
            f"MFU counts {FLOP_CONVENTION}.",
            f"run: {self.tokens:,} tokens in {self.seconds / DAY:.1f} days = {self.chip_hours:,.0f} chip-hours"
            + (
                f" = {self.cost:,.0f} at {self.price:g} a chip-hour"
                if self.cost is not None
                else "; --price_per_chip_hour=N tells the cost"
            )
            + ". Compilation, evaluation, saving and restarts are not in it.",
            self.host_memory.line(self.asynchronous),
            "fits" if self.fits else "DOES NOT FIT",
        ]
        return out


def step_lines(step: StepPlan) -> list[str]:
    """Memory, seconds, collectives and rates of one phase's step."""
    a, b, t = step.shape
    how = (
        f"compiled in {step.compile_seconds:.0f} s"
        if step.method == "compiled"
        else "ANALYTIC, nothing was compiled for these figures"
    )
    limit = step.chip.hbm_bytes
    out = [f"{step.name}: {a} micro-batches x {b} rows x {t} tokens ({how})"]
    out += [f"  note: {step.note}"] if step.note else []
    out.append(
        f"  HBM of a chip: {step.hbm_peak / GIB:.2f} of {limit / GIB:.2f} GiB, "
        + (f"{(limit - step.hbm_peak) / GIB:.2f} free: fits" if step.fits else "DOES NOT FIT")
    )
    width = max(map(len, step.hbm_parts))
    for part, size in step.hbm_parts.items():
        out.append(f"    {part:<{width}} {size / GIB:9.3f} GiB")
    total = sum(step.hbm_parts.values())
    out.append(
        f"    {'sum of the parts':<{width}} {total / GIB:9.3f} GiB ({total / step.hbm_peak - 1:+.1%} of the peak)"
    )
    e = step.estimate
    out.append(f"  step: {e.step:.3f} s estimated")
    seconds = {
        "matrix products": e.matrix,
        "vector work and copies": e.vector,
        "attention kernels": e.attention,
        "exposed communication": e.exposed,
        "waiting for copies": e.waiting,
        "waiting for the host": e.host,
    }
    out += [f"    {name:<23} {took:8.3f} s {took / e.step:6.1%}" for name, took in seconds.items()]
    out.append(f"    {'overlapped, beside':<23} {e.overlapped:8.3f} s of communication")
    ranked = sorted(e.kinds.items(), key=lambda item: -item[1])
    if ranked:
        out.append("    by kind: " + ", ".join(f"{kind} {took:.3f}" for kind, took in ranked[:9]))
    out.append("  collectives of a step (bytes of whole arrays, seconds on the links):")
    for kind, traffic in e.collectives.items():
        out.append(f"    {kind:<42} {traffic.count:6} x {traffic.bytes / 1e9:10.3f} GB {traffic.seconds:8.4f} s")
    out.append(
        f"  {step.tokens_per_second:,.0f} tokens/s, {step.tokens_per_second / step.chips:,.0f} a chip; "
        f"MFU {step.mfu:.1%} of {step.chip.peak_flops / 1e12:.0f} TFLOP/s"
    )
    out.append(f"  {step.steps:,} steps: {step.seconds / DAY:.2f} days")
    out.append(f"  error: {step.error}")
    return out
