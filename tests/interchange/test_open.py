"""Checkpoints of ours opened for reading: which step, slices, damage, meshes; nothing is read that is not asked for."""

import dataclasses
import json
import pathlib
import shutil
import socket
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from quick_compilation import QUICK

from phijax.checkpoint import manifest, reading
from phijax.checkpoint.config import CheckpointConfig
from phijax.checkpoint.lock import WriterLock
from phijax.checkpoint.run_state import RunCheckpoints
from phijax.errors import UserError
from phijax.interchange.facts import Facts
from phijax.interchange.huggingface import export as huggingface_export
from phijax.interchange.huggingface import folder as huggingface_folder
from phijax.interchange.huggingface.families import FAMILIES
from phijax.interchange.load import load_params
from phijax.interchange.native import write as native_write
from phijax.interchange.open import open_checkpoint
from phijax.interchange.opened import Opened
from phijax.interchange.weight_source import blocks, model_shapes
from phijax.model import params
from phijax.model.config import ModelConfig
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.text.tokenizer import Tokenizer
from phijax.text.train_tokenizer import train_tokenizer

MODEL = ModelConfig(
    vocab_size=400,
    model_dim=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    max_position=128,
)


def mesh(**sizes):
    count = int(np.prod(list(sizes.values()) or [1]))
    return make_mesh(MeshConfig(**{"data": 1, "fsdp": 1, **sizes}), jax.devices()[:count])


def values(seed: int, on) -> params.Params:
    return jax.jit(
        lambda: params.init(MODEL, seed), out_shardings=params.shardings(MODEL, on), compiler_options=QUICK
    )()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
    return train_tokenizer([text], 400)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tokenizer) -> pathlib.Path:
    """A run's workdir: steps 2 and 5, written from a mesh of 4, with an optimizer's state beside the weights."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer.save(folder / "tokenizer")
    with WriterLock(folder, break_lock=False, log=print) as lock:
        config = dataclasses.replace(CheckpointConfig(), asynchronous=False)
        identity = {"model": dataclasses.asdict(MODEL), "data": {"tokenizer": tokenizer.fingerprint}}
        checkpoints = RunCheckpoints(folder / "checkpoints", config, identity=identity, version=1, lock=lock, log=print)
        for step in (2, 5):
            tree = {"params": values(step, mesh(fsdp=4)), "opt_state": {"count": jnp.zeros((), jnp.int32)}}
            checkpoints.save(step, tree)
        checkpoints.wait()
    return folder


def leaves(tree) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in params.flat(tree).items()}


def assert_same(got: dict, expected: dict) -> None:
    assert set(got) == set(expected)
    for path in expected:
        assert got[path].dtype == expected[path].dtype
        np.testing.assert_array_equal(got[path], expected[path], err_msg=path)


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_a_run_and_a_step_load_on_any_mesh_bit_for_bit(workdir, sizes):
    for path, step in ((workdir, 5), (workdir / "checkpoints" / "2", 2)):
        opened = open_checkpoint(path)
        assert (opened.kind, opened.model, opened.facts.step) == ("phijax", MODEL, step)
        assert_same(leaves(load_params(opened, mesh(**sizes))), leaves(values(step, mesh())))


def test_the_tokenizer_comes_with_it(workdir, tokenizer, tmp_path):
    assert open_checkpoint(workdir).tokenizer().fingerprint == tokenizer.fingerprint
    alone = shutil.copytree(workdir / "checkpoints" / "5", tmp_path / "alone")
    with pytest.raises(UserError, match="has no tokenizer"):
        open_checkpoint(alone).tokenizer()


@pytest.mark.parametrize("verify", [True, False])
def test_a_newest_step_without_its_manifest_is_said(workdir, tmp_path, verify):
    copy = shutil.copytree(workdir, tmp_path / "run")
    (copy / "checkpoints" / "5" / "manifest.json").unlink()
    said = r"5 is no step: it has no manifest\.json, as an interrupted copy leaves it\.\nUsing step 2 instead"
    with pytest.warns(UserWarning, match=said):
        assert open_checkpoint(copy, verify=verify).facts.step == 2
    (copy / "checkpoints" / "5" / "unfinished.json").write_text("{}")
    with pytest.warns(UserWarning, match="5 is no step: it is being saved, or its save was cut off"):
        open_checkpoint(copy, verify=verify)


def test_a_manifest_that_is_whole_and_says_what_cannot_be_is_refused(workdir, tmp_path):
    """As somebody who means harm writes it: its digest is right."""
    copy = shutil.copytree(workdir / "checkpoints" / "5", tmp_path / "5")
    content = manifest.read(epath.Path(copy))
    for name, value, words in (
        ("norm_eps", float("nan"), "norm_eps=nan must be a finite number above 0"),
        ("rope_theta", -1, "rope_theta=-1 must be a finite number above 0"),
        ("num_layers", True, "num_layers=True must be a whole number from 1"),
        ("num_kv_heads", 3, "num_kv_heads=3 does not divide"),
    ):
        identity = content["identity"] | {"model": content["identity"]["model"] | {name: value}}
        changed = content | {"identity": identity}
        digest = f"{zlib.crc32(json.dumps(changed, sort_keys=True).encode()):08x}"
        (copy / "manifest.json").write_text(json.dumps({**changed, "crc32": digest}))
        with pytest.raises(UserError, match=words):
            open_checkpoint(copy)


def test_the_tokenizer_is_the_one_that_it_was_saved_with(workdir, tokenizer, tmp_path):
    """The manifest's digests are of the weights alone."""
    alone = dataclasses.replace(open_checkpoint(workdir), facts=Facts())  # as of an import, which names no run's
    native_write.write(alone, tmp_path / "weights", dtype=None)
    run = shutil.copytree(workdir, tmp_path / "run")
    for folder in (run, tmp_path / "weights"):
        assert open_checkpoint(folder).tokenizer().fingerprint == tokenizer.fingerprint
        added = folder / "tokenizer" / "added_tokens.json"
        added.write_text(added.read_text().replace("<|end|>", "<|fnd|>"))
        with pytest.raises(UserError, match="tokenizer is damaged, or not the tokenizer of"):
            open_checkpoint(folder).tokenizer()


