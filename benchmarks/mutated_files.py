"""Small files of every kind that phijax reads, and who reads each: what `mutations.py` changes.

Written without a device of JAX's, so that the process may fork afterwards.
"""

import dataclasses
import json
import pathlib
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath
from mutations import Counts, Reader, attack, failures, table

from phijax import config as configs
from phijax.checkpoint import lock, manifest, reading
from phijax.checkpoint.good import best, restored_step
from phijax.curation import unfinished
from phijax.curation.documents import InputFile, Part
from phijax.curation.jobs import Task
from phijax.curation.jobs import run as run_tasks
from phijax.data import verification
from phijax.data.shard_manifest import InputEntry, Manifest, read_manifest
from phijax.data.shards import ShardWriter
from phijax.errors import UserError
from phijax.interchange import model_card, tokenizer_files
from phijax.interchange.gguf.write import write_gguf
from phijax.interchange.huggingface import config as huggingface_config
from phijax.interchange.huggingface import export as huggingface_export
from phijax.interchange.huggingface import folder as huggingface_folder
from phijax.interchange.huggingface.families import FAMILIES
from phijax.interchange.native import quantize
from phijax.interchange.open import open_checkpoint
from phijax.interchange.opened import Opened
from phijax.interchange.weight_source import NOT_QUANTIZED, Index, model_shapes
from phijax.model import params
from phijax.model.config import LongRope, ModelConfig, model_to_dict, read_long_rope
from phijax.planning.summary import describe_model
from phijax.report.report import EventLog
from phijax.report.summary import summarise
from phijax.report.writers import JsonLines, encode, read_metrics
from phijax.run import resume
from phijax.storage import strict_json
from phijax.text.byte_level import byte_of_character
from phijax.text.open import open_tokenizer
from phijax.text.tokenizer import MODEL_FILE, Tokenizer
from phijax.text.train_tokenizer import train_tokenizer
from phijax.text.vocab_and_merges import MERGES_FILE, VOCAB_FILE

MODEL = ModelConfig(
    vocab_size=320,
    model_dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_dim=96,
    max_position=64,
    long_rope=LongRope(tuple(1.0 + i / 8 for i in range(8)), tuple(2.0 + i for i in range(8)), 32),
)
GPT2 = {"positions": "learned", "norm": "layer", "bias": True, "activation": "gelu_tanh", "gated": False}


@dataclasses.dataclass(frozen=True)
class Weights:
    """A WeightSource over arrays in memory."""

    schemes = NOT_QUANTIZED

    arrays: Mapping[str, np.ndarray]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {path: array.shape for path, array in self.arrays.items()}

    def dtype(self, path: str) -> np.dtype:
        return self.arrays[path].dtype

    def read(self, path: str, index: Index) -> np.ndarray:
        return self.arrays[path][index]


def attack_all(folder: pathlib.Path, *, seed: int, first: int, changes: int, only: str) -> int:
    """`changes` of each file whose name has `only` in it, and a table for docs/reliability.md. -> how many failed."""
    wanted = {name: reader for name, reader in readers(folder).items() if only in name}
    print(f"{len(wanted)} files, changes {first} to {first + changes} of each, seed {seed}", flush=True)
    found: dict[str, Counts] = {}
    began = time.monotonic()
    for number, (name, reader) in enumerate(wanted.items(), start=1):
        found[name] = attack(reader, seed, first, changes)
        left = (time.monotonic() - began) / number * (len(wanted) - number)
        counts = f"{found[name].opened} opened, {found[name].refused} refused, {len(found[name].failed)} failed"
        print(f"{name}: {counts}; about {left:.0f} s left", flush=True)
    print(table(found), failures(found), sep="\n")
    return sum(len(counts.failed) for counts in found.values())


def readers(folder: pathlib.Path) -> dict[str, Reader]:
    """Writes the files below `folder`. Name, for people -> reader."""
    tokenizer = train_tokenizer(["def f(x): return 'a line of text', 1234\n" * 30], MODEL.vocab_size - 11)
    model = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
    memory = epath.Path("memory")
    opened = _of(
        Opened(memory, "phijax", model, Weights({}), lambda: tokenizer, stop_ids=(tokenizer.end_of_text,)), model
    )
    return {
        **_huggingface(folder / "hf", opened),
        **_configs(folder),
        **_tokenizers(folder, tokenizer),
        **_gguf(folder / "gguf", opened),
        **_run(folder / "run", model, tokenizer),
        **_data(folder, tokenizer),
        **_progress(folder / "to.unfinished"),
    }


