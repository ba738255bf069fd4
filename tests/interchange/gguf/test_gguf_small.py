"""Quantised weights as GGUF blocks: what gguf's own reader makes of them is what they were, bit for bit."""

import dataclasses
import sys

import numpy as np
import pytest
from gguf_case import everything
from small_weights_case import CASES, FUSED, LEARNED_CASES, SPLIT, Small

from phijax.errors import UserError
from phijax.interchange.gguf import integers as gguf_integers
from phijax.interchange.gguf import write as gguf_write
from phijax.interchange.gguf.families import FAMILIES
from phijax.interchange.gguf.open import open_gguf
from phijax.interchange.gguf.write import write_card, write_gguf
from phijax.interchange.tensors import tensors
from phijax.quantization.policy import Scheme

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Small(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_are_read_back_by_gguf(bits):
    """Every integer and scales of both signs, also subnormal ones."""
    integers = np.random.default_rng(0).integers(-(1 << (bits - 1)), 1 << (bits - 1), (16, 256), np.int8)
    assert len(np.unique(integers)) == 1 << bits
    scales = np.array([0.01, -2.5, 65504, 6e-8], np.float16).reshape(1, 4).repeat(16, 0)
    found = gguf_integers.blocks(integers, scales, bits).reshape(16, -1)
    got = gguf.dequantize(found, gguf.GGMLQuantizationType[gguf_integers.KINDS[bits]])
    np.testing.assert_array_equal(got, integers * scales.astype(np.float32).repeat(64, 1))


@pytest.mark.parametrize("kind", ["BF16", "F32"])
@pytest.mark.parametrize("case", [*CASES, *LEARNED_CASES])
def test_files_hold_the_same_weights(case, kind, small, tmp_path, monkeypatch):
    """In pieces that divide nothing; read by us and by gguf."""
    monkeypatch.setattr(gguf_write, "_AT_ONCE", 128 * 7)
    opened, said = small(case), []
    path = write_gguf(opened, tmp_path / "m.gguf", kind=kind, say=said.append)
    plain = write_gguf(opened, tmp_path / "plain.gguf", kind="F32", keep_integers=False)
    schemes = opened.weights.schemes
    wide = {tensor.name: tensor.data for tensor in gguf.GGUFReader(plain).tensors}
    plan = {tensor.name: tensor for tensor in tensors(opened.model, gguf_write.family_for(opened).rows)}
    for tensor in gguf.GGUFReader(path).tensors:
        scheme = schemes.get(plan[tensor.name].parts[0].leaf)
        dense = kind if plan[tensor.name].matrix else "F32"
        assert tensor.tensor_type.name == (gguf_integers.KINDS[scheme.bits] if scheme else dense), tensor.name
        got = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(got, wide[tensor.name], err_msg=tensor.name)
    ours, theirs = everything(opened.weights), everything(open_gguf(path).weights)
    for leaf, array in ours.items():
        np.testing.assert_array_equal(theirs[leaf].astype(np.float32), array.astype(np.float32), err_msg=leaf)
    assert "integer for integer" in said[0]


def test_the_file_is_called_by_what_most_of_it_is(small, tmp_path):
    named = {case: write_gguf(small(case), tmp_path, kind="BF16").name for case in ("mixed", "eight bits")}
    assert named == {"mixed": "tiny-Q4_0.gguf", "eight bits": "tiny-Q8_0.gguf"}
    read = gguf.GGUFReader(tmp_path / "tiny-Q4_0.gguf").fields["general.file_type"].contents()
    assert read == int(gguf.LlamaFileType.MOSTLY_Q4_0)
    write_card(small("mixed"), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "llama-cli" in card and "Phi3ForCausalLM" in card and "down int8" in card
    write_card(small("mixed"), tmp_path / "x.gguf")
    assert len(list(tmp_path.iterdir())) == 3


def test_what_blocks_cannot_hold_is_refused(small):
    plan = {tensor.name: tensor for tensor in tensors(FUSED, FAMILIES["phi3"].rows)}
    qkv = plan["blk.0.attn_qkv.weight"]
    parts = {f"blocks/attention/{name}": Scheme(4, 32) for name in "qkv"}
    assert (
        gguf_integers.kind_of(parts | {"blocks/attention/v": Scheme(4)}, qkv) == "Q4_0"
    )  # the size of groups may differ
    for other in (Scheme(8), None):
        mixed = {leaf: scheme for leaf, scheme in (parts | {"blocks/attention/v": other}).items() if scheme}
        with pytest.raises(UserError, match=r"blk.0.attn_qkv.weight is one matrix in this format"):
            gguf_integers.kind_of(mixed, qkv)
    narrow = dataclasses.replace(SPLIT, ffn_dim=240)
    down = next(t for t in tensors(narrow, FAMILIES["llama"].rows) if "ffn_down" in t.name)
    with pytest.raises(UserError, match=r"blk.0.ffn_down.weight has rows of 240 weights; Q8_0 needs a multiple of 32"):
        gguf_integers.kind_of({"blocks/mlp/down": Scheme(8)}, down)


def test_a_full_disk_is_one_message_and_leaves_nothing(small, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_integers, "blocks", full)
    with pytest.raises(UserError, match=r"tiny-Q4_0.gguf could not be written: No space left on device"):
        write_gguf(small("mixed"), tmp_path, kind="BF16")
    assert not list(tmp_path.iterdir())


def test_k_quants_without_llama_say_what_to_install(small, tmp_path, monkeypatch):
    from phijax.interchange.gguf.k_quants import write_k_quants

    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(
        UserError, match=r"made by llama.cpp, which is not installed: .venv/bin/pip install -e '.\[llama\]'"
    ):
        write_k_quants(small("mixed"), tmp_path, kind="Q4_K_M")
    assert not list(tmp_path.iterdir())
