"""The typed config: every key, every refusal; and each experiment's own command, as a dry run."""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import frozen_config
import pytest
from etils import epath
from ml_collections import ConfigDict
from synthetic_shards import write_synthetic

from phijax import command, config, main
from phijax.data.mixture import Phase, Source
from phijax.data.shard_manifest import read_manifest
from phijax.errors import EXIT_DONE, EXIT_USER_ERROR, UserError
from phijax.model.config import ModelSection, resolve_model
from phijax.model.presets import PRESETS

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
EXPERIMENTS = frozen_config.experiments()
PHASE = "dict(steps=10, sequence_length=8, global_batch_size=2, mixture=[dict(path='web')])"


@pytest.fixture
def experiment(tmp_path):
    """Writes an experiment file whose get_config has these lines between `defaults()` and `return`."""

    def write(*lines: str) -> str:
        body = "".join(f"    {line}\n" for line in lines)
        path = tmp_path / "experiment.py"
        path.write_text(
            f"import phijax.config\n\ndef get_config():\n    c = phijax.config.defaults()\n{body}    return c\n"
        )
        return str(path)

    return write


def test_the_keys_are_the_frozen_ones_and_not_many():
    assert frozen_config.key_lines() == frozen_config.KEYS_FILE.read_text(), frozen_config.__doc__
    assert len(config.keys()) < 120


def test_defaults_have_every_key():
    def walk(node, prefix=""):
        for name, value in node.items():
            yield from walk(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [prefix + name]

    lists = {re.sub(r"\[\].*", "", key) for key in config.keys()}
    assert sorted(walk(config.defaults())) == sorted(lists)


def test_defaults_untouched_are_the_default_config(experiment):
    assert config.load(experiment()) == config.Config()


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("seed", "7", 7),
        ("init_from", "gs://bucket/run", "gs://bucket/run"),
        ("init_from", "none", None),
        ("init_from", "None", None),
        ("model.preset", "none", "none"),  # a plain string stays one
        ("model.sliding_window", "none", None),
        ("model.sliding_window", "2047", 2047),
        ("model.sliding_window", "preset", "preset"),
        ("model.tied_head", "true", True),
        ("model.tied_head", "False", False),
        ("model.attention", "dense", "dense"),
        ("optimizer.learning_rate", "1e-3", 1e-3),
        ("optimizer.learning_rate", "1", 1.0),
        ("optimizer.clip_norm", "null", None),
        ("optimizer.schedule", "wsd", "wsd"),
        ("mesh.fsdp", "-1", -1),
        ("logging.wandb_project", "a=b", "a=b"),
        ("data.phases[0].steps", "5_000", 5000),
        ("data.phases[0].mixture[0].path", "other", "other"),
        ("data.phases[0].mixture[0].max_epochs", "2", 2),
    ],
)
def test_overrides(experiment, key, text, value):
    found = config.load(experiment(f"c.data.phases = [{PHASE}]"), [(key, text)])
    for step in re.findall(r"\w+", key):
        found = found[int(step)] if step.isdigit() else getattr(found, step)
    assert found == value and type(found) is type(value)


def test_whole_sections_and_lists_can_be_given(experiment):
    path = experiment(f"c.data.phases = [{PHASE}]", "c.mesh = dict(data=2, fsdp=4)")
    assert config.load(path).mesh == dataclasses.replace(config.Config().mesh, data=2, fsdp=4)
    found = config.load(path, [("mesh", "{'tensor': 2}"), ("evaluation.sets", "[{'name': 'a', 'path': 'b'}]")])
    assert (found.mesh.data, found.mesh.tensor) == (1, 2) and found.evaluation.sets[0].name == "a"
    later_wins = config.load(path, [("seed", "1"), ("seed", "2")])
    assert later_wins.seed == 2


def test_a_file_may_write_records_as_the_typed_ones(experiment):
    source = "from phijax.data.mixture import Phase, Source"
    path = experiment(source, "c.data.phases = (Phase(3, 8, 2, (Source('web'),)),)")
    assert config.load(path).data.phases == (Phase(3, 8, 2, (Source("web"),)),)
    assert config.load(path, [("data.phases[0].steps", "4")]).data.phases[0].steps == 4


