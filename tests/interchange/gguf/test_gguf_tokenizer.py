"""Tokenizers in GGUF files: written and read they give the same ids, and transformers reads the same from ours."""

import dataclasses

import numpy as np
import pytest
import sentencepiece
from gguf_case import LLAMA, PHI3, opened, tokenizer
from gguf_real_texts import TEXTS
from gguf_tokenizer_case import arrays, byte_level, rewritten, trained

from phijax.errors import UserError
from phijax.interchange.facts import Facts
from phijax.interchange.gguf.open import open_gguf
from phijax.interchange.gguf.write import write_gguf
from phijax.text.pre_tokenizers import PRE_TOKENIZERS
from phijax.text.sentencepiece_model import PieceKind
from phijax.text.tokenizer import PHI3_ADDED_TOKENS

gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

CHAT = "<|system|>\n Be short.<|end|>\n<|user|>\n  Hi \t<|end|>\n<|assistant|>\n\nYes</s> x<|endoftext|> y"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    source = opened(PHI3, chat_template="{{ messages }}")
    return write_gguf(source, tmp_path_factory.mktemp("gguf") / "m.gguf", kind="F32")


def test_arrays_are_those_of_llama_cpps_converter(written):
    mine, got = tokenizer(), arrays(written)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=mine._model)
    count = pieces.get_piece_size()
    assert got["model"] == "llama" and got["pre"] == "default"
    assert got["tokens"][:count] == [pieces.id_to_piece(i) for i in range(count)]
    np.testing.assert_array_equal(got["scores"][:count], [pieces.get_score(i) for i in range(count)])
    assert got["token_type"][:3] == [2, 3, 3] and got["token_type"][3:259] == [6] * 256
    assert set(got["token_type"][259:count]) == {1}
    assert got["tokens"][count:380] == list(PHI3_ADDED_TOKENS)
    assert got["scores"][count:380] == [-1000.0] * 11 and got["token_type"][count:380] == [3] * 11
    assert got["tokens"][380:] == [f"[PAD{i}]" for i in range(380, 400)]
    assert got["scores"][380:] == [-10000.0] * 20 and got["token_type"][380:] == [5] * 20
    names = mine.added_tokens
    end = names["<|endoftext|>"]
    ids = {"bos_token_id": 1, "eos_token_id": end, "unknown_token_id": 0, "padding_token_id": end}
    ids |= {"eot_token_id": names["<|end|>"], "eom_token_id": names["<|assistant|>"]}
    flags = {"add_bos_token": False, "add_eos_token": False, "add_space_prefix": True}
    assert {key: got[key] for key in got if key.endswith("_id") or key.startswith("add_")} == ids | flags
    types = gguf.GGUFReader(written).fields
    assert types["tokenizer.ggml.token_type"].types[1] == gguf.GGUFValueType.INT32
    assert types["tokenizer.ggml.scores"].types[1] == gguf.GGUFValueType.FLOAT32
    assert types["tokenizer.chat_template"].contents() == "{{ messages }}"


@pytest.mark.parametrize("text", TEXTS)
def test_ids_come_back(text, written):
    mine, back = tokenizer(), open_gguf(written).tokenizer()
    assert back.encode(text) == mine.encode(text)
    assert back.decode(mine.encode(text)) == mine.decode(mine.encode(text))


def test_special_tokens_come_back(written):
    read = open_gguf(written)
    mine, back = tokenizer(), read.tokenizer()
    assert back.added_tokens == mine.added_tokens and back.strips_right == mine.strips_right
    assert back.vocab_size == mine.vocab_size == 380 and back.end_of_text == mine.end_of_text
    assert back.encode_with_specials(CHAT) == mine.encode_with_specials(CHAT)
    assert read.chat_template == "{{ messages }}"
    assert set(read.stop_ids) == {mine.added_tokens[name] for name in ("<|endoftext|>", "<|end|>", "<|assistant|>")}


def test_the_tokenizer_of_a_file_is_known_again(written):
    """Another SentencePiece model by its bytes, the same by all that decides ids."""
    mine, back = tokenizer(), open_gguf(written).tokenizer()
    assert back.fingerprint != mine.fingerprint and back.same_ids(mine) and mine.same_ids(back)


def test_the_right_strip_rule_hangs_on_the_models_name(tmp_path):
    """As in llama.cpp: a Llama file's special tokens leave the whitespace behind them alone."""
    path = write_gguf(opened(PHI3), tmp_path / "m.gguf", kind="F32", architecture="llama", name="Something")
    back = open_gguf(path).tokenizer()
    assert back.strips_right == frozenset()
    user = back.added_tokens["<|user|>"]
    assert back.encode_with_specials("<|user|>\nx") == [user, *tokenizer().encode("\nx")]
    assert tokenizer().encode_with_specials("<|user|>\nx") == [user, *tokenizer().encode("x")]


