"""Ids of text with special tokens are those of transformers, from files that we write and files as others write."""

import json
import pickle
import random

import pytest
import sentencepiece
from etils import epath
from text_samples import CHAPTERS, PLAIN, SPECIAL, random_text

from phijax.errors import UserError
from phijax.interchange.huggingface import export as huggingface_export
from phijax.interchange.huggingface import folder as huggingface_folder
from phijax.interchange.huggingface.families import FAMILIES
from phijax.interchange.open import open_checkpoint
from phijax.text.huggingface_files import sentencepiece_json, take_as_it_is
from phijax.text.open import open_tokenizer
from phijax.text.sentencepiece_model import take_apart
from phijax.text.specials import WHITE_SPACE, Specials
from phijax.text.tokenizer import PHI3_ADDED_TOKENS, Tokenizer

transformers = pytest.importorskip("transformers")


def phi3_folder(tokenizer, folder, *, with_json=True, legacy=False, model_type="phi3", **changes):
    """A folder with the files and settings of phi-3-mini's publication, `changes` in tokenizer_config.json."""
    tokenizer.save(folder)
    (folder / "special_tokens.json").unlink(missing_ok=True)
    flags = {"lstrip": False, "normalized": False, "single_word": False}
    decoder = {
        str(i): {"content": name, "rstrip": name in tokenizer.strips_right, "special": name != "</s>", **flags}
        for name, i in tokenizer.specials.ids.items()
    }
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": decoder,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "legacy": legacy,
        "pad_token": "<|endoftext|>",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": tokenizer.vocab_size}))
    if with_json:
        parts = take_apart((folder / "tokenizer.model").read_bytes())
        spec = sentencepiece_json(parts.pieces, tokenizer.specials, "each")
        (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


def assert_same_ids(ours, theirs, names):
    draw = random.Random(0)
    random_texts = [random_text(draw, tuple(names)) for _ in range(1500)]
    for text in [*PLAIN, *SPECIAL, *CHAPTERS[:5], *random_texts]:
        assert ours.encode_with_specials(text) == theirs(text, add_special_tokens=False)["input_ids"], repr(text)


@pytest.mark.parametrize(
    "settings",
    [dict(with_json=True, legacy=False), dict(with_json=False, legacy=True)],
    ids=["as published", "no json"],
)
def test_ids_are_those_of_transformers_for_a_phi3_folder(pieces, tmp_path, settings):
    """As published: `legacy` false, and tokenizer.json decides. Without that, transformers 5.24 obeys `legacy`."""
    folder = phi3_folder(pieces, tmp_path, **settings)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert_same_ids(open_tokenizer(folder), theirs, pieces.specials.ids)
    assert open_tokenizer(folder).fingerprint == pieces.fingerprint


def test_files_of_phi3_beside_weights_in_llamas_layout(pieces, tmp_path):
    """Copied as they are, transformers gives other ids; with tokenizer.json taken as it is, the same."""
    folder = phi3_folder(pieces, tmp_path, model_type="llama")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs("<|user|>\nHi")["input_ids"] != pieces.encode_with_specials("<|user|>\nHi")
    assert take_as_it_is(folder, None) == ["tokenizer_config.json"] and not take_as_it_is(folder, None)
    assert_same_ids(open_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder), pieces.specials.ids)
    assert open_tokenizer(folder).fingerprint == pieces.fingerprint


