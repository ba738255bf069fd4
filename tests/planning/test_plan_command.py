"""`phijax.plan` from the command line: exit codes, JSON, a program of the TPU compiler where it is installed."""

import importlib.util
import json
import math
import pathlib
import socket
import subprocess
import sys

import jax
import pytest
from plan_case import CONFIG, MINI, ask

from phijax import config as configs
from phijax import plan, planner
from phijax.errors import UserError
from phijax.model import flops, params
from phijax.model.config import ModelSection, resolve_model
from phijax.model.presets import PRESETS
from phijax.parallel.mesh import make_mesh
from phijax.planning import analytic, compiled, topology
from phijax.planning.compiled import Compiled, DoesNotFit
from phijax.planning.estimator import Estimate
from phijax.planning.run_plan import HostMemory
from phijax.run import recipe as recipes

GIB = 2**30
MINI_128K = str(pathlib.Path(MINI).with_name("mini_128k.py"))


def test_an_analytic_plan_of_mini(capsys):
    code, out, _ = ask(capsys, "--topology=v5e:16x16", "--analytic", "--json", "--price_per_chip_hour=2", config=MINI)
    answer = json.loads(out)
    assert code == 0 and answer["fits"] and answer["chips"] == 256
    assert answer["mesh"] == {"data": 2, "fsdp": 128, "context": 1, "tensor": 1}
    step = answer["steps"][0]
    assert step["method"] == "analytic" and "15 %" in step["error"]
    # Rates, days and cost follow from the step's seconds and the config: 800,000 steps of 1024 x 4096 tokens.
    tokens = 800_000 * 1024 * 4096
    assert answer["tokens"] == tokens
    seconds = 800_000 * step["step_seconds"]
    assert answer["days"] == pytest.approx(seconds / 86400)
    assert answer["chip_hours"] == pytest.approx(256 * seconds / 3600)
    assert answer["cost"] == pytest.approx(2 * answer["chip_hours"])
    assert step["tokens_per_second"] == pytest.approx(tokens / seconds)
    model = resolve_model(ModelSection(preset="phi3_mini", sliding_window=None), PRESETS)
    per_token = flops.train_flops_per_token(model, 4096)
    assert step["mfu"] == pytest.approx(per_token * step["tokens_per_second"] / 256 / 197e12)
    parts = step["seconds"]
    summed = math.fsum(took for name, took in parts.items() if "overlapped" not in name)
    assert summed == pytest.approx(step["step_seconds"])
    assert sum(step["hbm_parts_bytes"].values()) == pytest.approx(step["hbm_peak_bytes"])
    # 3 x 4 bytes of each parameter over 128 chips, on 4 chips of a host.
    assert answer["host_memory_bytes"]["asynchronous"] == pytest.approx(12 * 3.82e9 / 128 * 4, rel=0.03)


@pytest.mark.parametrize(
    "compiling",
    [
        False,
        pytest.param(
            True,
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not topology.has_compiler(), reason="libtpu is not installed"),
            ],
        ),
    ],
)
def test_a_plan_with_moments_on_the_hosts(capsys, compiling):
    """Of the tiny model: 8 bytes of each parameter leave the chips, cross once each way and lie on the host."""
    on_host, how = [("optimizer.moments", "host")], [] if compiling else ["--analytic"]
    code, out, _ = ask(capsys, "--topology=v5e:2x2", "--json", *how, overrides=on_host)
    answer = json.loads(out)
    (step,) = answer["steps"]
    assert code == 0 and step["method"] == ("compiled" if compiling else "analytic")
    moments = 8 * (3 * (4 * 384 * 384 + 3 * 1024 * 384) + 2 * 2048 * 384) / 4  # of a chip, but for the norms
    assert step["hbm_parts_bytes"]["optimizer"] < 1e-3 * moments
    assert sum(step["hbm_parts_bytes"].values()) == pytest.approx(step["hbm_peak_bytes"], rel=0.05)
    parts = step["seconds"]
    summed = math.fsum(took for name, took in parts.items() if "overlapped" not in name)
    assert summed == pytest.approx(step["step_seconds"])
    assert 0.5 < parts["waiting_for_host"] / (moments / 15e9) < 1.5
    host = answer["host_memory_bytes"]
    assert host["moments"] == pytest.approx(4 * moments, rel=0.02)
    assert host["asynchronous"] == pytest.approx(1.5 * host["moments"], rel=0.02)
    _, text, _ = ask(capsys, "--topology=v5e:2x2", "--analytic", overrides=on_host)
    assert "Adam's moments and checkpoints" in text and "waiting for the host" in text


