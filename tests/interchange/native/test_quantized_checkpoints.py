"""Quantised checkpoints of ours: what lies in them, how they are read, and writes that are cut short."""

import dataclasses
import itertools
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from etils import epath
from references.quantized import MODEL, SCHEME, one_device, quantized_params, save_run
from references.weights import random_params

from phijax.checkpoint import manifest
from phijax.errors import UserError
from phijax.interchange.load import load_params
from phijax.interchange.native import methods as quantization_methods
from phijax.interchange.native import quantize as native_quantize
from phijax.interchange.native import source as native_source
from phijax.interchange.native import write as native_write
from phijax.interchange.open import open_checkpoint
from phijax.model import params
from phijax.model.quantized import Quantized
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.quantization import policy
from phijax.quantization.rounding import round_to_nearest

ASSIGNED = policy.assign(MODEL, policy.parse(SCHEME))


@pytest.fixture(scope="module")
def weights():
    return random_params(MODEL)


@pytest.fixture(scope="module")
def expected(weights):
    return quantized_params(params.flat(weights), ASSIGNED)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, weights) -> pathlib.Path:
    return save_run(tmp_path_factory.mktemp("runs") / "run", weights)


def write(workdir, output, **changes):
    arguments = {"assigned": ASSIGNED, "quantize": round_to_nearest, "method": "rtn"} | changes
    return native_quantize.write(open_checkpoint(workdir), epath.Path(output), **arguments)


@pytest.fixture(scope="module")
def small(workdir, tmp_path_factory) -> pathlib.Path:
    output = tmp_path_factory.mktemp("quantized") / "small"
    write(workdir, output)
    return output


def assert_same(got, expected):
    """Bit for bit, of the same types."""
    assert set(got) == set(expected)
    for path, value in expected.items():
        assert isinstance(got[path], Quantized) == isinstance(value, Quantized), path
        for a, b in zip(jax.tree.leaves(got[path]), jax.tree.leaves(value), strict=True):
            assert a.dtype == b.dtype, path
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=path)


@pytest.mark.parametrize("sizes", [{}, {"tensor": 2}, {"fsdp": 2, "tensor": 2}])
def test_loaded_quantized_it_is_what_rounding_gives(small, expected, sizes):
    """On every mesh; rows that pad the vocabulary are zeros."""
    count = int(np.prod(list(sizes.values()) or [1]))
    mesh = make_mesh(MeshConfig(data=1, **sizes), jax.devices()[:count])
    got = params.flat(load_params(open_checkpoint(small), mesh, keep_quantized=True))
    assert_same(got, expected)
    for path in ("blocks/mlp/gate", "blocks/mlp/down"):  # the integers are cut by rows; scales of channels cannot be
        assert got[path].values.sharding.shard_shape(got[path].shape)[1] == 96 // count
    down = got["blocks/mlp/down"].scales  # 3 groups of rows, which two chips do not share evenly
    assert down.sharding.shard_shape(down.shape) == down.shape if count > 1 else True


def test_read_as_floats_it_is_what_the_integers_stand_for(small, expected):
    """As training, export and every reader of slices sees it."""
    opened = open_checkpoint(small)
    got = params.flat(load_params(opened, one_device()))
    wide = {p: v.dequantize() if isinstance(v, Quantized) else v for p, v in expected.items()}
    assert_same(got, wide)
    pieces = [slice(0, None), slice(1, 2), slice(5, 38), slice(31, 33), slice(46, 47)]
    for path in ("blocks/mlp/gate", "blocks/mlp/down", "blocks/attention/o", "embedding"):
        whole = np.asarray(wide[path])
        for rows, columns in itertools.product(pieces, pieces):
            index = (slice(1, 2), rows, columns)[-whole.ndim :]
            limits = opened.weights.shapes()[path]
            cut = tuple(slice(*part.indices(size)) for part, size in zip(index, limits, strict=True))
            np.testing.assert_array_equal(opened.weights.read(path, index), whole[cut], err_msg=f"{path} {index}")
            assert opened.weights.dtype(path) == np.float32