@pytest.mark.parametrize("layout", ["phi3", "llama", "mistral"])
def test_a_phi3_folder_exported_in_any_layout_keeps_its_ids(pieces, tmp_path, layout):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    sizes = dict(vocab_size=pieces.vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    nothing = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = transformers.Phi3Config(**sizes, **nothing, num_attention_heads=2, num_key_value_heads=2)
    source = phi3_folder(pieces, tmp_path / "phi3")
    transformers.Phi3ForCausalLM(config).save_pretrained(source)
    opened = open_checkpoint(source)
    written = huggingface_export.folder(opened, FAMILIES[layout], None)
    huggingface_folder.write(opened, epath.Path(tmp_path / "to"), written)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "to")
    assert_same_ids(open_tokenizer(tmp_path / "to"), theirs, pieces.specials.ids)
    assert open_tokenizer(tmp_path / "to").fingerprint == pieces.fingerprint
    config = json.loads((tmp_path / "to" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["sp_model_kwargs"] == {}


@pytest.mark.parametrize("dummy_space", ["always", "first", "never"])
@pytest.mark.parametrize("model_type", ["phi3", "llama"])
def test_other_places_of_the_dummy_space(pieces, tmp_path, dummy_space, model_type):
    """As transformers 5 writes Llama's tokenizers: by a pre-tokenizer that leaves out what begins with a space."""
    model = phi3_folder(pieces, tmp_path / "from") / "tokenizer.model"
    other = Tokenizer(model.read_bytes(), pieces.added_tokens, dummy_space=dummy_space)
    other.save_huggingface(tmp_path / "to")
    (tmp_path / "to" / "config.json").write_text(json.dumps({"model_type": model_type}))
    opened = open_tokenizer(tmp_path / "to")
    assert opened.fingerprint == other.fingerprint != pieces.fingerprint
    assert_same_ids(opened, transformers.AutoTokenizer.from_pretrained(tmp_path / "to"), pieces.specials.ids)


@pytest.mark.parametrize("model_type", ["phi3", "llama", "mistral"])
def test_what_we_write_gives_our_ids_in_transformers(pieces, tmp_path, model_type):
    eos = pieces.added_tokens["<|end|>"]
    pieces.save_huggingface(tmp_path, chat_template="{{ 'a template' }}", eos=eos)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": pieces.vocab_size}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert_same_ids(pieces, theirs, pieces.specials.ids)
    assert theirs("Hi")["input_ids"] == pieces.encode("Hi")  # nothing is put around it
    assert (theirs.eos_token_id, theirs.pad_token_id) == (eos, pieces.end_of_text)
    assert (theirs.bos_token, theirs.unk_token) == ("<s>", "<unk>")
    assert theirs.apply_chat_template([{"role": "user", "content": ""}], tokenize=False) == "a template"
    for text in PLAIN:
        assert theirs.decode(theirs(text)["input_ids"]) == text
    again = open_tokenizer(tmp_path)
    assert again.fingerprint == pieces.fingerprint and again.specials == pieces.specials


def test_chat_md_vector(pieces):
    """The shape of phi-3's ids for this text, as a port of its tokenizer published them: the newlines behind control
    tokens are gone, SYS has its dummy space, the newline inside is a byte.

    [<|user|>, ▁S, YS, <0x0A>, HI, <|end|>, <|assistant|>] there; here the pieces inside words are smaller.
    """
    ids = pieces.encode_with_specials("<|user|>\nSYS\nHI<|end|>\n<|assistant|>\n")
    names = pieces.specials.ids
    assert ids[0] == names["<|user|>"] and ids[-2:] == [names["<|end|>"], names["<|assistant|>"]]
    assert ids[1:-2] == pieces.encode("SYS\nHI") and 3 + 0x0A in ids
    assert b"".join(map(pieces.token_bytes, ids[1:-2])) == b" SYS\nHI"


def test_without_stripping_newlines_stay(pieces, tmp_path):
    tokenizer = Tokenizer(pieces._model, pieces.added_tokens, strips_right=())
    text = "<|user|>\nSYS\nHI<|end|>\n<|assistant|>\n"
    newline = 3 + 0x0A
    assert tokenizer.encode_with_specials(text).count(newline) == 4
    assert pieces.encode_with_specials(text).count(newline) == 1
    folder = phi3_folder(tokenizer, tmp_path)
    assert open_tokenizer(folder).strips_right == frozenset()
    assert_same_ids(open_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder), pieces.specials.ids)


def test_real_tokenizer_of_phi3(shared):
    folder = next((path.parent for path in shared.rglob("tokenizer.model")), None)
    if folder is None:
        pytest.skip("no tokenizer.model of phi-3 is here: its published vector cannot be compared")
    ids = open_tokenizer(folder).encode_with_specials("<|user|>\nSYS\nHI<|end|>\n<|assistant|>\n")
    assert ids == [32010, 317, 21554, 13, 17628, 32007, 32001]


def test_longest_name_wins_and_whitespace_goes():
    specials = Specials({"<a>": 1, "<a><b>": 2, "<b>": 3}, frozenset({"<a>"}), frozenset({"<b>"}))
    assert list(specials.cut("x<a> \t\n y <b><a><b><a>  <b>")) == ["x", 1, "y", 3, 2, 1, 3]
    assert list(specials.parts("<a> <b>")) == [1, " ", 3]
    assert list(specials.cut("")) == [] and list(Specials({}).cut("x")) == ["x"]


def test_white_space_is_that_of_the_tokenizers_package():
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE({"b": 0, "?": 1}, [], unk_token="?"))
    made.add_special_tokens([tokenizers.AddedToken("<a>", rstrip=True)])
    stripped = {c for c in map(chr, range(0x3100)) if made.encode(f"<a>{c}b").ids == [2, 0]}
    assert stripped == set(WHITE_SPACE)


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content))