def test_files_of_2024_are_read(written, tmp_path):
    """There <unk> is a control token with score -1000, </s> a user's own symbol, eos <|endoftext|>, eot not named."""
    path = tmp_path / "old.gguf"
    path.write_bytes(written.read_bytes())
    reader = gguf.GGUFReader(path, "r+")
    for key, changed in (("token_type", {0: 3, 1: 3, 2: 4}), ("scores", {0: -1000.0, 1: -1000.0, 2: -1000.0})):
        field = reader.fields[f"tokenizer.ggml.{key}"]
        for i, value in changed.items():
            field.parts[field.data[i]][0] = value
    reader.data.flush()
    mine, read = tokenizer(), open_gguf(path)
    back = read.tokenizer()
    for text in (*TEXTS, "a</s>b<s>c<unk>"):
        assert back.encode(text) == mine.encode(text)
    assert back.encode_with_specials(CHAT) == mine.encode_with_specials(CHAT)
    assert back.unknown == 0 and mine.added_tokens["<|end|>"] in read.stop_ids


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2", "gpt-4o"])
def test_byte_level_ids_come_back(pre, tmp_path):
    mine = byte_level(pre)
    source = opened(PHI3, tokenizer=lambda: mine, facts=Facts(bos_id=1, eos_id=2, pad_id=2))
    path = write_gguf(source, tmp_path / "m.gguf", kind="F32")
    got, read = arrays(path), open_gguf(path)
    assert got["model"] == "gpt2" and got["pre"] == pre and got["merges"][0] == "h e"
    # As llama.cpp's converter: what is for control by its name is no user's own symbol, whatever flagged.
    assert got["token_type"][:3] == [3, 3, 3] and got["token_type"][mine.vocab_size :] == [5] * (400 - mine.vocab_size)
    assert (got["bos_token_id"], got["eos_token_id"], got["eot_token_id"]) == (1, 2, 2)
    back = read.tokenizer()
    for text in TEXTS:
        assert back.encode(text) == mine.encode(text)
        assert back.encode_with_specials(text + CHAT) == mine.encode_with_specials(text + CHAT)
    assert back.end_of_text == 0 and set(read.stop_ids) == {0, 2} and back.vocab_size == mine.vocab_size


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        ([{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}], "smollm"),
        ([{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}], "gpt-2"),
        ([{"type": "ByteLevel", "use_regex": False}], None),
        ([{"type": "ByteLevel", "use_regex": True, "add_prefix_space": True}], None),
        ([{"type": "Whitespace"}, {"type": "ByteLevel"}], None),
    ],
)
def test_rules_of_published_files_have_names(pre_tokenizer, name, tmp_path):
    """SmolLM2's and GPT-2's tokenizer.json write their rules in other words than ours."""
    whole = [step | {"trim_offsets": True} if step["type"] == "ByteLevel" else step for step in pre_tokenizer]
    whole = [{"add_prefix_space": False} | step if step["type"] == "ByteLevel" else step for step in whole]
    mine = byte_level(pre_tokenizer={"type": "Sequence", "pretokenizers": whole})
    source = opened(PHI3, tokenizer=lambda: mine)
    if name is None:
        with pytest.raises(UserError, match="a rule that has no name"):
            write_gguf(source, tmp_path / "m.gguf", kind="F32")
        return
    path = write_gguf(source, tmp_path / "m.gguf", kind="F32")
    assert PRE_TOKENIZERS[arrays(path)["pre"]] == PRE_TOKENIZERS[name]
    back = open_gguf(path).tokenizer()
    for text in TEXTS:
        assert back.encode(text) == mine.encode(text)