def test_text_says_what_it_is_and_phases_of_one_step_are_told_once(capsys):
    code, out, _ = ask(capsys, "--topology=v5e:16x16", "--analytic", config=MINI)
    assert code == 0
    assert out.count("ANALYTIC") == 1 and "the same step as phase 0" in out
    assert out.rstrip().endswith("fits")
    assert "--price_per_chip_hour" in out


def test_what_does_not_fit_is_an_answer_of_its_own(capsys):
    more = [("data.micro_batches", "1"), ("data.phases[0].global_batch_size", "1024")]
    code, out, _ = ask(capsys, "--topology=v5e:16x16", "--analytic", overrides=more, config=MINI)
    assert code == plan.EXIT_DOES_NOT_FIT == 3
    assert out.count("DOES NOT FIT") == 2


@pytest.mark.parametrize(
    ("topology", "overrides", "message"),
    [
        ("v5x:4x4", (), "Nearest: 'v5"),
        ("v5e:4x4x4", (), "v5e slices have 2 axes"),
        ("v5e:4x0", (), "all at least 1"),
        ("v5e:4x4", (), "needs 4 devices, but there are 16"),
        ("v5e:2x2", (("data.micro_batches", "3"),), "cannot be split over 3 micro-batches"),
        ("v5e:2x2", (("mesh.fsdp", "2"), ("mesh.tensor", "2"), ("model.num_kv_heads", "1")), "mesh.tensor=2"),
    ],
)
def test_a_mistake_is_the_users(capsys, topology, overrides, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        ask(capsys, f"--topology={topology}", "--analytic", overrides=overrides)


@pytest.mark.parametrize("search", [(), ("--search",)])
def test_buckets_are_not_asked(capsys, monkeypatch, search):
    """A run of 128K whose data, start weights and evaluation lie in buckets, planned by shapes without a network."""
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **named: asked.append(given))
    monkeypatch.setattr(socket.socket, "connect", lambda *given: asked.append(given))
    more = [(f"data.phases[{n}].mixture[0].path", "gs://nobody/shards") for n in (0, 1)]
    more += [("evaluation.sets[0].path", "gs://nobody/held_out"), ("init_from", "gs://nobody/mini/checkpoints/9")]
    code, out, _ = ask(capsys, "--topology=v5p:4x4x8", "--analytic", *search, overrides=more, config=MINI_128K)
    assert code == 0 and not asked
    # Compiler options are not judged by shapes: the config's stay.
    assert "--config.compiler.profile" not in out


def test_without_the_compiler_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr("phijax.planning.topology.has_compiler", lambda: False)
    code, out, err = ask(capsys, "--topology=v5e:2x2")
    assert code == 0 and "ANALYTIC" in out and "The TPU compiler is not here" in err


@pytest.mark.parametrize(("free", "code", "verdict"), [(12, 0, "fits"), (9, 3, "DOES NOT FIT")])
def test_hosts_that_cannot_hold_moments_and_a_save_are_no_place_for_the_run(capsys, monkeypatch, free, code, verdict):
    """As training refuses to start there."""
    monkeypatch.setattr(planner, "host_memory", lambda *given: HostMemory(6 * 10**9, 10**9, free * 10**9, 4 * 10**9))
    got, out, _ = ask(capsys, "--topology=v5e:2x2", "--analytic")
    assert got == code and out.splitlines()[-1] == verdict
    assert f"10.0 of {free} GB a host as configured: {verdict} (moments 4.0; a save" in out
    got, out, _ = ask(capsys, "--topology=v5e:2x2", "--analytic", overrides=[("checkpoint.asynchronous", "False")])
    assert got == 0 and "5.0 of" in out
    got, _, _ = ask(capsys, "--topology=v5e:2x2", "--analytic", "--search")
    assert got == code