def test_files_overrule_each_other_in_order(pieces, tmp_path):
    """added_tokens.json, then tokenizer_config.json, then tokenizer.json: name and flags of an id as the last says."""
    n = pieces.vocab_size - 11
    pieces.save(tmp_path)
    write(tmp_path, "added_tokens.json", {"<|endoftext|>": n, "<|first|>": n + 1, "<|two|>": n + 2})
    config = {str(n + 1): {"content": "<|second|>", "rstrip": True}, str(n + 2): {"content": "<|two|>", "rstrip": True}}
    write(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": config})
    opened = open_tokenizer(tmp_path)
    assert list(opened.added_tokens) == ["<|endoftext|>", "<|second|>", "<|two|>"]
    assert opened.strips_right == {"<|second|>", "<|two|>"}
    whole = json.loads((phi3_folder(pieces, tmp_path / "b") / "tokenizer.json").read_text())
    whole["added_tokens"] = [{"id": n + 2, "content": "<|two|>", "rstrip": False}]
    write(tmp_path, "tokenizer.json", whole)
    assert open_tokenizer(tmp_path).strips_right == {"<|second|>"}


def test_llama2_ends_texts_with_its_own_token(pieces, tmp_path):
    """No added tokens and no <|endoftext|>: eos_token says it."""
    pieces.save(tmp_path)
    (tmp_path / "added_tokens.json").unlink()
    write(tmp_path, "tokenizer_config.json", {"eos_token": {"content": "</s>"}, "tokenizer_class": "LlamaTokenizer"})
    opened = open_tokenizer(tmp_path)
    assert (opened.vocab_size, opened.end_of_text, dict(opened.added_tokens)) == (pieces.vocab_size - 11, 2, {})
    assert opened.strips_right == frozenset()
    opened.save(tmp_path / "ours")
    for again in (open_tokenizer(tmp_path / "ours"), pickle.loads(pickle.dumps(opened))):
        assert again.fingerprint == opened.fingerprint and again.end_of_text == 2 and again.specials == opened.specials


def test_saved_by_an_earlier_version_opens_alike(pieces, tmp_path):
    """Two files, tokenizer.model and added_tokens.json, are all there is for a tokenizer used as phi-3's."""
    pieces.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["added_tokens.json", "tokenizer.model"]
    assert Tokenizer.open(tmp_path).specials == pieces.specials
    assert pieces.strips_right == {*PHI3_ADDED_TOKENS, "</s>"} - {"<|endoftext|>"}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder=.* must be an object"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"x": {"content": "<|a|>"}}},
            "an object of ids, not 'x'",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"1489": "<|a|>"}},
            "decoder.1489=.* must be an object",
        ),
        ("tokenizer.json", {"model": {"vocab": {"a": 0}}, "added_tokens": []}, "holds two tokenizers that differ"),
        ("tokenizer.json", [], "must hold one object"),
        ("special_tokens.json", "x", "must hold one object"),
    ],
)
def test_files_that_cannot_be_meant_are_refused(pieces, tmp_path, file, content, message):
    pieces.save(tmp_path)
    write(tmp_path, file, content)
    with pytest.raises(UserError, match=message):
        open_tokenizer(tmp_path)


def trained(folder, **settings):
    settings = {"model_type": "bpe", "byte_fallback": True, **IDENTITY, **settings}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CHAPTERS), model_prefix=str(folder / "m"), vocab_size=1000, minloglevel=2, **settings
    )
    return Tokenizer.open(folder / "m.model")


IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@pytest.mark.parametrize("settings", [dict(byte_fallback=False), dict(add_dummy_prefix=False), {}])
@pytest.mark.parametrize("model_type", ["phi3", "llama"])
def test_models_with_other_settings(tmp_path, settings, model_type):
    """No bytes, no dummy space, pieces that join newlines with words."""
    tokenizer = trained(tmp_path, **settings)
    tokenizer.save_huggingface(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert_same_ids(tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path), tokenizer.specials.ids)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (dict(model_type="unigram"), "unigram"),
        (dict(normalization_rule_name="nmt_nfkc"), "folds"),
        (dict(remove_extra_whitespaces=True), "folds"),
    ],
)
def test_what_transformers_would_encode_otherwise_is_not_written(tmp_path, settings, reason):
    with pytest.raises(UserError, match=reason):
        trained(tmp_path, **settings).save_huggingface(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_token_that_is_none_cannot_end_generation(pieces, tmp_path):
    with pytest.raises(UserError, match="no special token"):
        pieces.save_huggingface(tmp_path, eos=300)
