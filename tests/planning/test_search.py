"""The search: which candidates there are, what drops them, what is compiled and what is said about the rest."""

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from plan_case import MINI, ask

from phijax import errors, plan
from phijax.model.presets import PRESETS
from phijax.parallel.hardware import fills_memory
from phijax.planning import search
from phijax.planning.compiled import Compiled, DoesNotFit
from phijax.planning.estimator import Estimate
from phijax.planning.topology import has_compiler, imaginary_devices

MEDIUM = str(pathlib.Path(MINI).with_name("medium.py"))


def test_meshes_use_every_chip_and_cut_at_heads():
    found = list(search.meshes(16, 2, PRESETS["phi3_medium"], 4096))
    assert {m.data * m.fsdp * m.context * m.tensor for m in found} == {16}
    assert {m.tensor for m in found} == {1, 2}  # 10 kv heads
    assert {m.context for m in found} == {1}  # 4096 tokens are not cut
    assert all(m.data % 2 == 0 for m in found)  # two slices
    assert len(found) == len(set(found))
    assert {m.context for m in search.meshes(16, 1, PRESETS["phi3_mini"], 32768)} == {1, 2, 4, 8}


def test_from_shapes_alone(capsys):
    code, out, _ = ask(capsys, "--topology=v5e:16x16", "--search", "--analytic", "--json", config=MINI)
    answer = json.loads(out)
    assert code == 0
    best = answer["candidates"][0]
    # What hand search found on this slice: fsdp at most 128, one sequence a chip, nearly all saved.
    assert int(best["mesh.fsdp"]) in (64, 128) and best["data.micro_batches"] == "4"
    assert best["model.remat"].startswith("save_all")
    seconds = [one["run_seconds"] for one in answer["candidates"]]
    assert seconds == sorted(seconds)
    assert answer["looked_at"] > len(seconds) and {one["method"] for one in answer["candidates"]} == {"analytic"}


def test_moments_go_to_the_hosts_where_the_chips_are_short_of_memory(capsys):
    """By shapes 16 v5e chips are quickest with all saved, which does not fit beside the moments."""
    code, out, _ = ask(capsys, "--topology=v5e:4x4", "--search", "--analytic", "--json", config=MINI)
    answer = json.loads(out)
    assert code == 0 and answer["winner"] == [
        "--config.mesh.data=1",
        "--config.mesh.fsdp=16",
        "--config.model.remat=save_all",
        "--config.data.micro_batches=64",
        "--config.optimizer.moments=host",
        "--config.compiler.profile=fill_memory",
    ]
    limit, found = 15.75 * 2**30, {"device": {}, "host": {}}
    for one in answer["candidates"]:
        key = tuple(one[name] for name in one if name.startswith(("mesh.", "model.", "data.")))
        found[one["optimizer.moments"]][key] = one
        assert (one["profile"] == "fill_memory") == (one["hbm_peak_bytes"] > 0.9 * limit)
    assert found["host"]
    for key, there in found["host"].items():
        here = found["device"].get(key)  # not offered at all where it is more than 5 % over
        if here is not None:
            assert here["hbm_peak_bytes"] > 0.95 * limit  # with room it is quicker
            # Two moments in float32 of 3.82 G parameters, over fsdp x tensor chips, at 15 GB/s in 800,000 steps.
            moments = 8 * 3.82e9 / int(there["mesh.fsdp"]) / int(there["mesh.tensor"])
            assert here["hbm_peak_bytes"] - there["hbm_peak_bytes"] == pytest.approx(moments, rel=0.01)
            more = there["run_seconds"] - here["run_seconds"]
            assert more == pytest.approx(800_000 * moments / 15e9, rel=0.01)


def test_options_are_told_that_come_with_moments_on_the_hosts(capsys):
    _, out, _ = ask(capsys, "--topology=v5p:2x2x1", "--search", "--analytic", "--json", config=MEDIUM)
    answer = json.loads(out)
    assert answer["winner"][-1] == "--config.optimizer.moments=host"  # with room, so that no profile is named
    assert fills_memory(answer["compiler_options"])


@pytest.fixture
def compiler(monkeypatch):
    """Puts `pretend(recipe, sizes, shape, options)` in the compiler's place."""

    def put(pretend):
        def compile_step(recipe, mesh, topology, shape, options):
            return pretend(recipe, dict(mesh.shape), shape, options)

        monkeypatch.setattr("phijax.planning.compiled.compile_step", compile_step)
        monkeypatch.setattr("phijax.planning.topology.tpu_devices", imaginary_devices)
        monkeypatch.setattr("phijax.planning.topology.has_compiler", lambda: True)

    return put


def takes(step: float) -> Compiled:
    return Compiled(2**33, {"workspace": 2.0**33}, Estimate(step=step, matrix=step), 1.0)


