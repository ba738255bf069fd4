"""The search: which candidates there are, what drops them, what is compiled and what is said about the rest."""

import json
import pathlib

import pytest
from plan_case import MINI, ask

from phijax import plan
from phijax.model.presets import PRESETS
from phijax.planning import search
from phijax.planning.compiled import Compiled, DoesNotFit
from phijax.planning.estimator import Estimate


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


def test_what_crowds_the_memory_is_not_trusted(capsys):
    """Compiled, saving all but the activation on 16 v5e chips (15.1 of 15.75 GiB) is slower than saving less."""
    code, out, _ = ask(capsys, "--topology=v5e:4x4", "--search", "--analytic", "--json", config=MINI)
    answer = json.loads(out)
    assert code == 0 and answer["winner"] == [
        "--config.mesh.data=1",
        "--config.mesh.fsdp=16",
        "--config.model.remat=save_mid_gate_up",
        "--config.data.micro_batches=64",
    ]
    crowded = [one for one in answer["candidates"] if one["hbm_peak_bytes"] > 0.95 * 15.75 * 2**30]
    assert crowded  # still offered, further down


def test_winner_is_the_compilers_and_the_rest_is_named(capsys, monkeypatch):
    """A compiler that refuses the first, and likes the third best."""
    asked = []

    def pretend(recipe, mesh, topology, shape, options):
        asked.append((dict(mesh.shape), recipe.backend.remat, shape))
        if len(asked) == 1:
            return DoesNotFit("no", 2**34, 1.0)
        step = 3.0 if len(asked) == 3 else 4.0
        return Compiled(2**33, {"workspace": 2.0**33}, Estimate(step=step, matrix=step), 1.0)

    monkeypatch.setattr("phijax.planning.compiled.compile_step", pretend)
    monkeypatch.setattr("phijax.planning.topology.tpu_devices", lambda name, slices=1: imaginary(name, slices))
    monkeypatch.setattr("phijax.planning.topology.has_compiler", lambda: True)
    code, out, err = ask(capsys, "--topology=v5e:16x16", "--search", "--compile_top=3", config=MINI)
    assert code == 0 and len(asked) == 4 and err.count("compiling") == 4
    sizes, remat, _ = asked[2]
    winner = out.splitlines()[-1]
    expected = [f"--config.mesh.{k}={v}" for k, v in sizes.items() if {"data": 2, "fsdp": 128}.get(k, 1) != v]
    assert winner == f"winner: {' '.join([*expected, f'--config.model.remat={remat}'])}"
    assert "refused by the compiler" in out and "4 were compiled" in out and "were not" in out


def imaginary(name, slices):
    from phijax.planning.topology import imaginary_devices

    return imaginary_devices(name, slices)


def test_the_quickest_is_tried_with_the_chips_compiler_options(capsys, monkeypatch):
    def pretend(recipe, mesh, topology, shape, options):
        step = 1.0 if "xla_tpu_use_tc_device_shape_on_sc" in options else 2.0
        return Compiled(2**33, {"workspace": 2.0**33}, Estimate(step=step, matrix=step), 1.0)

    monkeypatch.setattr("phijax.planning.compiled.compile_step", pretend)
    monkeypatch.setattr("phijax.planning.topology.tpu_devices", lambda name, slices=1: imaginary(name, slices))
    monkeypatch.setattr("phijax.planning.topology.has_compiler", lambda: True)
    config = str(pathlib.Path(MINI).with_name("medium.py"))
    code, out, err = ask(capsys, "--topology=v5p:4x4x8", "--search", "--compile_top=2", config=config)
    assert code == 0 and err.count("compiling") == 3 and "2 were compiled" in out
    assert out.splitlines()[-1].endswith("--config.compiler.profile=sparse_core") and "options sparse_core" in out


def test_nothing_fits(capsys):
    config = str(pathlib.Path(MINI).with_name("medium.py"))
    code, out, _ = ask(capsys, "--topology=v5e:2x2", "--search", "--analytic", config=config)
    assert code == plan.EXIT_DOES_NOT_FIT and "take more chips" in out and "winner" not in out


@pytest.mark.parametrize(("top", "refusals", "compiled"), [(2, 0, 2), (2, 3, 5), (2, 9, 4)])
def test_refused_ones_are_passed_over_up_to_a_limit(top, refusals, compiled):
    candidates = [
        search.Ranked(search.Candidate(None, "full", i), search.Work(None, ((1, (1, 1, 1)),)), i, 1, False)
        for i in range(12)
    ]
    no, yes = DoesNotFit("no", None, 0.0), Compiled(1, {}, Estimate(step=1.0), 0.0)
    done = search.compile_best(
        candidates, top, lambda one, shape: no if one.candidate.micro_batches < refusals else yes
    )
    assert len(done) == compiled
    assert [one.refused for one in done] == sorted(one.refused for one in done)
