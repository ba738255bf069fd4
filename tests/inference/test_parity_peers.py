"""What the table of peers is made of, with a peer of our own: no other project is installed here."""

import json
import pathlib
import runpy
import sys

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"

PEER = """
import numpy as np
from exchange import NotPossible, serve

def text(model, case):
    return np.full((len(case.tokens), 3), 2.0) + case.tokens[0]

def row(model, case):
    raise NotPossible("no rows | none")

def decode(model, case):
    raise ValueError("first line\\nsecond line")

serve(lambda folder: folder, {"text": text, "row": row, "decode": decode})
"""


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import parity_peers

    return parity_peers


def test_help(peers, capsys):
    with pytest.raises(SystemExit) as stop:
        peers.main(["--help"])
    assert stop.value.code == 0 and "--environments" in capsys.readouterr().out


def test_cases_are_those_of_the_parity_table(peers):
    """Every case can be asked for; decoding is given transformers' own tokens, one logit row a step."""
    case, expected = peers.make_case(peers.parity.CASES["cached decoding, window"], "x")
    assert (case.model, case.kind, case.start) == ("window", "decode", 10)
    assert expected.shape == (64, peers.parity.VOCABULARY) and len(case.tokens) == 74
    assert case.tokens[10:] == expected.argmax(1).tolist()
    case, expected = peers.make_case(peers.parity.CASES["packed rows"], "x")
    assert case.positions().shape == case.segments().shape == case.ids().shape == (1, len(expected))
    assert case.positions()[0, 30:33].tolist() == [30, 0, 1] and case.segments()[0, 30:33].tolist() == [0, 1, 1]
    assert {measure.args[0] for measure in peers.parity.CASES.values()} == set(peers.FOLDERS)


def test_answers_and_reasons_become_cells(peers, tmp_path, monkeypatch):
    script = tmp_path / "peer.py"
    script.write_text(PEER)
    kinds = ("text", "row", "decode")
    asked = {kind: peers.Case(model="m", kind=kind, tokens=[1, 2], answer=f"case_{kind}") for kind in kinds}
    peers.write_cases(tmp_path, asked)
    monkeypatch.syspath_prepend(BENCHMARKS / "peers")
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path)])
    runpy.run_path(str(script))
    cells = [peers.read_answer(tmp_path, case, np.full((2, 3), 3.5)) for case in asked.values()]
    assert cells == ["5.0e-01", "n/a: no rows | none", "n/a: ValueError: first line"]
    assert peers.read_answer(tmp_path, asked["text"], np.zeros((2, 3))) == peers.NO_ANSWER  # each answer is read once
    assert "| n/a: no rows / none |" in peers.table(["case", "peer"], [list(asked), cells])
    assert json.loads((tmp_path / "cases.json").read_text())["text"]["tokens"] == [1, 2]


def test_a_peer_that_did_not_install_says_why(peers, tmp_path):
    assert peers.column(tmp_path, tmp_path, "EasyDeL", {"a": None})[1] == ["n/a: not installed (make parity-peers)"]
    (tmp_path / "failed").write_text("ERROR: No matching distribution found\n")
    assert peers.column(tmp_path, tmp_path, "EasyDeL", {"a": None})[1] == ["n/a: ERROR: No matching distribution found"]