def test_the_newest_step_that_is_whole_is_taken(workdir, tmp_path):
    copy = shutil.copytree(workdir, tmp_path / "run")
    flip(copy / "checkpoints" / "5" / "state")
    with pytest.warns(UserWarning, match=r"(?s)5 is damaged: state/.* has changed since.*Using step 2 instead\."):
        assert open_checkpoint(copy).facts.step == 2
    with pytest.raises(UserError, match="has changed since it was written"):
        open_checkpoint(copy / "checkpoints" / "5")
    flip(copy / "checkpoints" / "2" / "state")
    with pytest.raises(UserError, match=r"no whole checkpoint \(damaged: \[2, 5\]\)"):
        open_checkpoint(copy)


def flip(folder: pathlib.Path) -> None:
    path = max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_slices_are_those_of_the_whole(workdir):
    source = open_checkpoint(workdir).weights
    whole = leaves(values(5, mesh()))
    assert source.shapes() == model_shapes(MODEL)
    assert source.shapes()["embedding"] == (400, 32)  # without the rows that pad it to 1024
    for path, index in (
        ("embedding", (slice(390, 400), slice(0, 32))),
        ("blocks/mlp/down", (slice(1, 2), slice(5, 30), slice(3, 9))),
        ("final_norm/scale", (slice(4, 9),)),
    ):
        np.testing.assert_array_equal(source.read(path, index), whole[path][index])


def test_a_layer_is_a_piece_of_its_own_in_the_file(workdir):
    """However few devices wrote it: one layer is read without decoding the others."""
    for path in ("blocks/mlp/gate", "blocks/attention/o"):
        chunk = open_checkpoint(workdir).weights._array(path).chunk_layout.read_chunk.shape
        assert chunk[0] == 1


class Counting:
    """A source that remembers what was asked of it."""

    def __init__(self, source):
        self._source, self.asked = source, []
        self.shapes, self.dtype, self.schemes = source.shapes, source.dtype, source.schemes

    def read(self, path, index):
        self.asked.append((path, index))
        return self._source.read(path, index)


def counted(opened: Opened) -> tuple[Opened, list]:
    counting = Counting(opened.weights)
    return dataclasses.replace(opened, weights=counting), counting.asked


def test_each_piece_is_read_once_and_no_more_than_a_layer_at_a_time(workdir):
    """Replicas share a reading: on 2 x 4 devices as many elements are read as the model has."""
    opened, asked = counted(open_checkpoint(workdir))
    load_params(opened, mesh(data=2, fsdp=4))
    total = sum(np.prod([part.stop - part.start for part in index]) for _, index in asked)
    assert total == params.count(MODEL)
    assert all(index[0].stop - index[0].start == 1 for path, index in asked if len(index) == 3)
    shard = [index for path, index in asked if path == "blocks/mlp/gate" and index[0].start == 0]
    assert sorted((index[1].start, index[1].stop) for index in shard) == [(0, 12), (12, 24), (24, 36), (36, 48)]


