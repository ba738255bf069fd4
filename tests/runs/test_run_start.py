"""A run that goes on from a checkpoint: its model, and what travels with the weights through training and out again."""

import dataclasses
import json
import pathlib
import shutil

import pytest
from etils import epath
from synthetic_shards import small_tokenizer, write_synthetic

import phijax
from phijax import config as configs
from phijax import main as command
from phijax.checkpoint.reading import read_manifest
from phijax.data.shards import Shards
from phijax.errors import UserError
from phijax.interchange.gguf.open import open_gguf
from phijax.interchange.gguf.write import write_gguf
from phijax.interchange.huggingface import export as huggingface_export
from phijax.interchange.huggingface import folder as huggingface_folder
from phijax.interchange.huggingface.families import FAMILIES
from phijax.interchange.native import quantize as native_quantize
from phijax.interchange.native import write as native_write
from phijax.interchange.native.source import model_of
from phijax.interchange.open import open_checkpoint
from phijax.quantization import policy
from phijax.run import resume, start
from phijax.text.beginning import write_beginning
from phijax.text.chat_formats import PHI4
from phijax.text.train_tokenizer import train_tokenizer

TOKENIZER = small_tokenizer()
END, USER = (TOKENIZER.specials.ids[name] for name in ("<|end|>", "<|user|>"))
SETTINGS = {"do_sample": True, "temperature": 0.25, "top_p": 0.5, "eos_token_id": [END, USER]}


@pytest.fixture(scope="module")
def published(as_llama, tmp_path_factory) -> pathlib.Path:
    """Weights as somebody publishes them: another base, a chat template, two ids that end an answer, how to sample."""
    folder = shutil.copytree(as_llama, tmp_path_factory.mktemp("published") / "model")
    edit(folder / "config.json", {"rope_theta": 100_000.0, "bos_token_id": 1, "eos_token_id": END})
    edit(folder / "tokenizer_config.json", {"chat_template": PHI4.template})
    write_beginning(epath.Path(folder), [1])  # <s>, as Llama's
    (folder / "generation_config.json").write_text(json.dumps(SETTINGS))
    return folder


def edit(path: pathlib.Path, changes: dict) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def experiment(runs) -> pathlib.Path:
    """The runs' experiment, its model that of init_from, six steps long."""
    lines = runs.experiment.read_text().replace("dict(vocab_size=300, ", "dict(").splitlines()
    lines = [line for line in lines if not line.startswith(("    sizes", "    for name", "        c.model"))]
    text = "\n".join(lines).replace("defaults()", 'defaults()\n    c.model.preset = "checkpoint"')
    path = runs.folder / "continuing.py"
    path.write_text(text.replace("steps=14", "steps=4").replace("steps=10", "steps=2"))
    return path


@pytest.fixture(scope="module")
def went_on(runs, published, experiment, tmp_path_factory) -> pathlib.Path:
    """Its workdir after six steps from the published weights, which are gone since."""
    copied = shutil.copytree(published, tmp_path_factory.mktemp("start") / "model")
    workdir = tmp_path_factory.mktemp("went_on") / "run"
    ended = runs.run(workdir, f"--config.init_from={copied}", config=experiment)
    assert ended.code == 0 and f"weights of {copied}" in ended.output, ended.output
    shutil.rmtree(copied)
    return workdir


def config_of(experiment, *changes: tuple[str, str]):
    return configs.load(str(experiment), changes)


def test_the_model_is_the_checkpoints(went_on, published):
    model = open_checkpoint(went_on).model
    assert model == open_checkpoint(published).model and model.rope_theta == 100_000.0
    assert json.loads((went_on / "config.json").read_text())["model"]["preset"] == "checkpoint"