def test_two_values_lie_in_a_byte(small):
    leaves = {leaf["path"]: leaf for leaf in manifest.read(epath.Path(small))["leaves"]}
    assert leaves["params/blocks/mlp/gate/values"]["shape"] == [2, 96, 32]
    assert leaves["params/blocks/mlp/gate/values"]["dtype"] == "uint8"
    assert leaves["params/blocks/mlp/gate/scales"]["shape"] == [2, 96, 2]
    assert leaves["params/blocks/mlp/down/scales"]["shape"] == [2, 3, 64]  # groups along the input, our rows
    assert leaves["params/blocks/attention/o/values"] == {
        "path": "params/blocks/attention/o/values",
        "shape": [2, 48, 64],
        "dtype": "int8",
    }
    assert leaves["params/final_norm/scale"]["dtype"] == "float32"


def test_errors_by_layer_are_those_of_the_weights(workdir, tmp_path, weights, expected):
    errors = write(workdir, tmp_path / "out")
    for path, layers in errors.items():
        wide, exact = np.asarray(expected[path].dequantize()), np.asarray(params.flat(weights)[path])
        if exact.ndim == 2:
            wide, exact = wide[None, :700], exact[None, :700]
        for layer, error in enumerate(layers):
            truth = np.linalg.norm(wide[layer] - exact[layer]) / np.linalg.norm(exact[layer])
            assert error == pytest.approx(truth, rel=1e-3), path
    assert set(errors) == set(ASSIGNED) and len(errors["blocks/mlp/up"]) == 2
    assert manifest.read(epath.Path(tmp_path / "out"))["extra"]["quantization"]["errors"] == errors


def test_interrupted_it_goes_on_where_it_was(workdir, tmp_path, small, capsys):
    calls, said = [], []

    def counting(weight, scheme, axis):
        calls.append(scheme)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return round_to_nearest(weight, scheme, axis)

    with pytest.raises(KeyboardInterrupt):
        write(workdir, tmp_path / "out", quantize=counting)
    assert not (tmp_path / "out").exists()
    write(workdir, tmp_path / "out", quantize=counting, say=said.append)
    # 7 matrices of each of two layers, embedding and head, none twice but the one that was interrupted.
    assert len(calls) == 16 + 1 and any("goes on" in line for line in said)
    assert_same_files(tmp_path / "out", small)
    assert not (tmp_path / "out" / "progress.jsonl").exists() and len(list(tmp_path.iterdir())) == 1


TOKENS = np.random.default_rng(4).integers(0, 700, (3, 24), dtype=np.int32)

KILLED = """
import os, signal, sys
import numpy as np
from etils import epath
from phijax.interchange.native import methods as quantization_methods, quantize as native_quantize
from phijax.interchange.open import open_checkpoint
from phijax.quantization import policy
run, output, scheme, method, tokens = sys.argv[1:]
opened = open_checkpoint(run)
assigned = policy.assign(opened.model, policy.parse(scheme))
def on_piece(done, total):
    if done == 12:
        os.kill(os.getpid(), signal.SIGKILL)
source, rounding = quantization_methods.prepare(opened, assigned, method, np.load(tokens))
native_quantize.write(source, epath.Path(output), assigned, method=method, rounding=rounding, on_piece=on_piece)
"""


@pytest.mark.parametrize("method", ["rtn", "awq", pytest.param("gptq", marks=pytest.mark.slow)])
def test_killed_it_goes_on_where_it_was(workdir, tmp_path, method):
    """The same bits as in one go, and what was done is not done again."""
    np.save(tmp_path / "tokens.npy", TOKENS)
    place = tmp_path / "place"
    place.mkdir()
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, workdir, place / "out", SCHEME, method, tmp_path / "tokens.npy"]
    )
    assert ended.returncode == -signal.SIGKILL
    assert [entry.name for entry in place.iterdir()] == ["out.unfinished"]
    with (place / "out.unfinished" / "progress.jsonl").open("a") as file:
        file.write('{"piece": "blocks/ml')  # a line that a kill cut off
    said, quantized_again, asked = [], [], []
    opened = open_checkpoint(workdir)
    source, rounding = quantization_methods.prepare(opened, ASSIGNED, method, TOKENS)

    def counting(*arguments):
        quantized_again.append(1)
        return round_to_nearest(*arguments)

    def noted(path, layer):
        asked.append((path, layer))
        return rounding(path, layer)

    kept = {"say": said.append, "quantize": counting, "rounding": noted}
    native_quantize.write(source, epath.Path(place / "out"), ASSIGNED, method=method, **kept)
    assert any("goes on" in line and "12 pieces" in line for line in said)
    assert 0 < len(asked) < 16 and min(layer for path, layer in asked if path.startswith("blocks")) == 1
    assert len(quantized_again) == (len(asked) if method == "rtn" else 1)  # the embedding, which is no head
    whole, rounding = quantization_methods.prepare(opened, ASSIGNED, method, TOKENS)
    native_quantize.write(whole, epath.Path(tmp_path / "whole"), ASSIGNED, method=method, rounding=rounding)
    assert_same_files(place / "out", tmp_path / "whole")