def test_host_memory_from_shapes_is_that_of_shardings():
    """Halves of the tiny model lie on two of a host's four chips each: moments twice, but once in what a save holds."""
    overrides = [("optimizer.moments", "host"), ("mesh.data", "2"), ("mesh.fsdp", "2")]
    config = configs.load(CONFIG, overrides)
    where = analytic.make_slice("v5e:2x2", config.mesh)
    recipe = recipes.make_recipe(config, dict(where.sizes), "tpu", "v5e")
    mesh = make_mesh(config.mesh, jax.devices()[:4])
    expected = 12 * params.count(recipe.model)
    for found in (planner.host_memory(recipe, where, None), planner.host_memory(recipe, where, mesh)):
        assert found.asynchronous == pytest.approx(expected, rel=0.01)
        assert found.moments == pytest.approx(2 * expected * 2 / 3, rel=0.01)


def test_slices_pay_for_their_network(capsys, monkeypatch):
    answer = Compiled(2**30, {"workspace": 2.0**30}, Estimate(step=2.0, matrix=2.0), 1.0)
    monkeypatch.setattr(compiled, "compile_step", lambda *given, options: answer)
    monkeypatch.setattr(topology, "has_compiler", lambda: True)
    monkeypatch.setattr(topology, "tpu_devices", topology.imaginary_devices)
    monkeypatch.setattr(planner, "host_memory", lambda *given: HostMemory(1, 1, 2))
    more = [("mesh.slices", "2"), ("mesh.data", "4"), ("data.micro_batches", "2")]
    _, out, _ = ask(capsys, "--topology=v5e:16x16", "--json", overrides=more, config=MINI)
    step = json.loads(out)["steps"][0]
    crossing = step["seconds"]["exposed_communication"]
    # 120 MB of float32 gradients a chip, first over 2 chips of a slice, then half of it over a quarter of 12.5 GB/s.
    assert crossing == pytest.approx(2 * 0.12e9 / 2 / 2 / (12.5e9 / 4) + 2 * 0.12e9 / 2 / 45e9, rel=0.1)
    assert step["step_seconds"] == 2.0 + crossing and "between slices" in step["note"]


def test_crowding_by_shapes_is_told_unless_the_compiler_will_not_mind(capsys):
    """Saving all but the activation on 16 v5e chips takes 97 % of HBM."""
    full = [("mesh.data", "1"), ("mesh.fsdp", "16"), ("data.micro_batches", "64")]
    full += [("model.remat", "save_all_but_activation")]
    for more, told in (([], True), ([("compiler.profile", "fill_memory")], False)):
        code, out, _ = ask(capsys, "--topology=v5e:4x4", "--analytic", overrides=full + more, config=MINI)
        assert code == 0 and ("note: crowded" in out) == told


@pytest.mark.parametrize(
    ("share", "overrides", "notes"),
    [
        (0.96, [], ["crowded"]),
        (0.96, [("mesh.slices", "2"), ("mesh.data", "4"), ("data.micro_batches", "2")], ["crowded", "between slices"]),
        (0.96, [("compiler.profile", "fill_memory")], []),
        (0.96, [("optimizer.moments", "host")], []),
        (0.94, [], []),
    ],
)
def test_a_compiled_step_that_crowds_the_memory_is_told_how_not_to(capsys, monkeypatch, share, overrides, notes):
    peak = int(share * 15.75 * GIB)
    answer = Compiled(peak, {"workspace": peak}, Estimate(step=2.0, matrix=2.0), 1.0)
    monkeypatch.setattr(compiled, "compile_step", lambda *given, options: answer)
    monkeypatch.setattr(topology, "has_compiler", lambda: True)
    monkeypatch.setattr(topology, "tpu_devices", topology.imaginary_devices)
    monkeypatch.setattr(planner, "host_memory", lambda *given: HostMemory(1, 1, 2))
    _, out, _ = ask(capsys, "--topology=v5e:16x16", "--json", overrides=overrides, config=MINI)
    note = json.loads(out)["steps"][0]["note"]
    assert [word for word in ("crowded", "between slices") if word in note] == notes and bool(note) == bool(notes)