def test_winner_is_the_compilers_and_the_rest_is_named(capsys, compiler):
    """A compiler that refuses the first, and likes the third best."""
    asked = []

    def pretend(recipe, sizes, shape, options):
        asked.append((sizes, recipe.backend.remat, shape))
        return DoesNotFit("no", 2**34, 1.0) if len(asked) == 1 else takes(3.0 if len(asked) == 3 else 4.0)

    compiler(pretend)
    code, out, err = ask(capsys, "--topology=v5e:16x16", "--search", "--compile_top=3", config=MINI)
    assert code == 0 and len(asked) >= 4 and err.count("compiling") == len(asked) == len(set(map(str, asked)))
    sizes, remat, _ = asked[2]
    winner = out.splitlines()[-1]
    expected = [f"--config.mesh.{k}={v}" for k, v in sizes.items() if {"data": 2, "fsdp": 128}.get(k, 1) != v]
    flags = [*expected, f"--config.model.remat={remat}", "--config.compiler.profile=fill_memory"]  # 14.7 of 15.75 GiB
    assert winner == f"winner: {' '.join(flags)}"
    assert "refused by the compiler" in out and f"{len(asked)} were compiled" in out and "were not" in out
    told = [line for line in err.splitlines() if "compiled in" in line or "refused" in line]
    assert len(told) == len(asked) and "4.000" in told[1] and "3.000" in told[2]  # as they come, not at the end


def test_the_chips_compiler_options_are_tried(capsys, compiler):
    def pretend(recipe, sizes, shape, options):
        return takes(1.0 if "xla_tpu_use_tc_device_shape_on_sc" in options else 2.0)

    compiler(pretend)
    code, out, err = ask(capsys, "--topology=v5p:4x4x8", "--search", "--compile_top=2", config=MEDIUM)
    compiled = err.count("compiling")
    assert code == 0 and f"; {compiled - 1} were compiled" in out  # one of them a second time
    assert out.splitlines()[-1].endswith("--config.compiler.profile=sparse_core") and "options sparse_core" in out


@pytest.mark.parametrize(("slice_name", "said"), [("v5e:4x4", True), ("v5e:16x16", False)])
def test_it_is_said_when_no_other_can_win(capsys, compiler, slice_name, said):
    """By shapes the third mesh is 7 % behind the first on 16 chips, on 256 not 1 %."""
    seconds = iter([60.0, 66.0, 66.0])
    compiler(lambda *given: takes(next(seconds)))
    _, out, _ = ask(capsys, f"--topology={slice_name}", "--search", "--compile_top=2", config=MINI)
    assert "2 were compiled" in out or "3 were compiled" in out
    assert ("None of the rest can win" in out) == said


def test_an_interrupted_search_shows_what_it_has(capsys, compiler):
    asked = []

    def pretend(recipe, sizes, shape, options):
        asked.append(shape)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return takes(5.0 if len(asked) == 1 else 4.0)

    compiler(pretend)
    code, out, _ = ask(capsys, "--topology=v5e:16x16", "--search", config=MINI)
    assert code == errors.EXIT_RESTART and "INTERRUPTED" in out and "2 were compiled" in out
    assert out.splitlines()[-1].startswith("winner: ")
    asked[:] = [None, None]
    code, out, _ = ask(capsys, "--topology=v5e:16x16", "--search", "--json", config=MINI)
    answer = json.loads(out)
    assert answer["interrupted"] and answer["winner"] == []


DEAF = """
import ctypes
from phijax import plan
from phijax.planning import compiled
compiled.compile_step = lambda *given, **options: ctypes.CDLL(None).system(b"exec sleep 30 > /dev/null 2>&1")
plan.entry()
"""


