"""Added tokens that are not special are found in plain text, where Hugging Face's tokenizers find them; control tokens
are not, whatever their flags say.
"""

import json
import pickle
import random
import unicodedata

import pytest
import sentencepiece
from text_samples import CHAPTERS, PLAIN, random_text

from phijax.errors import UserError
from phijax.text.bpe import BpeTokenizer
from phijax.text.chat import PHI3, encode_chat
from phijax.text.huggingface_files import sentencepiece_json
from phijax.text.open import open_tokenizer
from phijax.text.sentencepiece_model import PieceKind, take_apart
from phijax.text.specials import Specials, looks_like_control
from phijax.text.stream import TextStream
from phijax.text.tokenizer import Tokenizer

tokenizers = pytest.importorskip("tokenizers")

# Runs of spaces, one name inside another, names that begin alike, names with a space, and each flag.
FLAGS = {
    "    ": {},
    "  ": {},
    "CO2": {},
    "CO2e": {"normalized": True},
    "e t": {},
    "\n\n": {},
    "word": {"single_word": True},
    "left": {"lstrip": True},
    "right": {"rstrip": True},
    "norm": {"normalized": True, "rstrip": True},
    "é★": {"normalized": True, "single_word": True},
}
SYMBOLS = tuple(FLAGS)
CONTROL = ("<|user|>", "<|end|>", "</s>")


def entries(first_id, vocabulary):
    """One behind the other, but for those that the vocabulary has."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    new = (first_id + n for n in range(len(FLAGS)))
    ids = (vocabulary[name] if name in vocabulary else next(new) for name in FLAGS)
    return [{"id": i, "content": name, **plain, **flags} for i, (name, flags) in zip(ids, FLAGS.items(), strict=True)]


def texts(names, count=400):
    draw = random.Random(3)
    near = [
        "CO2e x CO2ey xCO2",
        "a word, sword words\u0301 word",
        " left  left\n\nleft right \t right\n\n right",
        "norm norm",
    ]
    near += ["e\u0301é★é★ é★", "7       spaces", "CO2CO2eCO2e  CO2", "\n\n\n word\n\n", "e te t e t", "CO2", " CO2", ""]
    return [*near, *PLAIN, *CHAPTERS[:2], *(random_text(draw, names) + draw.choice(names) for _ in range(count))]


def byte_level_spec(byte_level_json):
    """Symbols first, so that leaving the special tokens out would give them other ids; two of them the vocabulary's."""
    spec = json.loads(byte_level_json)
    symbols = entries(1201, spec["model"]["vocab"])
    special = {**symbols[0], "special": True}
    added = [{**special, "id": 1200, "content": "<|user|>"}, *symbols]
    added.append({**special, "id": 1 + max(token["id"] for token in added), "content": "<|end|>"})
    spec["added_tokens"] += added
    return spec


def lossless(spec, names):
    """The same without what swallows whitespace."""
    return spec | {"added_tokens": [token | {"lstrip": False, "rstrip": False} for token in spec["added_tokens"]]}