def test_export_never_holds_more_than_a_block(workdir, tmp_path):
    opened, asked = counted(open_checkpoint(workdir))
    native_write.write(opened, epath.Path(tmp_path / "out"), dtype=None)
    assert all(index[0].stop - index[0].start == 1 for path, index in asked if len(index) == 3)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float16])
def test_weights_alone_written_and_opened_again(workdir, tmp_path, tokenizer, dtype):
    opened = open_checkpoint(workdir)
    native_write.write(opened, tmp_path / "weights", dtype=dtype and np.dtype(dtype))
    again = open_checkpoint(tmp_path / "weights")
    assert (again.model, again.facts.step) == (MODEL, 5)
    assert again.tokenizer().fingerprint == tokenizer.fingerprint
    kind = np.dtype(dtype or np.float32)
    assert {again.weights.dtype(path) for path in again.weights.shapes()} == {kind}
    expected = leaves(values(5, mesh()))
    got = leaves(load_params(again, mesh(fsdp=2)))
    assert_same(got, {path: value.astype(kind).astype(np.float32) for path, value in expected.items()})
    flip(tmp_path / "weights" / "state")
    with pytest.raises(UserError, match="has changed since it was written"):
        open_checkpoint(tmp_path / "weights")


def test_weights_alone_are_readable_by_orbax_too(workdir, tmp_path):
    """`phijax show` describes it; its manifest lists the padded shapes."""
    native_write.write(open_checkpoint(workdir), tmp_path / "weights", dtype=None)
    stored = {leaf["path"]: leaf for leaf in reading.read_manifest(epath.Path(tmp_path / "weights"))["leaves"]}
    assert stored["params/embedding"]["shape"] == [1024, 32]
    assert manifest.verify(epath.Path(tmp_path / "weights"), by_step=False) == []
    assert "weights_only" in reading.describe(tmp_path / "weights")


def test_a_checkpoint_of_another_model_is_refused(workdir, tmp_path):
    """A manifest whose model does not have the leaves that it lists."""
    copy = shutil.copytree(workdir / "checkpoints" / "5", tmp_path / "5")
    described = manifest.read(epath.Path(copy))
    described["identity"]["model"]["ffn_dim"] = 40
    rest = {key: described[key] for key in ("step", "leaves", "identity", "extra")}
    (copy / "manifest.json").unlink()
    manifest.write(epath.Path(copy), version=1, **rest)
    with pytest.raises(UserError, match=r"(?s)another model.*mlp/down.*\(3, 48, 32\).*\(3, 40, 32\)"):
        open_checkpoint(copy)


@pytest.mark.parametrize("shape", [(), (7,), (300, 64), (3, 40, 64), (2, 1, 1)])
@pytest.mark.parametrize("limit", [1, 700, 10_000, 10**9])
def test_blocks_cut_an_array_once_in_order(shape, limit):
    array = np.arange(int(np.prod(shape))).reshape(shape)
    pieces = [array[index] for index in blocks(shape, 4, limit)]
    np.testing.assert_array_equal(np.concatenate([piece.reshape(-1) for piece in pieces]), array.reshape(-1))
    row = 4 * (int(np.prod(shape[1:])) // max(1, shape[1] if len(shape) > 2 else 1) if shape else 1)
    assert all(piece.size * 4 <= max(limit, row) for piece in pieces)


def test_load_keeps_a_narrow_dtype_when_asked(workdir):
    got = leaves(load_params(open_checkpoint(workdir), mesh(), dtype=jnp.bfloat16))
    assert_same(got, {p: v.astype(jnp.bfloat16) for p, v in leaves(values(5, mesh())).items()})


@pytest.mark.parametrize("kind", ["ours", "huggingface"])
def test_each_of_two_processes_reads_its_own_devices_slices(workdir, tmp_path, kind):
    """Half of every matrix each, the norms in full."""
    path = workdir
    if kind == "huggingface":
        path = tmp_path / "hf"
        opened = open_checkpoint(workdir)
        huggingface_folder.write(opened, path, huggingface_export.folder(opened, FAMILIES["phi3"], None))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    here = pathlib.Path(__file__).parent
    children = [
        subprocess.Popen(
            [sys.executable, here / "load_child.py", path, str(number), port],
            cwd=here.parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    ends = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], ends
    counts = [json.loads(output.splitlines()[-1]) for output, _ in ends]
    for path, shape in model_shapes(MODEL).items():
        total = int(np.prod(shape))
        if path.endswith("scale"):
            assert [count[path] for count in counts] == [total, total]
        elif path in ("embedding", "head"):  # 400 of 1024 rows: all of them lie on the first process
            assert [count.get(path, 0) for count in counts] == [total, 0]
        else:
            assert [count[path] for count in counts] == [total // 2, total // 2]