@pytest.mark.skipif(not has_compiler(), reason="libtpu is not installed")
def test_a_terminated_search_ends_at_once_and_shows_what_it_has():
    """By signal, while a compiler works that does not look up for it."""
    command = [sys.executable, "-c", DEAF, f"--config={MINI}", "--topology=v5e:4x4", "--search"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "compiling" in process.stderr.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert process.returncode == errors.EXIT_RESTART, err
    assert "INTERRUPTED" in out and "save_mid_gate_up" in out


def test_the_winner_by_shapes_fits_by_shapes(capsys):
    """What is a little over is worth the compiler's time, but no answer without it."""
    _, out, _ = ask(capsys, "--topology=v6e:4x4", "--search", "--analytic", config=MINI)
    assert float(out.splitlines()[2].split()[10]) > 31.25  # GiB of the quickest
    pasted = [tuple(flag.removeprefix("--config.").split("=")) for flag in out.splitlines()[-1].split()[1:]]
    code, out, _ = ask(capsys, "--topology=v6e:4x4", "--analytic", overrides=pasted, config=MINI)
    assert code == 0 and out.rstrip().endswith("fits")


def test_nothing_fits(capsys):
    code, out, _ = ask(capsys, "--topology=v5e:2x2", "--search", "--analytic", config=MEDIUM)
    assert code == plan.EXIT_DOES_NOT_FIT and "take more chips" in out and "winner" not in out


def candidates(*by_shapes: float, micro=range(100)) -> list[search.Ranked]:
    work = search.Work(None, ((1, (1, 1, 1)),))
    rows = zip(by_shapes, micro, strict=False)
    return [search.Ranked(search.Candidate(None, f"p{i}", a), work, s, 1, False, s) for i, (s, a) in enumerate(rows)]


def in_turn(ranked, top, seconds, profiles=()) -> list[tuple[str, str]]:
    """(remat, profile) in the order of compilation; the compiler says `seconds(candidate)`, or refuses: None."""

    def compile_one(one, shape):
        took = seconds(one)
        return DoesNotFit("no", None, 0.0) if took is None else takes(took)

    done = search.compile_in_turn(ranked, top, profiles, compile_one)
    return [(one.candidate.remat, one.profile) for one in done]


@pytest.mark.parametrize(("top", "refusals", "compiled"), [(2, 0, 2), (2, 3, 5), (2, 9, 4)])
def test_refused_ones_are_passed_over_up_to_a_limit(top, refusals, compiled):
    ranked = candidates(*[1.0] * 12)
    done = in_turn(ranked, top, lambda one: None if one.candidate.micro_batches < refusals else 1.0)
    assert done == [(f"p{i}", "") for i in range(compiled)]


def test_it_ends_where_no_other_can_win():
    ranked = candidates(10.0, 10.1, 10.5, 10.9, 11.4)
    # The compiler says 1.1 times the shapes, always: another at 0.95 of that ratio could win up to 10.53 by shapes.
    assert in_turn(ranked, 5, lambda one: 1.1 * one.by_shapes) == [("p0", ""), ("p1", ""), ("p2", "")]
    # Once it said no more than the shapes do, all up to 10.9 / 0.95 could.
    assert len(in_turn(ranked, 5, lambda one: 11.0 if one.by_shapes < 10.9 else one.by_shapes)) == 5


def test_twins_wait_for_the_winner():
    """Policies that the shapes cannot tell apart: one of each pair first, then the quickest's other one."""
    ranked = candidates(10.0, 10.05, 10.2, 10.25, 10.3, micro=(1, 1, 2, 2, 4))
    took = {"p0": 12.0, "p1": 1.0, "p2": 11.0, "p3": 10.5, "p4": 12.0}
    done = in_turn(ranked, 3, lambda one: took[one.candidate.remat])
    assert done == [("p0", ""), ("p2", ""), ("p4", ""), ("p3", "")]


def test_the_rest_is_compiled_with_what_was_best_for_the_first_that_fits():
    ranked = candidates(10.0, 10.1, 10.2, 10.3, 10.35, micro=(1, 2, 3, 4, 4))
    took = {"": 11.0, "worse": 12.0, "better": 10.5}
    done = in_turn(
        ranked, 3, lambda one: None if one.candidate.remat == "p0" else took[one.profile], ("worse", "better")
    )
    fits = [("p1", ""), ("p1", "worse"), ("p1", "better"), ("p2", "better"), ("p3", "better")]
    assert done == [("p0", ""), *fits]
    done = in_turn(ranked, 4, lambda one: took[one.profile] - (one.candidate.remat == "p3"), ("worse", "better"))
    assert done[-2:] == [("p3", "better"), ("p4", "better")]


def test_what_fills_the_memory_is_compiled_to_fill_it():
    """With room, other options are tried on the first alone; what fills the memory has one profile and no other."""
    ranked = candidates(10.0, 10.1, 10.2, 10.3, 10.35)
    full = [dataclasses.replace(one, profile=search.FILL_MEMORY) for one in (ranked[0], ranked[2])]
    mixed = [full[0], ranked[1], full[1], *ranked[3:]]
    profiles = ("other", search.FILL_MEMORY)
    fill = search.FILL_MEMORY
    took = {fill: 9.0, "other": 10.0, "": 11.0}  # the quickest of all says nothing of what is best with room
    done = in_turn(mixed, 5, lambda one: took[one.profile], profiles)
    assert done == [("p0", fill), ("p1", ""), ("p1", "other"), ("p2", fill), ("p3", "other"), ("p4", "other")]


def test_a_refused_ones_smaller_twin_comes_next():
    ranked = candidates(10.0, 10.05, 10.1, micro=(1, 1, 2))
    ranked[0] = dataclasses.replace(ranked[0], peak=2.0)
    assert in_turn(ranked, 2, lambda one: None if one.peak > 1 else 11.0) == [("p0", ""), ("p1", ""), ("p2", "")]
    assert in_turn(ranked, 1, lambda one: None if one.peak > 1 else 11.0) == [("p0", ""), ("p1", "")]
    assert search.quickest([]) is None
