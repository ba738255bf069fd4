"""What a search found: a table of what was compiled and of the best by shapes, and the winner as flags to paste."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from phijax.planning import search
from phijax.planning.assumptions import ANALYTIC_ERROR, COMPILED_ERROR
from phijax.planning.search import Ranked

SHOWN = 12  # of those that are ranked by shapes alone


@dataclasses.dataclass(frozen=True)
class Found:
    """best: compiled, quickest first, then those refused on the way; rest: ranked from shapes alone.

    winner: None where nothing fits. paste: what the winner changes in the config, as flags. options: the compiler's
    that it has. fitting: by shapes, give or take search.MARGIN. interrupted: before all was compiled that should have
    been.
    """

    best: list[Ranked]
    rest: list[Ranked]
    winner: Ranked | None
    paste: list[str]
    options: Mapping[str, str]
    looked_at: int
    fitting: int
    interrupted: bool = False

    def to_dict(self) -> dict[str, Any]:
        rows = [
            {
                **one.candidate.overrides(),
                "run_seconds": one.seconds,
                "run_seconds_by_shapes": one.by_shapes,
                "hbm_peak_bytes": one.peak,
                "method": "compiled" if one.answers else "analytic",
                "refused": one.refused,
                "profile": one.profile,
            }
            for one in [*self.best, *self.rest]
        ]
        return {
            "winner": self.paste,
            "compiler_options": dict(self.options),
            "looked_at": self.looked_at,
            "fitting": self.fitting,
            "interrupted": self.interrupted,
            "candidates": rows,
        }

    def lines(self) -> list[str]:
        out = []
        if self.best:
            out += ["compiled, quickest first:", *search.table(self.best), f"  error: {COMPILED_ERROR}", ""]
        out += ["from shapes alone, the best:", *search.table(self.rest[:SHOWN]), f"  error: {ANALYTIC_ERROR}", ""]
        out.append(self._what_was_not_done())
        if self.interrupted:
            out.append("INTERRUPTED: the winner is of what had been compiled by then.")
        if self.winner is not None:
            return [*out, f"winner: {' '.join(self.paste) or 'the config as it is'}"]
        if self.interrupted:
            return [*out, "No winner: nothing had been compiled that fits."]
        return [*out, "Nothing fits: take more chips, or a shorter sequence."]

    def _what_was_not_done(self) -> str:
        compiled_ones = len({one.candidate for one in self.best})
        text = (
            f"{self.looked_at:,} candidates (meshes x remat policies x micro-batches, Adam's moments on the "
            "hosts where the chips are short of memory for them) were ranked from shapes, "
            f"{self.fitting:,} of them fit, or are over by less than shapes err; {compiled_ones} were compiled, the "
            f"other {self.looked_at - compiled_ones:,} were not. What fills the memory has compiler.profile=fill_memory"
        )
        if self.best:
            text += "; other options were tried on the first that fits with room, the rest has what was best for it"
        text += "."
        fitting = [one for one in self.best if not one.refused]
        others = [one for one in self.rest if not search.twins(one, self.best)]
        if others and not self.interrupted and search.cannot_win(others[0], fitting):
            text += " None of the rest can win, if the compiler likes it no better than what it has seen."
        return text