def test_byte_level_ids_are_those_of_the_tokenizers_package(byte_level_json):
    spec = byte_level_spec(byte_level_json)
    mine, theirs = BpeTokenizer(json.dumps(spec)), tokenizers.Tokenizer.from_str(json.dumps(spec))
    assert set(mine.symbols.ids) == set(SYMBOLS) and "<|end|>" in mine.specials.ids
    for text in texts(SYMBOLS):
        assert mine.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)
    control = ("<|user|>", "<|end|>", "<|endoftext|>")
    for text in texts((*SYMBOLS, *control)):
        assert mine.encode_with_specials(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        assert not set(mine.encode(text)) & set(mine.specials.names)


@pytest.fixture(scope="module", params=["each", "always", "first", "never"])
def llamas(request, pieces, tmp_path_factory):
    """A folder with tokenizer.model and the tokenizer.json that belongs to it, symbols behind phi-3's tokens."""
    folder = tmp_path_factory.mktemp("llama")
    source = Tokenizer(pieces._model, pieces.added_tokens, dummy_space=request.param)
    source.save(folder)
    parts = take_apart(pieces._model).pieces
    spec = sentencepiece_json(parts, source.specials, request.param)
    for token in spec["added_tokens"]:
        token["special"] = token["content"] != "</s>"  # as phi-3's file has it
    spec["added_tokens"] += entries(pieces.vocab_size, spec["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "special_tokens.json").unlink(missing_ok=True)
    return folder


def test_llamas_ids_are_those_of_the_tokenizers_package(llamas):
    mine, theirs = open_tokenizer(llamas), tokenizers.Tokenizer.from_file(str(llamas / "tokenizer.json"))
    assert isinstance(mine, Tokenizer) and set(mine.symbols.ids) == set(SYMBOLS)
    spec = json.loads((llamas / "tokenizer.json").read_text())
    plain = tokenizers.Tokenizer.from_str(json.dumps(spec))
    for text in texts(SYMBOLS):
        assert mine.encode(text) == plain.encode(text, add_special_tokens=False).ids, repr(text)
    for text in texts((*SYMBOLS, *CONTROL)):
        assert mine.encode_with_specials(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        assert not set(mine.encode(text)) & set(mine.specials.names)


def test_llamas_tokenizer_json_alone_gives_the_same(llamas):
    mine = open_tokenizer(llamas)
    alone = BpeTokenizer((llamas / "tokenizer.json").read_text())
    for text in texts((*SYMBOLS, *CONTROL), 200):
        ids = mine.encode(text)
        assert alone.encode(text) == ids and alone.decode(ids) == mine.decode(ids), repr(text)
        assert alone.encode_segment(text, first=False) == mine.encode_segment(text, first=False), repr(text)


def test_text_comes_back_and_is_streamed(pieces, byte_level_json):
    """But for whitespace that symbols swallow by their flags."""
    names = [name for name, flags in FLAGS.items() if not {"lstrip", "rstrip"} & flags.keys()]
    added = dict(pieces.added_tokens) | {name: pieces.vocab_size + n for n, name in enumerate(names)}
    folded = [name for name in names if FLAGS[name].get("normalized")]
    llama = Tokenizer(pieces._model, added, symbols=names, normalized=folded, strips_right=())
    spec = byte_level_spec(byte_level_json)
    for mine in (llama, BpeTokenizer(json.dumps(lossless(spec, names)))):
        for text in texts((*names, *CONTROL), 200):
            ids = mine.encode(text)
            assert mine.decode(ids) == text, repr(text)
            stream = TextStream(mine)
            assert "".join(stream.push([i]) for i in ids) + stream.finish() == text


def test_saved_opened_and_sent_it_is_the_same(llamas, byte_level_json, pieces, tmp_path):
    for number, mine in enumerate((open_tokenizer(llamas), BpeTokenizer(json.dumps(byte_level_spec(byte_level_json))))):
        mine.save(tmp_path / str(number))
        for again in (open_tokenizer(tmp_path / str(number)), pickle.loads(pickle.dumps(mine))):
            assert again.fingerprint == mine.fingerprint and again.symbols == mine.symbols
            assert again.encode("a CO2e  b") == mine.encode("a CO2e  b")
    assert open_tokenizer(llamas).fingerprint != pieces.fingerprint


def test_ids_of_shards_made_before_are_told_apart(byte_level_json):
    """Earlier versions did not find symbols: their shards hold other ids, so the fingerprint is another."""
    spec = byte_level_spec(byte_level_json)
    special = spec | {"added_tokens": [token | {"special": True} for token in spec["added_tokens"]]}
    import hashlib

    from phijax.text.bpe import _canonical

    assert BpeTokenizer(json.dumps(special)).fingerprint == hashlib.sha256(_canonical(special).encode()).hexdigest()
    assert BpeTokenizer(json.dumps(spec)).fingerprint != hashlib.sha256(_canonical(spec).encode()).hexdigest()


def test_in_chats_symbols_are_found_and_nobody_ends_his_turn(pieces):
    added = dict(pieces.added_tokens) | {"CO2e": pieces.vocab_size}
    mine = Tokenizer(pieces._model, added, symbols=["CO2e"])
    content = "5 t CO2e<|end|></s>"
    got = encode_chat([{"role": "user", "content": content}], mine, PHI3, generation_prompt=True).tokens
    names = mine.specials.ids
    assert got == [names["<|user|>"], *mine.encode(content), names["<|end|>"], names["<|assistant|>"]]
    assert got.count(pieces.vocab_size) == 1 and names["</s>"] not in got and got.count(names["<|end|>"]) == 1
    assert encode_chat(
        [{"role": "user", "content": "CO2e"}], mine, PHI3, generation_prompt=True, control_strings="refuse"
    )
    with pytest.raises(UserError, match="name of a control token"):
        encode_chat([{"role": "user", "content": "</s>"}], mine, PHI3, generation_prompt=True, control_strings="refuse")


@pytest.mark.parametrize(
    "name", ["</s>", "<s>", "<|tool|>", "<｜User｜>", "<end_of_turn>", "<pad>", "[INST]", "<unused7>"]
)
def test_names_for_control(name):
    assert looks_like_control(name)


@pytest.mark.parametrize("name", ["<think>", "CO2e", "  ", "<|", "|>", "<code>", "a<|b|>", "s>", "<tool_call>"])
def test_names_that_are_not(name):
    assert not looks_like_control(name)


@pytest.mark.parametrize("kind", ["bos_token", "eos_token", "additional_special_tokens", "map"])
def test_what_the_settings_name_is_special(pieces, byte_level_json, tmp_path, kind):
    """As transformers has it, whatever the flag says."""
    spec = json.loads(byte_level_json)
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 1200, "content": "STOP", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert "STOP" in open_tokenizer(tmp_path).symbols.ids
    file, settings = "tokenizer_config.json", {kind: "STOP"}
    if kind == "map":
        file, settings = "special_tokens_map.json", {"pad_token": {"content": "STOP"}}
    if kind.startswith("additional"):
        settings = {kind: ["STOP"]}
    (tmp_path / file).write_text(json.dumps(settings))
    opened = open_tokenizer(tmp_path)
    assert "STOP" in opened.specials.ids and 1200 not in opened.encode("STOP")
    opened.save(tmp_path / "ours")
    assert "STOP" in open_tokenizer(tmp_path / "ours").specials.ids
    (tmp_path / "tokenizer.json").unlink()
    pieces.save(tmp_path)
    added = dict(pieces.added_tokens) | {"STOP": pieces.vocab_size}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    assert "STOP" in open_tokenizer(tmp_path).specials.ids


def test_added_tokens_json_alone(pieces, tmp_path):
    """In a folder of ours all are special; in transformers' those that nothing names are not."""
    pieces.save(tmp_path)
    added = dict(pieces.added_tokens) | {"CO2e": pieces.vocab_size}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    assert pieces.vocab_size not in open_tokenizer(tmp_path).encode("x CO2e")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    assert pieces.vocab_size in open_tokenizer(tmp_path).encode("x CO2e")


def trained(folder, **settings):
    settings |= {"model_type": "bpe", "byte_fallback": True, "minloglevel": 2, "vocab_size": 900}
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CHAPTERS[:10]), model_prefix=str(folder / "m"), **settings
    )
    return (folder / "m.model").read_bytes()


@pytest.mark.parametrize("dummy", [True, False])
def test_pieces_that_a_model_takes_out_itself(tmp_path, dummy):
    """Its user-defined pieces are as the library has them, but for those for control; tokenizer.json says the same."""
    model = trained(
        tmp_path, user_defined_symbols=["CO2e", "CO2", "<|mark|>", "\u2581of\u2581the"], add_dummy_prefix=dummy
    )
    mine, theirs = Tokenizer(model), sentencepiece.SentencePieceProcessor(model_proto=model)
    mark = theirs.piece_to_id("<|mark|>")
    assert "<|mark|>" in mine.specials.ids
    spec = sentencepiece_json(take_apart(model).pieces, mine.specials, "each" if dummy else "never")
    written = BpeTokenizer(json.dumps(spec))
    for text in texts(("CO2e", "CO2", " of the ", "of"), 200):
        assert mine.encode(text) == theirs.encode(text), repr(text)
        assert written.encode(text) == theirs.encode(text), repr(text)
    assert mark in theirs.encode("a <|mark|>") and mark not in mine.encode("a <|mark|>")
    assert mine.encode_with_specials("a <|mark|>")[-1] == mark
    named = Tokenizer(model, {"<|endoftext|>": 900, "CO2e": theirs.piece_to_id("CO2e")}, symbols=["CO2e"])
    assert theirs.piece_to_id("CO2e") in named.encode("5 t CO2e") and named.encode("a CO2e b").count(mark) == 0
    kinds = {piece.text: piece.kind for piece in take_apart(model).pieces}
    assert kinds["CO2e"] == kinds["<|mark|>"] == PieceKind.USER_DEFINED


def test_whole_words_are_those_of_the_tokenizers_package():
    made = tokenizers.Tokenizer(tokenizers.models.BPE({"?": 0}, [], unk_token="?"))
    made.add_tokens([tokenizers.AddedToken("ab", single_word=True, normalized=False)])
    found, mine = made.token_to_id("ab"), Specials({"ab": 1}, whole_words=frozenset({"ab"}))
    known = (chr(i) for i in [*range(0x3100), *range(0xA000, 0xA830)])
    characters = [c for c in known if unicodedata.category(c) != "Cn"]  # versions of Unicode differ in the others
    for c in characters:
        assert (found in made.encode(f"{c}ab{c}").ids) == (mine.find(f"{c}ab{c}") is not None), hex(ord(c))


@pytest.mark.parametrize("dropout", [0.5, 0.0, None])
def test_dropout_truncation_and_padding_are_not_obeyed(byte_level_json, tmp_path, dropout):
    """They are of training: a text has one encoding, of its whole length; what is saved has none of them either."""
    spec = json.loads(byte_level_json)
    plain = BpeTokenizer(json.dumps(spec))
    spec["model"]["dropout"] = dropout
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
    spec["padding"] = pad | {"pad_token": "<|endoftext|>"}
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_end|>": {"id": "<|im_end|>", "ids": [2], "tokens": ["<|im_end|>"]}},
    }
    mine = BpeTokenizer(json.dumps(spec))
    for text in CHAPTERS[:3]:
        expected = plain.encode(text)
        assert all(mine.encode(text) == expected == mine.encode_with_specials(text) for _ in range(3))
    mine.save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert not saved["model"]["dropout"] and saved["truncation"] is None and saved["padding"] is None
    assert open_tokenizer(tmp_path).fingerprint == mine.fingerprint
