"""A run that dies between the load of a compiled program and its first step."""

import contextlib
import types

from run_case import learned

from phijax.run import assemble
from phijax.run.recipe import EvaluationSet

# Half a second of compiling is worth a file, whatever else this machine does; two steps of it are enough.
LARGER = ["--config.model.num_layers=4", "--config.data.phases[0].steps=2", "--config.evaluation.sets=[]"]
ALONE = ["--config.data.phases[1].steps=1", *LARGER]


def test_what_may_have_killed_a_start_is_not_loaded_again(runs, tmp_path):
    """A kill stands for the SIGSEGV or SIGILL of a program that is whole, and wrong for this machine."""
    before, workdir = tmp_path / "before", tmp_path / "run"
    for each in (before, workdir):
        each.mkdir()
        (each / "compile_cache").symlink_to(tmp_path / "compiled")
    (tmp_path / "compiled").mkdir()
    ended = runs.run(before, *ALONE)
    assert ended.code == 0 and list((tmp_path / "compiled").glob("jit_train_step-*")), ended.output
    marker, folder = workdir / "compile_cache.unproven.0", workdir / "compile_cache"
    with runs.started(workdir, *ALONE) as process:
        process.wait_for(marker.exists, "a program was loaded")
        process.kill()
    ended = runs.run(workdir, *ALONE)
    assert ended.code == 0, ended.output
    assert f"{folder} is set aside as {folder}.set_aside; everything is compiled anew" in ended.output
    assert learned(workdir) == learned(before)
    assert not marker.exists() and not folder.is_symlink() and list(folder.glob("jit_train_step-*"))


def test_every_program_of_a_run_is_tried_before_it_is_believed(monkeypatch):
    """Else a marker would stand to the end of the run, and any kill set the folder aside."""
    monkeypatch.setattr(assemble.program, "lower_train_step", lambda *unused: "a step")
    monkeypatch.setattr(assemble.program, "compile_with_options", lambda lowered, recipe: lowered)
    monkeypatch.setattr(assemble, "_compiled_eval", lambda *unused: "an evaluation")
    tried = []
    cache = types.SimpleNamespace(tried=lambda program: tried.append(program) or program)
    batches = types.SimpleNamespace(shape_at=lambda step: (1, 8, 64))
    pausing = types.SimpleNamespace(pause=contextlib.nullcontext)
    several = types.SimpleNamespace(size=2)  # devices: with one, the step's memory is asked for
    programs = assemble.Programs(None, several, batches, pausing, pausing, cache)
    assert [programs(step) for step in range(2)] == ["a step", "a step"]
    recipe = types.SimpleNamespace(objective=lambda length: types.SimpleNamespace(reads={}, held_out={}))
    shards = types.SimpleNamespace(block=64, records_per_shard=[8])
    assemble.make_evaluator(recipe, None, EvaluationSet("b", "there", shards, (1, 8, 64)), None, None, cache)
    assert tried == ["a step", "an evaluation"]