def test_it_resumes_although_the_start_is_gone(runs, went_on, experiment, tmp_path):
    workdir = shutil.copytree(went_on, tmp_path / "run", symlinks=True)
    ended = runs.run(workdir, "--config.init_from=/gone", "--config.data.phases[1].steps=4", config=experiment)
    assert ended.code == 0 and "going on from step 6" in ended.output, ended.output
    before, now = (read_manifest(workdir / "checkpoints" / step)["identity"] for step in ("6", "8"))
    assert now["start"] == before["start"] and now["model"] == before["model"]
    # What is set by hand is set against the start's model, as at the first start, not against what it made of it.
    gone = config_of(experiment, ("init_from", "/gone"), ("model.rope_theta", "7.0"))
    assert start.resolve(gone, workdir).rope_theta == 7.0
    with pytest.raises(UserError, match=r"model\.rope_theta was 100000\.0, now 7\.0"):
        resume.check_identity(before, {**before, "model": before["model"] | {"rope_theta": 7.0}}, 6)


def test_a_dry_run_says_what_a_start_would(went_on, published, experiment, capsys):
    for flag, value in (("workdir", None), ("workdir", str(went_on))):
        command.FLAGS[flag].value = value
        command.FLAGS.mark_as_parsed()
        start_of = str(published) if value is None else "/gone"
        assert command.dry_run(config_of(experiment, ("init_from", start_of))) == 0
    command.FLAGS.unparse_flags()
    said = capsys.readouterr().out
    assert said.count("read step 0: 8 rows") == 2 and said.count(f"weights of {published}") == 1
    with pytest.raises(UserError, match=r"rope_theta is 100000\.0 there, 10000\.0 here"):
        command.FLAGS.mark_as_parsed()
        command.FLAGS["workdir"].value = None
        command.dry_run(config_of(experiment, ("init_from", str(published)), ("model.preset", "tiny"), *SIZES))


SIZES = [(f"model.{name}", str(value)) for name, value in dict(
    vocab_size=300, num_layers=1, model_dim=32, num_heads=16, num_kv_heads=8, head_dim=4, ffn_dim=64
).items()]  # fmt: skip


def assert_travelled(opened, *, ids=(END, USER, TOKENIZER.end_of_text)) -> None:
    assert set(opened.stop_ids) == set(ids)  # the data's documents end as they do there
    assert opened.chat_template == PHI4.template
    assert opened.begin == (1,) and opened.facts.bos_id == 1 and opened.facts.eos_id == END
    assert {k: opened.facts.generation[k] for k in ("do_sample", "temperature", "top_p")} == {
        k: SETTINGS[k] for k in ("do_sample", "temperature", "top_p")
    }


def exported(opened, folder: pathlib.Path, layout: str) -> pathlib.Path:
    huggingface_folder.write(opened, folder, huggingface_export.folder(opened, FAMILIES[layout], None))
    return folder


def small(opened, folder: pathlib.Path) -> pathlib.Path:
    assigned = policy.assign(opened.model, policy.parse("int8"))
    native_quantize.write(opened, folder, assigned, method="rtn")
    return folder


def test_what_came_with_the_weights_goes_into_every_export(went_on, tmp_path):
    opened = open_checkpoint(went_on)
    assert_travelled(opened)
    assert huggingface_export.choose_family(opened, "hf").model_type == "llama"  # the class that the weights came from
    alone = shutil.copytree(went_on / "checkpoints" / "6", tmp_path / "alone")  # a step without its run
    assert open_checkpoint(alone).stop_ids == opened.stop_ids
    again = tmp_path / "ours"
    native_write.write(opened, again, dtype=None)
    for number, each in enumerate((opened, open_checkpoint(again), open_checkpoint(small(opened, tmp_path / "small")))):
        assert_travelled(each)
        for layout in ("llama", "phi3"):
            if FAMILIES[layout].unwritable(each.model) is None:
                folder = exported(each, tmp_path / f"{layout}{number}", layout)
                assert_travelled(open_checkpoint(folder))
                generation = json.loads((folder / "generation_config.json").read_text())
                assert set(generation["eos_token_id"]) == {END, USER, TOKENIZER.end_of_text}
        file = write_gguf(each, tmp_path / f"{number}.gguf", kind="F32")
        # One eos and one end of turn is what the format names; the tokenizer's names say the rest.
        assert_travelled(open_gguf(file), ids=set(open_gguf(file).stop_ids))


