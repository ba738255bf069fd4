"""`phijax show` of a run's workdir, a Hugging Face folder and a GGUF file; `prepare` with the last one's tokenizer."""

import json

import pytest
from absl.testing import flagsaver
from saved_run import save_run

from phijax import export, prepare, show
from phijax.data.shards import Shards
from phijax.errors import UserError
from phijax.model.config import ModelConfig
from phijax.text.train_tokenizer import train_tokenizer

pytest.importorskip("gguf")

TEXT = "The file object has a method that reads a line.\nIts name is readline, and it returns text.\n"
MODEL = ModelConfig(
    vocab_size=310, model_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, max_position=64
)


def run(module, *arguments: str):
    saved = flagsaver.save_flag_values(module.FLAGS)
    try:
        return module.main(module.FLAGS(["command", *arguments])[1:])
    finally:
        flagsaver.restore_flag_values(saved, module.FLAGS)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, str]:
    """Kind -> a checkpoint of that kind; they hold the same model."""
    folder = tmp_path_factory.mktemp("checkpoints")
    workdir = save_run(folder / "run", MODEL, train_tokenizer([TEXT * 20], 310))
    for kind in ("hf", "gguf"):
        run(export, f"--checkpoint={workdir}", f"--format={kind}", f"--output={folder / kind}")
    (file,) = (folder / "gguf").glob("*.gguf")
    kinds = {"run": workdir, "hf": folder / "hf", "gguf": file, "gguf folder": folder / "gguf"}
    return {kind: str(path) for kind, path in kinds.items()}


def test_any_checkpoint_is_shown(paths, capsys):
    run(show, paths["run"])
    shown = capsys.readouterr().out
    assert "checkpoints/9: step 9" in shown and f'"vocab_size": {MODEL.vocab_size}' in shown
    for kind, path in paths.items():
        if kind != "run":
            run(show, path)
            shown = capsys.readouterr().out
            assert f"a {'huggingface' if kind == 'hf' else 'gguf'} checkpoint" in shown
            assert "2 layers of 32, 4 heads of 8 (2 kv), ffn 48, vocabulary 310" in shown
            assert "tokenizer: 310 ids" in shown and "chat template: " in shown


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("x")
    for path, message in (("config.json", "is no checkpoint"), ("notes.txt", "is no checkpoint"), (".", "checkpoint")):
        with pytest.raises(UserError, match=message):
            run(show, str(tmp_path / path))


@pytest.mark.parametrize("kind", ["gguf", "gguf folder"])
def test_shards_are_made_with_a_gguf_files_tokenizer(paths, tmp_path, kind):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": TEXT * 5}) + "\n" for _ in range(20)))
    common = (f"--input={tmp_path / 'text.jsonl'}", "--block=32", "--workers=1")
    run(prepare, *common, f"--output={tmp_path / 'given'}", f"--tokenizer={paths[kind]}")
    run(prepare, *common, f"--output={tmp_path / 'folder'}", f"--tokenizer={paths['run']}/tokenizer")
    given, folder = (Shards.open(tmp_path / name) for name in ("given", "folder"))
    assert given.num_records == folder.num_records > 0
    assert all((given.read(0, [i])[0][0] == folder.read(0, [i])[0][0]).all() for i in range(given.num_records))