def test_a_refusal_of_the_compiler_is_told_with_its_words(capsys, monkeypatch):
    refusal = DoesNotFit("Used 16.91G of 15.75G hbm", compiled.needed_bytes("Used 16.91G of 15.75G hbm"), 2.0)
    monkeypatch.setattr(compiled, "compile_step", lambda *given, options: refusal)
    monkeypatch.setattr(topology, "has_compiler", lambda: True)
    monkeypatch.setattr(topology, "tpu_devices", topology.imaginary_devices)
    monkeypatch.setattr(planner, "host_memory", lambda *given: HostMemory(1, 1, 2))
    code, out, _ = ask(capsys, "--topology=v5e:16x16", config=MINI)
    assert code == plan.EXIT_DOES_NOT_FIT
    assert "16.91 of 15.75 GiB, DOES NOT FIT" in out and "the compiler refuses it (Used 16.91G" in out


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("... Used 16.91G of 15.75G hbm. Exceeded hbm capacity by 1.2G.", 16.91),
        ("the total memory required for HLO temporaries (2.00T) exceeds available HBM (15.75G).", 2048),
        ("something else", None),
    ],
)
def test_needed_bytes(message, gib):
    found = compiled.needed_bytes(message)
    assert found is None if gib is None else found == pytest.approx(gib * GIB)


def test_compiler_options():
    given = ["xla_a=true", "xla_b=1=2", "xla_c="]
    assert plan.compiler_options(given) == {"xla_a": "true", "xla_b": "1=2", "xla_c": ""}
    with pytest.raises(UserError, match="NAME=VALUE"):
        plan.compiler_options(["xla_a"])


def test_the_picture(capsys, tmp_path):
    ask(capsys, "--topology=v5e:2x2", "--analytic", f"--plot={tmp_path}/plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--plot=/nope/plan.png", "there is no folder /nope"),
        ("--plot=.", "is a folder"),
        ("--plot=forbidden.png", "may not be written"),
        ("--price_per_chip_hour=-3", "is no price"),
        ("--price_per_chip_hour=nan", "is no price"),
    ],
)
def test_what_cannot_be_told_is_refused_before_anything_is_planned(capsys, monkeypatch, flag, message):
    monkeypatch.setattr(planner, "make_plan", lambda *given, **more: pytest.fail("it was planned"))
    monkeypatch.setattr(plan.os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(UserError, match=message):
        ask(capsys, "--topology=v5e:2x2", "--analytic", flag)


@pytest.mark.parametrize("flag", ["--plot=plan.png", "--price_per_chip_hour=0"])
def test_a_search_refuses_what_is_of_one_plan(capsys, monkeypatch, flag):
    monkeypatch.setattr(planner, "find", lambda *given, **more: pytest.fail("it searched"))
    with pytest.raises(UserError, match="of one plan"):
        ask(capsys, "--topology=v5e:2x2", "--search", flag)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_compiled_plan(capsys):
    code, out, err = ask(capsys, "--topology=v5e:2x2", "--json")
    answer = json.loads(out)
    (step,) = answer["steps"]
    assert code == 0 and step["method"] == "compiled" and "compiling" in err
    # The parts come from the schedule, the peak from the compiler.
    assert sum(step["hbm_parts_bytes"].values()) == pytest.approx(step["hbm_peak_bytes"], rel=0.05)
    assert step["core_cycles"] > 0 and step["collectives"]
    parts = step["seconds"]
    summed = math.fsum(took for name, took in parts.items() if "overlapped" not in name)
    assert summed == pytest.approx(step["step_seconds"])
    # Parameters and moments to the byte, but for the scalars beside them: 2048 padded rows of the vocabulary.
    projections = 3 * (4 * 384 * 384 + 3 * 1024 * 384) + 2 * 2048 * 384
    assert step["hbm_parts_bytes"]["parameters"] == pytest.approx(projections + 7 * 384 * 4, rel=0.01)


def test_help_has_the_codes():
    ended = subprocess.run([sys.executable, "-m", "phijax", "plan", "--help"], capture_output=True, text=True)
    assert ended.returncode == 0
    assert "3 it does not" in ended.stdout and "--topology" in ended.stdout