def test_load_chats_with_it(went_on, published):
    model, theirs = phijax.load(went_on), phijax.load(published)
    assert model.chat_format().name == theirs.chat_format().name == "phi4"
    assert set(theirs.generator.stop_ids) < set(model.generator.stop_ids)


def test_a_run_from_that_run_keeps_it(runs, went_on, experiment):
    config = config_of(experiment, ("init_from", str(went_on)))
    began = start.open_start(config, start.resolve(config), Shards.open(runs.shards / "a"))
    of_run = read_manifest(went_on / "checkpoints" / "6")["identity"]["start"]
    assert began.facts == of_run and len(began.lines) == 1


def test_a_run_from_a_run_of_ours_ends_texts_as_that_does(runs, unbroken):
    config = config_of(runs.experiment, ("init_from", str(unbroken)))
    began = start.open_start(config, start.resolve(config), Shards.open(runs.shards / "a"))
    assert set(began.facts) == {"model"}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> pathlib.Path:
    """Shards of another tokenizer, in which the special tokens have other ids."""
    folder = write_synthetic(tmp_path_factory.mktemp("elsewhere") / "a", seed=1, documents=100)
    other = train_tokenizer(["altogether other words, and more of them; " * 3], vocab_size=297)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"tokenizer_fingerprint": other.fingerprint, "vocab_size": other.vocab_size}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"end_of_text": other.end_of_text}))
    other.save(folder)
    return folder


def test_data_of_another_tokenizer_are_refused_unless_meant(published, went_on, elsewhere, experiment, tmp_path):
    shards = Shards.open(elsewhere)
    alone = shutil.copytree(went_on / "checkpoints" / "6", tmp_path / "alone")  # has no tokenizer, and says whose data
    for path in (published, went_on, alone):
        config = config_of(experiment, ("init_from", str(path)))
        with pytest.raises(UserError, match=r"(?s)another tokenizer.*297 ids.*init_from_other_tokenizer=true"):
            start.open_start(config, start.resolve(config), shards)
    meant = config_of(experiment, ("init_from", str(published)), ("init_from_other_tokenizer", "true"))
    began = start.open_start(meant, start.resolve(meant), shards)
    assert any("another tokenizer" in line for line in began.lines)
    other = shards.tokenizer()
    moved = [other.specials.ids[name] for name in ("<|end|>", "<|user|>", "<|endoftext|>")]
    assert began.facts["stop_ids"] == moved and moved[0] != END
    assert began.facts["eos_id"] == moved[0] and began.facts["chat_template"] == PHI4.template
    assert "eos_token_id" not in began.facts["generation"] and began.facts["generation"]["temperature"] == 0.25
    # Of a tokenizer that is not there no name tells where an id went.
    unnamed = dataclasses.replace(meant, init_from=str(alone))
    began = start.open_start(unnamed, start.resolve(unnamed), shards)
    assert "stop_ids" not in began.facts and "chat_template" not in began.facts
    assert any(f"stop id {END}" in line and "the chat template" in line for line in began.lines)


def test_a_checkpoint_without_a_tokenizer_is_said(runs, published, experiment, tmp_path):
    bare = shutil.copytree(published, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*"))
    config = config_of(experiment, ("init_from", str(bare)))
    began = start.open_start(config, start.resolve(config), Shards.open(runs.shards / "a"))
    assert "is not known: No tokenizer in" in began.lines[0] and END in began.facts["stop_ids"]


def test_a_bos_or_pad_that_is_no_special_token_harms_no_export(runs, published, experiment, tmp_path):
    """An eos that no tokenizer file can name is left out, and said."""
    odd = shutil.copytree(published, tmp_path / "odd")
    edit(odd / "config.json", {"eos_token_id": 77})
    config = config_of(experiment, ("init_from", str(odd)))
    began = start.open_start(config, start.resolve(config), Shards.open(runs.shards / "a"))
    assert "eos_id" not in began.facts and any("eos_id 77" in line for line in began.lines)
    assert model_of("here", {"model": began.facts["model"]}).rope_theta == 100_000.0