def _huggingface(folder: pathlib.Path, opened: Opened) -> dict[str, Reader]:
    written = huggingface_export.folder(opened, huggingface_export.choose_family(opened, "hf"), None)
    huggingface_folder.write(opened, epath.Path(folder), written, max_shard_bytes=100_000)
    generation = {"do_sample": True, "temperature": 0.7, "top_k": 40, "eos_token_id": [310, 311], "bos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    config = folder / "config.json"
    shard = min(folder.glob("*.safetensors"))
    return {
        "config.json (Hugging Face)": Reader(config, _open),
        "config.json (LongRoPE's lists)": Reader(config, lambda path: read_long_rope(str(path))),
        "generation_config.json": Reader(folder / "generation_config.json", _open),
        "model.safetensors.index.json": Reader(folder / "model.safetensors.index.json", _open),
        "*.safetensors": Reader(shard, _open, "safetensors"),
    }


def _configs(folder: pathlib.Path) -> dict[str, Reader]:
    """config.json of the other classes, whose weights are laid out otherwise."""
    plain = dataclasses.replace(MODEL, long_rope=None)
    models = {
        "llama": plain,
        "mistral": dataclasses.replace(plain, sliding_window=16),
        "gpt2": dataclasses.replace(plain, num_kv_heads=plain.num_heads, tied_head=True, **GPT2),
    }
    found = {}
    for name, model in models.items():
        path = folder / name / "config.json"
        path.parent.mkdir()
        config = huggingface_config.render(model, FAMILIES[name], dtype="float32", ids={"eos_token_id": 2})
        path.write_text(json.dumps(config))
        found[f"config.json ({name})"] = Reader(path, _parse)
    return found


def _parse(path: pathlib.Path) -> None:
    huggingface_config.parse(strict_json.read(path).values, str(path))


def _tokenizers(folder: pathlib.Path, tokenizer: Tokenizer) -> dict[str, Reader]:
    """A SentencePiece model with the files beside it, read without the tokenizers package; and tokenizer.json alone."""
    whole, alone, ours = folder / "tokenizer", folder / "bpe", folder / "ours"
    tokenizer.save_huggingface(epath.Path(whole), chat_template="{{ messages[0].content }}")
    for path in (alone, ours):
        path.mkdir()
    shutil.copy(whole / "tokenizer.json", alone)
    shutil.copy(whole / "tokenizer_config.json", alone)
    tokenizer.save(epath.Path(ours))
    flags = {"end_of_text": "<|endoftext|>", "dummy_space": "each", "strips_right": ["<|end|>"], "symbols": []}
    (ours / "special_tokens.json").write_text(json.dumps(flags))
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    found = {f"{name}, beside tokenizer.model": Reader(whole / name, _open_tokenizer) for name in names}
    found["special_tokens.json"] = Reader(ours / "special_tokens.json", _open_tokenizer)
    found["tokenizer.model"] = Reader(ours / MODEL_FILE, _use_tokenizer, "bits")
    found["tokenizer.json, alone"] = Reader(alone / "tokenizer.json", _open_tokenizer)
    return found | _two_files(folder / "two")


def _two_files(folder: pathlib.Path) -> dict[str, Reader]:
    """GPT-2's own files."""
    folder.mkdir()
    letters = list(byte_of_character())
    vocab = {token: i for i, token in enumerate(["<|endoftext|>", *letters, "he", "ll", "hell"])}
    (folder / VOCAB_FILE).write_text(json.dumps(vocab))
    (folder / MERGES_FILE).write_text("#version: 0.2\nh e\nl l\nhe ll\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "add_prefix_space": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return {
        VOCAB_FILE: Reader(folder / VOCAB_FILE, _use_tokenizer),
        MERGES_FILE: Reader(folder / MERGES_FILE, _use_tokenizer, "text"),
        "tokenizer_config.json, beside vocab.json": Reader(folder / "tokenizer_config.json", _use_tokenizer),
    }


def _gguf(folder: pathlib.Path, opened: Opened) -> dict[str, Reader]:
    """Of each architecture. GPT-2's carries merges, the others a SentencePiece model's pieces."""
    plain = dataclasses.replace(opened.model, long_rope=None)
    merged = open_tokenizer(folder.parent / "two")
    gpt2 = dataclasses.replace(plain, num_kv_heads=plain.num_heads, tied_head=True, **GPT2)
    sources = {
        "phi3": opened,
        "llama": _of(opened, plain),
        "gpt2": dataclasses.replace(_of(opened, gpt2), tokenizer=lambda: merged, stop_ids=(merged.end_of_text,)),
    }
    found = {}
    for name, source in sources.items():
        path = write_gguf(source, epath.Path(folder) / f"{name}.gguf", kind="F32", architecture=name)
        found[f"*.gguf ({name})"] = Reader(pathlib.Path(path), lambda file: _all_said(open_checkpoint(file)), "gguf")
    return found


def _of(opened: Opened, model: ModelConfig) -> Opened:
    draw = np.random.default_rng(0)
    weights = Weights({p: draw.standard_normal(s, np.float32) for p, s in model_shapes(model).items()})
    return dataclasses.replace(opened, model=model, weights=weights)


def _run(workdir: pathlib.Path, model: ModelConfig, tokenizer: Tokenizer) -> dict[str, Reader]:
    """A workdir. The state of its step is one small file: its manifest is what is read here, not the weights."""
    step = workdir / "checkpoints" / "9"
    (step / "state").mkdir(parents=True)
    (step / "state" / "d").write_bytes(b"data")
    tokenizer.save(epath.Path(workdir) / "tokenizer")
    source = {"path": "shards", "weight": 1, "digest": "a" * 64}
    phase = {"steps": 9, "sequence_length": 64, "global_batch_size": 2, "mixture": [source]}
    data = {"seed": 0, "tokenizer": tokenizer.fingerprint, "phases": [phase], "begin": tokenizer.end_of_text}
    start = {"bos_id": 1, "stop_ids": [2], "chat_template": "x", "generation": {"do_sample": True}, "architecture": "P"}
    leaves = [{"path": f"params/{p}", "shape": list(s), "dtype": "float32"} for p, s in params.shapes(model).items()]
    identity = {"model": model_to_dict(model), "data": data, "start": start}
    manifest.write(
        epath.Path(step),
        step=9,
        leaves=leaves,
        identity=identity,
        extra={"good": True, "scores": {"heldout_loss/a": 3.5}, "restore_step": None},
        version=1,
    )
    lines = [{"step": i, "loss": 3.0 - i / 10, "time": 1.0 + i, "heldout_loss/a": 3.5} for i in range(9)]
    (workdir / "metrics.jsonl").write_text("".join(encode(line) + "\n" for line in lines))
    events = [{"event": "start", "time": 1.0, "step": 0}]
    events += [{"event": "progress", "time": 2.0 + i, "step": i + 1, "useful_seconds": 0.5 * i} for i in range(4)]
    events += [{"event": "start", "time": 9.0, "step": 3}, {"event": "saved", "time": 9.5, "step": 4}]
    (workdir / "events.jsonl").write_text("".join(encode(line) + "\n" for line in events))
    config = configs.Config()
    (workdir / "config.json").write_text(json.dumps(configs.to_dict(config), indent=2))
    (workdir / "config_history.jsonl").write_text('{"time": 1.0, "step": 3, "changed": {"seed": [0, 1]}}\n')
    owner = {"host": "h", "pid": 1, "time": "2026-01-01", "token": "t", "boot": "b", "started": 5}
    (workdir / "writer.lock").write_text(json.dumps(owner))

    def step_read(path: pathlib.Path) -> None:
        _all_said(open_checkpoint(workdir, verify=False))
        reading.describe(epath.Path(step))
        best(epath.Path(workdir) / "checkpoints", [9], "heldout_loss/a")
        restored_step(epath.Path(step))
        manifest.verify(epath.Path(step))
        try:
            resume.check_identity(reading.newest_identity(workdir / "checkpoints") or identity, identity, 9)
        except UserError as error:  # of a run that is named in the line before it
            raise UserError(f"{path}: {error}") from error

    def metrics(copy: pathlib.Path) -> None:
        JsonLines(epath.Path(copy.parent), 5).close()
        summarise(copy, {})

    def kept(copy: pathlib.Path) -> None:
        changed = dataclasses.replace(config, seed=7)
        resume.keep_config(changed, epath.Path(copy.parent), 9, lambda line: None)

    return {
        "manifest.json of a step": Reader(step / "manifest.json", step_read, seal=_sealed),
        "metrics.jsonl": Reader(workdir / "metrics.jsonl", read_metrics, "lines"),
        "metrics.jsonl, by a start": Reader(workdir / "metrics.jsonl", _apart(metrics), "lines"),
        "events.jsonl": Reader(workdir / "events.jsonl", _apart(lambda p: EventLog(epath.Path(p.parent), 5)), "lines"),
        "config.json of a workdir": Reader(workdir / "config.json", _apart(kept)),
        "config_history.jsonl": Reader(workdir / "config_history.jsonl", _apart(kept, "config.json"), "lines"),
        "writer.lock": Reader(workdir / "writer.lock", lambda path: lock.abandon(path.parent)),
    }


def _data(folder: pathlib.Path, tokenizer: Tokenizer) -> dict[str, Reader]:
    shards, work, remembered = folder / "shards", folder / "unfinished", folder / "data_checked"
    for path in (shards, work):
        path.mkdir()
    with ShardWriter(shards / "shard-00000-of-00001.arrayrecord", 32, np.dtype("uint16")) as writer:
        writer.add(np.arange(3, 103, dtype=np.uint16))
        entry = writer.close()
    places = {"empty": {"first": [{"file": "a.txt", "line": 3}], "files": {"a.txt": 1}}}
    content = Manifest(
        32, "uint16", 0, "all", tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.end_of_text, (entry,),
        (InputEntry("a.txt", 100),), ("b.pdf",), 2, 1, 0, {"empty": 1}, 0, {"seed": 0}, places, {"c.txt": "UTF-16"},
    )  # fmt: skip
    (shards / "manifest.json").write_text(content.to_json())
    text = InputFile("a.txt", str(folder / "a.txt"), 100)
    (folder / "a.txt").write_bytes(b"x" * 100)
    parts = [Part(text, 0, 50), Part(text, 50, 100)]
    wanted = unfinished.Wanted(
        {"seed": 0, "tokenizer": {"trained": False}}, ("seed",), [text], parts, lambda left: [(part,) for part in left]
    )
    unfinished.go_on(work, wanted, lambda line: None)
    marker = work / "unit-00000.done.json"
    output = work / "unit-00000"
    output.write_bytes(b"tokens")
    marker.write_text(json.dumps({"output_bytes": 6, "counts": {"counts": {"read": 2}, "skipped": {}}}))
    checked = verification.Checked("shard", "a" * 64, (1, 2, 3, 4), "b" * 64)
    verification.remember(epath.Path(remembered), 0, [checked])

    def marked(copy: pathlib.Path) -> None:
        made = Task(
            lambda: copy.parent.joinpath("unit-00000").write_bytes(b"again!") and {},
            (),
            copy.parent / "unit-00000",
            copy,
        )
        list(run_tasks([made], 1))
        unfinished.try_skipped_again(copy.parent, {0: ()})

    return {
        "manifest.json of shards": Reader(
            shards / "manifest.json", lambda path: read_manifest(epath.Path(path.parent))
        ),
        "plan.json": Reader(
            work / "plan.json", _apart(lambda p: unfinished.go_on(p.parent, wanted, lambda line: None))
        ),
        "*.done.json": Reader(marker, _apart(marked)),
        "data_checked/*.json": Reader(remembered / "0.json", lambda path: verification.recall(epath.Path(path.parent))),
    }


def _progress(folder: pathlib.Path) -> dict[str, Reader]:
    """Of an export that was killed."""
    folder.mkdir()
    identity, path = "a" * 64, folder / quantize.PROGRESS_FILE
    pieces = [{"piece": "embedding[0]", "squared": None}, {"piece": "blocks/mlp/up[1]", "squared": [0.5, 7.25]}]
    path.write_text("\n".join([identity, *map(json.dumps, pieces)]) + "\n")
    reader = _apart(lambda copy: quantize.taken_up(epath.Path(copy.parent), identity, lambda line: None))
    return {quantize.PROGRESS_FILE: Reader(path, reader, "lines")}


def _open(path: pathlib.Path) -> None:
    _all_said(open_checkpoint(path.parent))


def _open_tokenizer(path: pathlib.Path) -> None:
    open_tokenizer(epath.Path(path.parent))


def _use_tokenizer(path: pathlib.Path) -> None:
    """Text to ids and back, and what an export makes of it."""
    tokenizer = open_tokenizer(epath.Path(path.parent))
    tokenizer.decode(tokenizer.encode("he said hello"))
    tokenizer.huggingface_json()


def _all_said(opened: Opened) -> None:
    """What an export or `phijax show` takes of a checkpoint besides its weights."""
    model_card.render(opened, "phi3", "hf")
    tokenizer_files.ids_of(opened, opened.tokenizer())
    describe_model(opened.model)


def _apart(work: Callable[[pathlib.Path], Any], *others: str) -> Callable[[pathlib.Path], None]:
    """For what writes beside the file: on copies of its folder's files, in a folder of that name."""

    def on_copy(path: pathlib.Path) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            copy = pathlib.Path(temporary, *path.parent.parts[-2:])
            copy.mkdir(parents=True)
            for file in path.parent.iterdir():
                if file.is_file():
                    shutil.copy(file, copy)
            work(copy / path.name)

    return on_copy


def _sealed(data: bytes) -> bytes:
    """With the manifest's own digest (checkpoint/manifest.py), as somebody who means harm would write it."""
    content = json.loads(data)
    content.pop("crc32", None)
    digest = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    return json.dumps({**content, "crc32": f"{digest:08x}"}).encode()
