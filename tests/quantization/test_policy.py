"""Schemes by name, the table, and what is refused."""

import dataclasses

import pytest
from references.quantized import MODEL

from phijax.errors import UserError
from phijax.model import params
from phijax.model.presets import PRESETS
from phijax.quantization import policy
from phijax.quantization.policy import SCHEMES, Scheme


def nbytes(c, text: str) -> int:
    assigned = policy.assign(c, policy.parse(text))
    cut = {p: tuple(c.vocab_size if n == c.padded_vocab_size else n for n in s) for p, s in params.shapes(c).items()}
    return sum(scheme.nbytes(cut[path], policy.summed_axis(path)) for path, scheme in assigned.items())


@pytest.mark.parametrize(
    "text, gigabytes",
    [("int8", 3.82), ("int4", 1.91), ("int4_g128", 1.97), ("int4_g128_head8", 2.07), ("int4_g32", 2.15)],
)
def test_sizes_of_mini_by_hand(text, gigabytes):
    """3.821 G weights times bits, and 16 bits a scale: sums made elsewhere."""
    assert nbytes(PRESETS["phi3_mini"], text) / 1e9 == pytest.approx(gigabytes, abs=0.006)


def test_every_matrix_gets_the_tables_scheme_and_no_norm_does():
    assigned = policy.assign(MODEL, policy.parse("int4_g32_down8,o=int8"))
    names = {"attention/q", "attention/k", "attention/v", "attention/o", "mlp/gate", "mlp/up", "mlp/down"}
    assert set(assigned) == {f"blocks/{name}" for name in names} | {"embedding", "head"}
    eight = {path for path, scheme in assigned.items() if scheme == SCHEMES["int8"]}
    assert eight == {"blocks/attention/o", "blocks/mlp/down"}
    assert {scheme for path, scheme in assigned.items() if path not in eight} == {Scheme(4, 32)}


def test_a_kind_may_stay_as_stored():
    assigned = policy.assign(MODEL, policy.parse("int4,head=as_stored,embedding=as_stored"))
    assert "head" not in assigned and "embedding" not in assigned and len(assigned) == 7


def test_a_tied_model_has_no_head_to_quantize():
    assert "head" not in policy.assign(dataclasses.replace(MODEL, tied_head=True), policy.parse("int4"))


def test_a_head_that_is_the_embedding_has_no_scheme_of_its_own():
    for text in ("int4,head=int8", "int4_g32_head8,head=as_stored", "int4_g32,embedding=int8,head=int4"):
        policy.parse(text)
        with pytest.raises(UserError, match=r"head is its embedding \(tied\)(?s:.)*Say embedding="):
            policy.parse(text, tied_head=True)
    for text in ("int4_g32_head8", "int4,embedding=int8", "int4,head=int8,embedding=int8", "int4_down8,down=int4"):
        assert policy.parse(text, tied_head=True) == policy.parse(text)


@pytest.mark.parametrize(
    "text, message",
    [
        ("int3", r"--scheme=int3 is not one of int8, int4, .*Nearest: int8"),
        ("int4_g16", r"not one of.*Nearest: int4_g"),
        ("int4,downn=int8", r"kind=downn is not one of qkv, o, gate_up, down, .*Nearest: down"),
        ("int4,down=int9", r"down=int9 is not one of int8, .*as_stored.*Nearest: int8"),
        ("int4,down", r"down= is not one of"),
    ],
)
def test_names_that_are_not_known(text, message):
    with pytest.raises(UserError, match=message):
        policy.parse(text)


def test_groups_that_do_not_divide():
    with pytest.raises(
        UserError, match=r"has 64 inputs, which groups of 128 (?s:.)*do: int8, int4, int4_g64, int4_g32"
    ):
        policy.assign(MODEL, policy.parse("int4_g128"))
    with pytest.raises(UserError, match=r"blocks/attention/o has 48 inputs(?s:.)*do: int8, int4\.(?s:.)*,o=\.\.\."):
        policy.assign(MODEL, policy.parse("int4_g32"))