UNKNOWN = "there is no key '{}'"


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("sed", "1", UNKNOWN.format("sed") + r".* Nearest: seed\.\nKeys of the config: task, seed"),
        ("model.sliding_windw", "1", UNKNOWN.format("model.sliding_windw") + r".* Nearest: model.sliding_window\."),
        ("modle.preset", "tiny", UNKNOWN.format("modle") + r".* Nearest: model\."),
        ("learning_rate", "1", UNKNOWN.format("learning_rate") + r".* There is optimizer.learning_rate\."),
        ("data.phases[0].step", "1", r"'data.phases\[0\].step'\. Nearest: data.phases\[0\].steps\."),
        ("data.phases[0].mixture[0].wait", "1", r"Nearest: data.phases\[0\].mixture\[0\].weight\."),
        ("seed.x", "1", UNKNOWN.format("seed.x") + ": seed has no keys below it"),
        ("model.remat.x.y", "1", UNKNOWN.format("model.remat.x")),
        ("data.phases[1].steps", "1", r"data.phases has 1 entries, counted from 0\."),
        ("data.phases[-1].steps", "1", "no key"),
        ("data.phases.steps", "1", "no key 'data.phases.steps'"),
        ("seed[0]", "1", r"seed is not a list\."),
        ("mesh[0].data", "1", r"mesh is not a list\."),
        ("seed", "1.5", r"^command line: seed=1.5 must be int\."),
        ("seed", "one", r"--config.seed=one: expected int\."),
        ("seed", "none", r"seed=None must be int\."),
        ("seed", "true", r"seed=True must be int\."),
        ("seed", "__import__('os').getpid()", r"expected int\."),
        ("mesh", "{[]: 1}", "expected MeshConfig"),
        ("mesh", "5", "mesh must be a section of keys, not 5"),
        ("mesh", "{'dota': 1}", UNKNOWN.format("mesh.dota") + r".* Nearest: mesh.data\."),
        ("data.phases", "5", "data.phases must be a list, not 5"),
        ("data.phases", "[5]", r"data.phases\[0\] must be a section of keys, not 5"),
        ("optimizer.learning_rate", "fast", r"expected float\."),
        (
            "optimizer.schedule",
            "cosin",
            "command line: optimizer.schedule='cosin' must be cosine, wsd, linear, constant. Nearest: 'cosine'",
        ),
        ("model.layers", "1", r"model.layers=1 must be auto, scan, unroll\."),
        ("model.sliding_window", "prset", "must be int, preset, None. Nearest: 'preset'"),
        ("model.vocab_size", "none", r"model.vocab_size=None must be int, preset\."),
        ("seed", "-1", r"seed=-1 must be from 0 to 2\*\*32 - 1"),
        ("seed", str(2**32), "seed=4294967296 must be"),  # jax takes it for seed 0
        ("loss.z_loss", "-1", "loss.z_loss=-1.0 must be 0 or above"),
        ("loss.label_smoothing", "1", r"label_smoothing=1.0 in \[0, 1\)"),
        ("processes.heartbeat_timeout", "0", "processes.heartbeat_timeout=0 must be 1 or more"),
        ("processes.watchdog_seconds", "-1", "processes.watchdog_seconds=-1 must be 0 or more"),
        ("checkpoint.keep_last", "0", r"checkpoint.keep_last=0 must be 1 or more"),
        ("checkpoint.restore_step", "0", r"checkpoint.restore_step=0 must be 1 or more"),
        ("checkpoint.keep_best", "", r"checkpoint.keep_best='' names no held-out set"),
        ("data.micro_batches", "0", r"data.micro_batches=0 must be at least 1"),
    ],
)
def test_wrong_overrides_are_refused_with_what_is_right(experiment, key, text, message):
    with pytest.raises(UserError, match=message):
        config.load(experiment(f"c.data.phases = [{PHASE}]"), [(key, text)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "c.model.sliding_windw = None",
            r'experiment.py:5: Key "sliding_windw" does not .* locked\.\nDid .*"sliding_window"',
        ),
        ("c.modle.preset = 'tiny'", r"experiment.py:5: .*modle.*\nDid you mean \"model\""),
        ("c['sed'] = 1", "experiment.py:5: .*sed"),
        ("c.data.phases = [1 / 0]", "experiment.py:5: ZeroDivisionError: division by zero"),
        ("import nowhere", "experiment.py:5: ModuleNotFoundError: No module named 'nowhere'"),
        ("c.data.phases = [", r"experiment.py:5: SyntaxError: '\[' was never closed"),
        ("return", r"get_config\(\) returns None, not the config"),
        (
            "c.data.phases = [dict(step=10)]",
            r"experiment.py: .*'data.phases\[0\].step'\. Nearest: data.phases\[0\].steps",
        ),
        ("c.mesh = dict(fspd=2)", r"experiment.py: .*'mesh.fspd'\. Nearest: mesh.fsdp"),
        ("c.seed = 1.5", r"experiment.py: seed=1.5 must be int\."),
        ("c.data.phases = 3", "data.phases must be a list"),
        ("c.mesh = 3", "mesh must be a section of keys, not 3"),
        ("c.model.attention = 'dence'", "model.attention='dence' must be auto, .* Nearest: 'dense'"),
    ],
)
def test_slips_in_an_experiment_file_are_refused(experiment, line, message):
    with pytest.raises(UserError, match=message):
        config.load(experiment(line))


