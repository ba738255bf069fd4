"""Manifests as version 1 of their format has them, and how newer ones are written and refused.

tests/manifests/ holds them as text, as the code of 0b7c8bf wrote them, without the list of files: what Orbax and
TensorStore write has other names each time. Here they are laid over checkpoints of today.
"""

import dataclasses
import json
import pathlib
import shutil

import pytest
from run_case import ROOT, metrics, saved_steps

from phijax import config as configs
from phijax.checkpoint import manifest
from phijax.data.shards import Shards
from phijax.errors import UserError
from phijax.interchange.gguf.write import write_gguf
from phijax.interchange.huggingface import export as huggingface_export
from phijax.interchange.huggingface import folder as huggingface_folder
from phijax.interchange.huggingface.families import FAMILIES
from phijax.interchange.load import load_params
from phijax.interchange.native import quantize as native_quantize
from phijax.interchange.native import write as native_write
from phijax.interchange.open import open_checkpoint
from phijax.model.config import ModelConfig, fields_version, model_from_dict, model_to_dict
from phijax.model.presets import PRESETS
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.quantization import policy
from phijax.run import resume, start

KEPT = ROOT / "tests" / "manifests"
STEP = 8


@pytest.fixture
def halfway(runs, unbroken, tmp_path) -> pathlib.Path:
    """A run of an old version, killed soon after step 8: manifest and config.json are of then."""
    workdir = runs.copy(unbroken, tmp_path / "run", STEP)
    for step in saved_steps(workdir)[:-1]:
        shutil.rmtree(workdir / "checkpoints" / str(step))
    age(runs, workdir / "checkpoints" / str(STEP), "run")
    config = json.loads((workdir / "config.json").read_text())
    del (
        config["init_from_other_tokenizer"],
        config["model"]["layers"],
        config["data"]["phases"][0]["mixture"][0]["max_epochs"],
    )
    (workdir / "config.json").write_text(json.dumps(config))
    return workdir


def age(runs, folder: pathlib.Path, kept: str) -> None:
    """Gives a checkpoint's folder the manifest that is kept under that name."""
    text = (KEPT / f"{kept}.json").read_text().replace("SHARDS", str(runs.shards))
    for name in "ab":
        text = text.replace(f"DIGEST_{name.upper()}", Shards.open(runs.shards / name).digest)
    content = json.loads(text.replace("TOKENIZER", Shards.open(runs.shards / "a").tokenizer_fingerprint))
    rewrite(folder, content | {"files": manifest.read(folder)["files"]})


def rewrite(folder: pathlib.Path, content: dict) -> None:
    (folder / manifest.MANIFEST_FILE).write_text(json.dumps(content | {"crc32": manifest._own_digest(content)}))


def test_an_old_run_resumes_and_nothing_is_said_of_keys_that_are_new(runs, halfway):
    ended = runs.run(halfway)
    assert ended.code == 0 and f"going on from step {STEP}" in ended.output, ended.output
    assert "config: " not in ended.output and not (halfway / "config_history.jsonl").exists()
    assert len(metrics(halfway)) == 24 and saved_steps(halfway)[-1] == 24
    kept, now = (json.loads(path.read_text()) for path in (KEPT / "run.json", halfway / "checkpoints/24/manifest.json"))
    assert now["format"] == 1, "older code reads what this code writes of a model that it knows"
    assert set(now) == {*kept, "files", "crc32"} and set(now["identity"]["model"]) == set(kept["identity"]["model"])
    assert now["leaves"] == kept["leaves"]


def test_a_new_key_that_is_set_is_said(halfway, runs):
    config = configs.load(str(runs.experiment), [("init_from_other_tokenizer", "true")])
    said: list[str] = []
    resume.keep_config(config, halfway, STEP, said.append)
    assert said == [f"config: init_from_other_tokenizer was False, from step {STEP} on True"]


def opens_starts_and_exports(folder: pathlib.Path, runs, tmp_path: pathlib.Path) -> None:
    opened = open_checkpoint(folder)
    load_params(opened, make_mesh(MeshConfig(data=1, fsdp=1), [*_one_device()]))
    config = configs.load(str(runs.experiment), [("init_from", str(folder)), ("model.preset", "checkpoint")])
    begun = start.open_start(config, start.resolve(config), Shards.open(runs.shards / "a"))
    assert begun.facts["model"] == model_to_dict(opened.model)
    huggingface_folder.write(opened, tmp_path / "hf", huggingface_export.folder(opened, FAMILIES["llama"], None))
    write_gguf(opened, tmp_path / "model.gguf", kind="F32", architecture="llama")
    native_write.write(opened, tmp_path / "ours", dtype=None)
    again = json.loads((tmp_path / "ours" / manifest.MANIFEST_FILE).read_text())
    assert again["format"] == 1 and again["identity"]["model"] == model_to_dict(opened.model)


