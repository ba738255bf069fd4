"""Symbols and stop ids through GGUF: plain text becomes the same tokens, and ends at the same ones."""

import json

import pytest
from gguf_case import LLAMA, PHI3, opened, tokenizer
from gguf_real_texts import TEXTS
from gguf_tokenizer_case import arrays, byte_level, rewritten, trained

from phijax.errors import UserError
from phijax.interchange.facts import Facts
from phijax.interchange.gguf.open import open_gguf
from phijax.interchange.gguf.write import write_gguf
from phijax.text.bpe import BpeTokenizer
from phijax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_gguf(opened(PHI3), tmp_path_factory.mktemp("gguf") / "m.gguf", kind="F32")


SYMBOLS = ("CO2e", "    ", "  ", "he", "<|mark|>")


def llamas_with_symbols(**settings):
    added = dict(tokenizer().added_tokens)
    added |= {name: 380 + n for n, name in enumerate(name for name in SYMBOLS if name != "he")}
    settings = {"symbols": {*SYMBOLS} & added.keys() - {"<|mark|>"}, "strips_right": ()} | settings
    return Tokenizer(tokenizer()._model, added, **settings)


def bytes_with_symbols(flags=()):
    spec = json.loads(byte_level()._spec)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    first = len(spec["model"]["vocab"])
    new = (first + n for n in range(len(SYMBOLS)))
    for name in SYMBOLS:
        i = spec["model"]["vocab"].get(name)
        entry = {"id": next(new) if i is None else i, "content": name, **plain, **dict(flags)}
        spec["added_tokens"].append(entry)
    return BpeTokenizer(json.dumps(spec))


@pytest.mark.parametrize("make", [llamas_with_symbols, bytes_with_symbols])
def test_symbols_come_back(make, tmp_path):
    """Type 4: found in plain text, here as in llama.cpp; what is for control by its name is type 3."""
    mine = make()
    source = opened(LLAMA, tokenizer=lambda: mine)
    path = write_gguf(source, tmp_path / "m.gguf", kind="F32", architecture="llama")
    types, back = arrays(path)["token_type"], open_gguf(path).tokenizer()
    assert [types[i] for i in mine.symbols.ids.values()] == [4] * len(mine.symbols.ids) and len(mine.symbols.ids) > 2
    assert back.symbols == mine.symbols and types[mine.specials.ids["<|mark|>"]] == 3
    for text in (*TEXTS, "5 t CO2e a    year  he\n<|mark|>CO2eCO2e", "     CO2e", "CO2e hello"):
        assert back.encode(text) == mine.encode(text), text
        assert back.encode_with_specials(text + "<|mark|> x") == mine.encode_with_specials(text + "<|mark|> x"), text
    assert mine.symbols.ids["CO2e"] in back.encode("xCO2ex")


def test_transformers_reads_symbols_alike(tmp_path):
    mine = bytes_with_symbols()
    path = write_gguf(opened(LLAMA, tokenizer=lambda: mine), tmp_path / "m.gguf", kind="F32", architecture="llama")
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in ("t CO2e a year hello", "CO2eCO2e\n he"):  # runs of spaces it takes for words
        assert theirs.encode(text, add_special_tokens=False) == mine.encode(text), text


def refused_pieces():
    return trained(user_defined_symbols=["CO2e"])


SYMBOLS_REFUSED = {
    "whole words of pieces": (lambda: llamas_with_symbols(whole_words=["CO2e"]), LLAMA, "only as whole words"),
    "whole words of bytes": (lambda: bytes_with_symbols({"single_word": True}), LLAMA, "only as whole words"),
    "normalized": (lambda: llamas_with_symbols(normalized=["CO2e"]), LLAMA, "the space before them"),
    "strips left": (lambda: llamas_with_symbols(strips_left=["CO2e"]), LLAMA, "the space before them"),
    "strips right": (lambda: llamas_with_symbols(strips_right=["CO2e"]), LLAMA, "swallow the space behind them"),
    "does not, in phi-3": (llamas_with_symbols, PHI3, "keep the space behind them"),
    "of the model itself": (refused_pieces, LLAMA, "takes out whole"),
}


@pytest.mark.parametrize("case", SYMBOLS_REFUSED)
def test_symbols_that_llama_cpp_would_find_elsewhere_are_refused(case, tmp_path):
    make, model, message = SYMBOLS_REFUSED[case]
    architecture = "phi3" if model is PHI3 else "llama"
    with pytest.raises(UserError, match=message):
        write_gguf(opened(model, tokenizer=make), tmp_path / "m.gguf", kind="F32", architecture=architecture)


def test_in_phi3_symbols_swallow_the_space_behind_them(tmp_path):
    """llama.cpp's rule for that name, in both directions."""
    mine = llamas_with_symbols(strips_right=None)
    path = write_gguf(opened(PHI3, tokenizer=lambda: mine), tmp_path / "m.gguf", kind="F32")
    back = open_gguf(path).tokenizer()
    assert back.symbols == mine.symbols and back.encode("x CO2e  y") == mine.encode("x CO2e  y")
    assert back.encode("CO2e\n y") == back.encode("CO2ey")


def test_every_stop_comes_through(written, tmp_path):
    """Plain text ends at each of them: the file's three keys, and a key of ours where they do not do."""
    names = tokenizer().added_tokens
    assistant, end, text = names["<|assistant|>"], names["<|end|>"], names["<|endoftext|>"]
    cases = {
        (end, assistant, text): (text, end, assistant),
        (text,): (text, end, None),
        (end, text): (text, end, None),
        (40, 41): (text, end, 40),
        (assistant, 41, 42, text): (text, end, assistant),
    }
    for number, (stops, (eos, eot, eom)) in enumerate(cases.items()):
        said = []
        source = opened(PHI3, stop_ids=stops, facts=Facts(eos_id=text))
        path = write_gguf(source, tmp_path / f"{number}.gguf", kind="F32", say=said.append)
        got = arrays(path)
        wanted = {"eos_token_id": eos, "eot_token_id": eot, "eom_token_id": eom if eom is not None else text}
        if eom is None and text in (eos, eot):
            wanted.pop("eom_token_id")
        assert {key: got[key] for key in got if key in ("eos_token_id", "eot_token_id", "eom_token_id")} == wanted
        assert set(stops) <= set(open_gguf(path).stop_ids), stops
        assert bool(said) == (not set(stops) <= {eos, eot, eom, text, end}), (stops, said)


def test_stops_that_only_the_names_know(written):
    """A file of others names <|endoftext|> alone; phi-3 answers also end at <|end|> and <|assistant|>."""
    names = tokenizer().added_tokens
    bare = open_gguf(rewritten(written, eot_token_id=None, eom_token_id=None))
    assert set(bare.stop_ids) == {names[name] for name in ("<|endoftext|>", "<|end|>", "<|assistant|>")}
    for key, i in (("eot_token_id", 41), ("eom_token_id", 42)):
        assert i in open_gguf(rewritten(written, **{key: i})).stop_ids
