"""A phase's program is compiled outside of any step's time, by the report's clock and the watchdog's."""

import contextlib
import types

from phijax.run import assemble


def test_nothing_counts_while_a_program_is_compiled(monkeypatch):
    inside, compiled = [], []

    def pausing(name):
        @contextlib.contextmanager
        def pause():
            inside.append(name)
            yield
            inside.remove(name)

        return types.SimpleNamespace(pause=pause)

    def lower(recipe, mesh, shape):
        compiled.append((shape, sorted(inside)))

    monkeypatch.setattr(assemble.program, "lower_train_step", lower)
    monkeypatch.setattr(assemble.program, "compile_with_options", lambda lowered, recipe: lowered)
    batches = types.SimpleNamespace(shape_at=lambda step: 64 if step < 3 else 128)
    cache = types.SimpleNamespace(tried=lambda one: one)
    several = types.SimpleNamespace(size=2)  # devices: with one, the step's memory is asked for
    programs = assemble.Programs(None, several, batches, pausing("report"), pausing("watchdog"), cache)
    for step in range(6):
        programs(step)
    assert compiled == [(64, ["report", "watchdog"]), (128, ["report", "watchdog"])]
