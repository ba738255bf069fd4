"""`~` in every path that a command or a config takes, whatever the shell made of it; paths that are none."""

import importlib
import os

import pytest

import phijax
from phijax import config as configs
from phijax import show
from phijax.errors import UserError
from phijax.storage.named import named

COMMANDS = ("export", "generate", "main", "plan", "preflight", "prepare", "quantize")
# Every flag whose value is a text of the user's, by what it is: a new one has to be put into one of them.
PATHS = {
    *("export.checkpoint", "export.output", "generate.checkpoint", "generate.prompt_file", "main.config"),
    *("main.workdir", "plan.config", "plan.plot", "preflight.config", "preflight.workdir", "prepare.input"),
    *("prepare.output", "prepare.tokenizer", "quantize.checkpoint", "quantize.output", "quantize.held_out"),
    "quantize.calibration",
}
TEXTS = {
    *("export.format", "export.dtype", "export.kind", "export.max_shard_size", "generate.prompt", "generate.message"),
    *("generate.system", "generate.stop", "main.coordinator_address", "plan.topology", "plan.compiler_option"),
    *("preflight.coordinator_address", "prepare.text_field", "prepare.part", "quantize.scheme", "quantize.method"),
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return str(tmp_path / "home")


def test_every_flag_that_is_a_path_knows_the_home_folder(home):
    found = {"path": set(), "string": set()}
    for command in COMMANDS:
        defined = importlib.import_module(f"phijax.{command}").FLAGS
        for module, flags in defined.flags_by_module_dict().items():
            for flag in flags if not module.startswith("absl.") else ():
                kind = flag.parser.flag_type()
                if kind in ("path", "string", "multi string"):
                    found["path" if kind == "path" else "string"].add(f"{command}.{flag.name}")
                if kind == "path":
                    assert flag.parser.parse("~/x/*.txt") == f"{home}/x/*.txt" and flag.default is None
    assert found == {"path": PATHS, "string": TEXTS}


def test_every_key_that_is_a_path_knows_the_home_folder(home, tmp_path):
    assert set(configs.PATHS) == {key for key in configs.keys() if key.endswith(("path", "_from"))}
    (tmp_path / "experiment.py").write_text("""
import phijax.config

def get_config():
    c = phijax.config.defaults()
    mixture = [dict(path="~/a", weight=1), dict(path="b/~", weight=1)]
    c.data.phases = [dict(steps=1, sequence_length=64, global_batch_size=1, mixture=mixture)]
    c.evaluation.sets = [dict(name="~n", path="~/held")]
    return c
""")
    overrides = [("init_from", "~/start"), ("model.long_rope_from", "~"), ("data.phases[0].mixture[0].path", "~/c")]
    config = configs.load(str(tmp_path / "experiment.py"), overrides)
    assert [source.path for source in config.data.phases[0].mixture] == [f"{home}/c", "b/~"]
    assert (config.init_from, config.model.long_rope_from) == (f"{home}/start", home)
    assert (config.evaluation.sets[0].path, config.evaluation.sets[0].name) == (f"{home}/held", "~n")
    assert configs.from_dict(configs.to_dict(config)) == config  # as config.json keeps it
    with pytest.raises(UserError, match="~nobody-of-this-name"):
        configs.load(str(tmp_path / "experiment.py"), [("init_from", "~nobody-of-this-name/x")])


def test_load_and_show_know_the_home_folder(home):
    with pytest.raises(UserError, match=f"No checkpoint at {home}/model:"):
        phijax.load("~/model")
    show.FLAGS(["show"])
    with pytest.raises(UserError, match=f"{home}/shards does not exist"):
        show.main(["~/shards"])


def test_a_path_without_a_home_is_taken_as_it_is():
    for path in ("a~b", "./~x", "a/~", "gs://bucket/~", "/~", "run~", ""):
        assert named(path) == path


@pytest.mark.parametrize("path", ["~nobody-of-this-name", "~nobody-of-this-name/run"])
def test_a_user_that_is_not_known_is_no_folder(path):
    with pytest.raises(UserError, match=rf"~nobody-of-this-name is known.*\./{path}"):
        named(path)
    assert not os.path.exists(path)


@pytest.mark.parametrize("path", ["file:///tmp/x", "http://x/y", "https://huggingface.co/a/b", "logs://x"])
def test_urls_that_are_no_paths_are_refused(path):
    with pytest.raises(UserError, match="paths are local or gs://"):
        named(path)
    with pytest.raises(UserError, match="paths are local or gs://"):
        phijax.load(path)