def test_an_unknown_key_is_refused_where_it_is_set():
    with pytest.raises(AttributeError, match="sliding_windw"):
        config.defaults().model.sliding_windw = 1


def test_an_override_below_what_is_no_section_is_refused(experiment):
    with pytest.raises(UserError, match="mesh must be a section of keys, not 3"):
        config.load(experiment("c.mesh = 3"), [("mesh.data", "2")])


def test_a_missing_experiment_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.py: no such file. Experiments lie under experiments/"):
        config.load(str(tmp_path / "nowhere.py"))
    with pytest.raises(UserError, match="no such file"):
        config.load(str(tmp_path))
    (tmp_path / "experiment.py").write_text("config = 1\n")
    with pytest.raises(UserError, match=r"has no get_config\(\)"):
        config.load(str(tmp_path / "experiment.py"))
    (tmp_path / "experiment.txt").write_text("")
    with pytest.raises(UserError, match="is not a Python file"):
        config.load(str(tmp_path / "experiment.txt"))


def test_split_overrides():
    rest, overrides = command.split_overrides(["--config=a.py", "--config.seed=1", "-config.b[0].c=x=y", "--dry_run"])
    assert rest == ["--config=a.py", "--dry_run"] and overrides == [("seed", "1"), ("b[0].c", "x=y")]
    with pytest.raises(UserError, match=r"--config.seed: an override needs a value, --config.seed=VALUE"):
        command.split_overrides(["--config.seed", "1"])


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_a_config_survives_being_written_and_read(path):
    found = config.load(str(path))
    assert found != config.Config()
    assert config.from_dict(json.loads(json.dumps(config.to_dict(found)))) == found


def test_differences():
    old = {"seed": 0, "model": {"preset": "tiny", "remat": "full"}, "list": [1, 2], "gone": 1}
    new = {"seed": 1, "model": {"preset": "tiny", "remat": "none"}, "list": [1, 3], "new": {"a": 1}}
    assert config.differences(old, new) == {
        "gone": (1, None),
        "list": ([1, 2], [1, 3]),
        "model.remat": ("full", "none"),
        "new": (None, {"a": 1}),
        "seed": (0, 1),
    }
    assert config.differences(old, old) == {}


def test_preset_keeps_the_presets_number_and_none_is_a_number_of_its_own():
    base = PRESETS["phi3_mini"]
    assert base.sliding_window == 2047
    assert resolve_model(ModelSection("phi3_mini"), PRESETS) == base
    assert resolve_model(ModelSection("phi3_mini", sliding_window=None), PRESETS) == dataclasses.replace(
        base, sliding_window=None
    )
    for field in dataclasses.fields(ModelSection):
        if field.default == "preset" and field.name != "sliding_window":
            value = getattr(base, field.name)
            same = ModelSection("phi3_mini", **{field.name: value})
            assert resolve_model(same, PRESETS) == base
            assert value != "preset"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiments_differences_from_the_defaults_are_the_frozen_ones(path):
    frozen = frozen_config.frozen_experiment(path)
    assert frozen.exists(), frozen_config.__doc__
    assert frozen_config.experiment_lines(path) == frozen.read_text(), frozen_config.__doc__