def _one_device():
    import jax

    return jax.devices()[:1]


def test_a_step_of_an_old_run_opens_starts_and_exports(runs, halfway, tmp_path):
    opens_starts_and_exports(halfway / "checkpoints" / str(STEP), runs, tmp_path)


@pytest.mark.parametrize("kept", ["exported", "imported", "quantised"])
def test_what_old_commands_wrote_opens_starts_and_exports(runs, unbroken, tmp_path, kept):
    folder, opened = tmp_path / kept, open_checkpoint(unbroken / "checkpoints" / str(STEP))
    if kept == "quantised":
        native_quantize.write(
            opened, folder, policy.assign(opened.model, policy.parse("int4_g32,down=int8")), method="rtn"
        )
    else:
        native_write.write(opened, folder, dtype=None)
    age(runs, folder, kept)
    found = open_checkpoint(folder)
    assert (found.facts.architecture == "LlamaForCausalLM") == (kept == "imported")
    assert bool(found.stop_ids) == (kept == "imported") and bool(found.weights.schemes) == (kept == "quantised")
    opens_starts_and_exports(folder, runs, tmp_path)


@dataclasses.dataclass(frozen=True)
class Later(ModelConfig):
    """What a later version may know of a model."""

    parallel_block: bool = False


LATER = Later(**dataclasses.asdict(PRESETS["tiny"]))


def test_a_field_that_older_code_would_misread_makes_version_2():
    plain, other = model_to_dict(LATER), model_to_dict(dataclasses.replace(LATER, parallel_block=True))
    assert fields_version(plain) == 1 and model_from_dict(plain) == PRESETS["tiny"]
    assert fields_version(other) == 2 and other["parallel_block"] is True


@pytest.mark.parametrize(("version", "parallel_block"), [(1, False), (2, True)])
def test_a_manifest_is_version_2_where_it_must_be(unbroken, tmp_path, version, parallel_block):
    opened = open_checkpoint(unbroken / "checkpoints" / str(STEP))
    later = Later(**dataclasses.asdict(opened.model), parallel_block=parallel_block)
    opened = dataclasses.replace(opened, model=later)
    native_write.write(opened, tmp_path / "written", dtype=None)
    assigned = policy.assign(opened.model, policy.parse("int8"))
    native_quantize.write(opened, tmp_path / "quantised", assigned, method="rtn")
    assert [manifest.read(tmp_path / name)["format"] for name in ("written", "quantised")] == [version, version]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 3}, r"has format 3; this version of phijax reads 1 to 2"),
        ({"format": True}, r"has format True"),
        ({"model": {"parallel_block": True}}, r"model\.parallel_block=True is not known to this version"),
        ({"model": {"long_rope": {"scale": 2}}}, r"model\.long_rope\.scale=2 is not known"),
        ({"model": {"long_rope": {"short_factor": []}}}, r"model\.long_rope\.long_factor is missing"),
        ({"model": {"long_rope": 5}}, r"model\.long_rope=5 must be an object"),
    ],
    ids=str,
)
def test_a_newer_manifest_is_refused_by_name(runs, halfway, changes, message):
    folder = halfway / "checkpoints" / str(STEP)
    content = manifest.read(folder)
    content["identity"]["model"] |= changes.pop("model", {})
    rewrite(folder, content | changes)
    for path in (folder, halfway):
        with pytest.raises(UserError, match=message):
            open_checkpoint(path)
    if "identity" in content and content["format"] == 1 and not changes:
        with pytest.raises(UserError, match=message):
            resume.check_identity(content["identity"], {"model": {}}, STEP)


def test_what_an_old_manifest_does_not_say_is_at_its_default():
    whole = json.loads((KEPT / "run.json").read_text())["identity"]["model"]
    lacking = {
        k: v for k, v in whole.items() if k not in ("partial_rotary_factor", "long_rope", "norm_eps", "tied_head")
    }
    assert model_from_dict(lacking) == model_from_dict(whole)
    data = {"seed": 0, "tokenizer": "t", "phases": []}
    resume.check_identity({"model": lacking, "data": data}, {"model": whole, "data": data}, STEP)
    with pytest.raises(UserError, match=r"model\.partial_rotary_factor was 1\.0, now 0\.5"):
        resume.check_identity(
            {"model": lacking, "data": data}, {"model": whole | {"partial_rotary_factor": 0.5}, "data": data}, STEP
        )
    with pytest.raises(UserError, match=r"model\.ffn_dim is missing"):
        model_from_dict({k: v for k, v in whole.items() if k != "ffn_dim"})