def assert_same_files(folder, other):
    flat = (params.flat(load_params(open_checkpoint(f), one_device(), keep_quantized=True)) for f in (folder, other))
    assert_same(*flat)
    extra, wanted = (manifest.read(epath.Path(f))["extra"]["quantization"] for f in (folder, other))
    assert extra == wanted
    assert manifest.verify(epath.Path(folder), by_step=False) == []


def test_other_settings_begin_anew(workdir, tmp_path, expected):
    calls = []

    def interrupted(*arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return round_to_nearest(*arguments)

    with pytest.raises(KeyboardInterrupt):
        write(workdir, tmp_path / "out", quantize=interrupted, assigned=policy.assign(MODEL, policy.parse("int8")))
    said = []
    write(workdir, tmp_path / "out", say=said.append)
    assert any("started anew" in line for line in said)
    assert_same(
        params.flat(load_params(open_checkpoint(tmp_path / "out"), one_device(), keep_quantized=True)), expected
    )


def spoiled(workdir, path: str, value: float):
    """The checkpoint, one weight of its last layer changed as it is read."""
    opened = open_checkpoint(workdir)

    class Source:
        shapes, dtype, schemes = opened.weights.shapes, opened.weights.dtype, opened.weights.schemes

        def read(self, name, index):
            values = opened.weights.read(name, index).copy()
            if name == path and index[0].stop == opened.weights.shapes()[path][0]:
                values.reshape(-1)[7] = value
            return values

    return dataclasses.replace(opened, weights=Source())


@pytest.mark.parametrize("path", ["blocks/mlp/down", "final_norm/scale"])
def test_weights_that_are_nan_are_named_and_nothing_is_left(workdir, tmp_path, path):
    with pytest.raises(UserError, match=f"{path}.*NaN"):
        native_quantize.write(
            spoiled(workdir, path, float("nan")), epath.Path(tmp_path / "out"), ASSIGNED, round_to_nearest, method="rtn"
        )
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_every_scale_are_named(workdir, tmp_path):
    opened = spoiled(workdir, "blocks/mlp/up", 1e9)
    with pytest.raises(UserError, match=r"blocks/mlp/up, layer 1: no scale of float16 fits"):
        native_quantize.write(opened, epath.Path(tmp_path / "out"), ASSIGNED, round_to_nearest, method="rtn")
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_checkpoint_is_refused(small, tmp_path):
    with pytest.raises(UserError, match=r"is quantised already \(int4_g32, int8\)"):
        write(small, tmp_path / "out")


def test_an_output_that_is_there_and_a_disk_that_is_full(workdir, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        write(workdir, tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(UserError, match=r"needs \d+\.\d [kM]B; .* has 10\.0 kB free"):
        write(workdir, tmp_path / "other")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_fills_up_leaves_nothing(workdir, tmp_path, monkeypatch):
    def full(*arguments):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(native_quantize._Arrays, "_array", full)
    with pytest.raises(UserError, match=r"could not be written: .*No space left"):
        write(workdir, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_byte_is_seen(small, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(small, copy)
    largest = max((f for f in (copy / "state").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(UserError, match="has changed since it was written"):
        open_checkpoint(copy)


def test_bfloat16_stays_where_it_is_not_quantized(workdir, tmp_path):
    """Copied bit for bit: norms, and kinds that the scheme leaves."""
    native_write.write(open_checkpoint(workdir), epath.Path(tmp_path / "half"), dtype=np.dtype(jnp.bfloat16))
    assigned = policy.assign(MODEL, policy.parse("int4,head=as_stored"))
    write(tmp_path / "half", tmp_path / "out", assigned=assigned)
    before, after = open_checkpoint(tmp_path / "half"), open_checkpoint(tmp_path / "out")
    whole = (slice(None), slice(None))
    assert after.weights.dtype("head") == jnp.bfloat16
    np.testing.assert_array_equal(after.weights.read("head", whole), before.weights.read("head", whole))
    scale = "blocks/mlp_norm/scale"
    np.testing.assert_array_equal(after.weights.read(scale, whole), before.weights.read(scale, whole))


def test_an_export_of_ours_keeps_the_integers(small, tmp_path, expected):
    """Every array bit for bit, what the manifest says of them, and what lies beside them."""
    source = tmp_path / "small"
    shutil.copytree(small, source)
    for name in (native_source.QUALITY_FILE, native_source.PLOT_FILE):
        (source / name).write_text(name)
    before = open_checkpoint(source)
    assert native_write.nbytes(before, None) < native_write.nbytes(before, np.dtype(np.float32)) / 4
    native_write.write(before, epath.Path(tmp_path / "out"), dtype=None)
    after = open_checkpoint(tmp_path / "out")
    assert after.weights.schemes == ASSIGNED and after.facts.quantization == before.facts.quantization
    stored, copied = (manifest.read(epath.Path(path))["leaves"] for path in (source, tmp_path / "out"))
    assert stored == copied
    for leaf in stored:
        path, whole = leaf["path"].removeprefix("params/"), tuple(slice(None) for _ in leaf["shape"])
        a, b = (opened.weights.read_stored(path, whole) for opened in (before, after))
        np.testing.assert_array_equal(a, b, err_msg=path)
        assert a.dtype == b.dtype and a.shape == tuple(leaf["shape"])
    assert_same(params.flat(load_params(after, one_device(), keep_quantized=True)), expected)
    for name in (native_source.QUALITY_FILE, native_source.PLOT_FILE):
        assert (tmp_path / "out" / name).read_text() == name
    with pytest.raises(UserError, match="is quantised already"):
        native_quantize.refuse_quantized(after)


def test_an_export_in_a_dtype_is_what_they_stand_for(small, tmp_path, expected):
    native_write.write(open_checkpoint(small), epath.Path(tmp_path / "wide"), dtype=np.dtype(np.float32))
    opened = open_checkpoint(tmp_path / "wide")
    assert opened.weights.schemes == {} and opened.facts.quantization is None
    wide = {p: v.dequantize() if isinstance(v, Quantized) else v for p, v in expected.items()}
    assert_same(params.flat(load_params(opened, one_device(), keep_quantized=True)), wide)


def test_a_vocabulary_in_pieces_is_written_once(workdir, tmp_path, expected, monkeypatch):
    """Pieces are whole chunks: no chunk is written again, whose old bytes would stay in the files."""
    monkeypatch.setattr(native_quantize, "VOCABULARY_BYTES", 100 * 64 * 4)
    opened = open_checkpoint(workdir)
    assert sum(piece.path == "embedding" for piece in native_quantize.pieces(opened, ASSIGNED)) == 7
    errors = write(workdir, tmp_path / "out")
    assert len(errors["embedding"]) == 1
    assert_same(
        params.flat(load_params(open_checkpoint(tmp_path / "out"), one_device(), keep_quantized=True)), expected
    )
    for name, columns in (("values", 32), ("scales", 2)):
        spec = native_quantize.array_spec(epath.Path(tmp_path / "out" / "state"), f"params/head/{name}")
        assert tensorstore.open(spec, open=True, read=True).result().chunk_layout.read_chunk.shape == (100, columns)


def test_two_at_once_do_not_hurt_each_other(workdir, tmp_path, small):
    """The second is refused, and what the first has written stays."""
    tried = []

    def second_begins(done, total):
        if done == 5:
            with pytest.raises(UserError, match="is written by another run"):
                write(workdir, tmp_path / "out")
            tried.append(1)

    write(workdir, tmp_path / "out", on_piece=second_begins)
    assert tried and [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "writer.lock").exists()
    assert_same_files(tmp_path / "out", small)