REFUSED = {
    "unigram": (lambda: trained(model_type="unigram", vocab_size=330), "is no BPE model"),
    "no bytes": (lambda: trained(byte_fallback=False, vocab_size=110), "has no pieces for bytes"),
    "folded": (lambda: trained(normalization_rule_name="nmt_nfkc"), "rewrites text"),
    "spaces removed": (lambda: trained(remove_extra_whitespaces=True), "rewrites text"),
    "normalizer": (lambda: byte_level(normalizer={"type": "NFC"}), "a normalizer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(case, tmp_path):
    made, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        write_gguf(opened(PHI3, tokenizer=made), tmp_path / "m.gguf", kind="F32")
    assert list(tmp_path.iterdir()) == []


def test_no_dummy_space_comes_back(tmp_path):
    mine = trained(add_dummy_prefix=False)
    path = write_gguf(opened(PHI3, tokenizer=lambda: mine), tmp_path / "m.gguf", kind="F32")
    assert arrays(path)["add_space_prefix"] is False
    for text in TEXTS:
        assert open_gguf(path).tokenizer().encode(text) == mine.encode(text)


DAMAGED = {
    "none": ({"model": None}, "has no tokenizer"),
    "another kind": ({"model": "t5"}, "of kind 't5'"),
    "no tokens": ({"tokens": None}, "has no tokenizer.ggml.tokens"),
    "no scores": ({"scores": None}, "tokenizer.ggml.scores"),
    "few types": ({"token_type": [1, 2]}, "tokenizer.ggml.token_type"),
    "a type of none": ({"token_type": [2, 3, 3] + [9] * 397}, "holds 9"),
    "unknown elsewhere": ({"unknown_token_id": 4000}, "unknown_token_id=4000"),
    "all control": ({"token_type": [3] * 400}, "unknown_token_id=0 is none of its 0 pieces"),
    "all alike": ({"tokens": ["a"] * 400}, "not a SentencePiece model"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_tokenizers_are_refused_when_asked_for(case, written):
    changed, message = DAMAGED[case]
    read = open_gguf(rewritten(written, **changed))
    with pytest.raises(UserError, match=message):
        read.tokenizer()


def test_whether_bos_goes_in_front_is_kept(written, tmp_path):
    """llama.cpp's rule: before SentencePiece's ids it does, where a file does not say."""
    assert open_gguf(written).begin == ()
    silent = open_gguf(rewritten(written, add_bos_token=None))
    assert silent.begin == (1,)
    again = write_gguf(silent, tmp_path / "m.gguf", kind="F32")
    assert arrays(again)["add_bos_token"] is True and open_gguf(again).begin == (1,)


def test_texts_that_begin_with_end_of_text_say_so(tmp_path):
    end = tokenizer().end_of_text
    path = write_gguf(dataclasses.replace(opened(PHI3), begin=(end,)), tmp_path / "m.gguf", kind="F32")
    assert (arrays(path)["bos_token_id"], arrays(path)["add_bos_token"]) == (end, True)
    assert open_gguf(path).begin == (end,)
    with pytest.raises(UserError, match="begin with 2 tokens"):
        write_gguf(dataclasses.replace(opened(PHI3), begin=(1, end)), tmp_path / "other.gguf", kind="F32")


def test_ids_that_are_no_tokens_are_refused(written):
    with pytest.raises(UserError, match=r"tokenizer.ggml.eos_token_id=400 is the id of no token; it has 400 tokens"):
        open_gguf(rewritten(written, eos_token_id=400))


@pytest.mark.parametrize("key", ["bos", "padding", "eom"])
@pytest.mark.parametrize("value, kind", [(400, "UINT32"), ("x", "STRING"), (1.5, "FLOAT32"), (True, "BOOL")])
def test_every_id_that_is_named_is_a_tokens(written, key, value, kind):
    name = f"{key}_token_id"
    path = rewritten(written, kinds={name: kind}, **{name: value})
    with pytest.raises(UserError, match=rf"{name}={value!r} is the id of no token"):
        open_gguf(path)


@pytest.mark.parametrize("none, kind", [(-1, "INT32"), (0xFFFFFFFF, "UINT32")])
def test_minus_one_is_no_id(written, none, kind):
    """As an unsigned number too: so writers say that a model has none."""
    names = [f"{key}_token_id" for key in ("bos", "eos", "padding")]
    facts = open_gguf(rewritten(written, kinds=dict.fromkeys(names, kind), **dict.fromkeys(names, none))).facts
    assert (facts.bos_id, facts.eos_id, facts.pad_id) == (None, None, None)


transformers = pytest.importorskip("transformers")


def test_transformers_reads_the_same_ids(written):
    theirs = transformers.AutoTokenizer.from_pretrained(written.parent, gguf_file=written.name)
    mine = tokenizer()
    for text in TEXTS:
        if "<|user|>" not in text:  # to transformers the names of special tokens are those tokens, wherever they stand
            assert theirs.encode(text, add_special_tokens=False) == mine.encode(text), text
    assert theirs.eos_token == "<|endoftext|>" and theirs.chat_template == "{{ messages }}"
    assert theirs.convert_tokens_to_ids("<|end|>") == mine.added_tokens["<|end|>"]


def test_transformers_reads_the_same_ids_of_bytes(tmp_path):
    mine = byte_level()
    path = write_gguf(opened(LLAMA, tokenizer=lambda: mine), tmp_path / "m.gguf", kind="F32", architecture="llama")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in TEXTS:
        if not any(letter.isdigit() for letter in text):  # transformers does not know smollm's rule for digits
            assert theirs.encode(text, add_special_tokens=False) == mine.encode(text), text


def test_types_have_the_same_numbers_as_gguf():
    for kind in PieceKind:
        assert gguf.TokenType[kind.name] == kind
    assert dataclasses.is_dataclass(PHI3)