def test_no_frozen_experiment_is_left_over():
    frozen = {path.stem for path in (frozen_config.TESTS / "experiments").glob("*.txt")}
    assert frozen == {path.stem for path in EXPERIMENTS}


PARAMETERS = {
    "tiny": "2,410,176",
    "mini": "3,821,079,552",
    "mini_128k": "3,821,079,552",
    "medium": "13,960,238,080",
    "llama2_7b": "6,738,415,616",
}


def docstring_command(path: pathlib.Path) -> list[str]:
    """The arguments of the command in an experiment's first line."""
    first = path.read_text().splitlines()[0]
    program, *arguments = shlex.split(re.search(r"python -m (phijax\.main.*)", first.removesuffix('"""'))[1])
    assert program == "phijax.main"
    return arguments


def run_main(arguments: list[str]) -> int:
    """As `python -m phijax.main`, in this process."""
    for name in main.FLAGS:
        main.FLAGS[name].unparse()
    rest, overrides = command.split_overrides(arguments)
    positional = main.FLAGS(["main", *rest])[1:]
    return main.main(positional, overrides)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_each_experiments_command_plans_and_names_the_data_it_lacks(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(REPOSITORY / "experiments")
    arguments = docstring_command(path)
    assert f"--config=experiments/{path.name}" in arguments and any(a.startswith("--workdir=") for a in arguments)
    assert run_main([*arguments, "--dry_run"]) == EXIT_USER_ERROR
    printed = capsys.readouterr()
    assert f"model: {PARAMETERS[path.stem]} parameters" in printed.out
    assert "  memory of " in printed.out and " GiB" in printed.out
    first = config.load(str(path)).data.phases[0].mixture[0].path
    assert printed.err.startswith(f"error: data: No shards at {first}")


def test_a_dry_run_with_its_data_reads_one_batch_and_trains_nothing(tmp_path, capsys):
    shards = write_synthetic(tmp_path / "web", documents=200, block=64)
    overrides = {
        "data.phases[0].mixture[0].path": shards,
        "evaluation.sets[0].path": shards,
        "data.phases[0].mixture[0].max_epochs": 1000,
    }
    arguments = [f"--config={REPOSITORY}/experiments/tiny.py", f"--workdir={tmp_path}/run", "--dry_run"]
    assert run_main([*arguments, *(f"--config.{k}={v}" for k, v in overrides.items())]) == EXIT_DONE
    printed = capsys.readouterr().out
    # Rows of 256 tokens are four records of 64 neighbouring ones.
    tail = sum(shard.records % 4 for shard in read_manifest(epath.Path(shards)).shards)
    seen = rf"data: {shards}: \d+ records, seen [\d.]+ times; {tail} at the ends of shards fill no row\n"
    assert tail > 0 and re.search(seen, printed)
    assert re.search(r"read step 0: 8 rows, [\d,]+ tokens to predict. Nothing was trained.", printed)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Which experiment"),
        (["--config=experiments/tiny.py"], "Where to"),
        (["--config=experiments/tiny.py", "more"], "'more' is not a flag"),
    ],
)
def test_an_incomplete_command_is_refused(arguments, message, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(UserError, match=message):
        run_main(arguments)


def run_process(*arguments: str, cwd: pathlib.Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "phijax.main", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_a_slip_on_the_command_line_ends_with_one_message_and_code_2():
    ended = run_process("--config=experiments/tiny.py", "--workdir=x", "--config.modle.preset=x", cwd=REPOSITORY)
    assert ended.returncode == EXIT_USER_ERROR
    assert ended.stderr.startswith("error: --config.modle.preset: there is no key 'modle'. Nearest: model.\n")
    assert "Traceback" not in ended.stderr and not ended.stdout


def test_mediums_plan_is_printed_before_the_missing_shards_end_it(tmp_path):
    (tmp_path / "experiments").symlink_to(REPOSITORY / "experiments")
    ended = run_process("--config=experiments/medium.py", "--dry_run", cwd=tmp_path)
    assert ended.returncode == EXIT_USER_ERROR
    assert "model: 13,960,238,080 parameters, 40 layers of 5120" in ended.stdout
    assert "mesh: data 2 x fsdp 64 x context 1 x tensor 1 = 128 devices" in ended.stdout
    assert ended.stderr.startswith("error: data: No shards at shards/web/train") and "Traceback" not in ended.stderr
