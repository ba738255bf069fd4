"""Byte-level vocabularies, and Llama's from tokenizer.json: ids and text are those of `tokenizers` and transformers."""

import itertools
import json
import pickle
import random

import pytest
from text_samples import CHAPTERS, PLAIN, SCRIPTS, random_text

from phijax.errors import UserError
from phijax.text.bpe import BpeTokenizer
from phijax.text.byte_level import byte_of_character
from phijax.text.open import open_tokenizer
from phijax.text.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

NAMES = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def texts(count=1500, names=NAMES):
    draw = random.Random(1)
    special = [f"{a}user\n  Hi{b}\n{a}" for a in names for b in names]
    return [*PLAIN, *special, *CHAPTERS[:5], *(random_text(draw, names) for _ in range(count))]


def test_ids_and_text_are_those_of_the_tokenizers_package(byte_level, byte_level_json):
    theirs = tokenizers.Tokenizer.from_str(byte_level_json)
    for text in texts():
        ids = byte_level.encode_with_specials(text)
        assert ids == theirs.encode(text).ids, repr(text)
        assert byte_level.decode(ids) == text == theirs.decode(ids, skip_special_tokens=False)


def test_plain_text_never_becomes_a_control_token(byte_level):
    for text in texts():
        ids = byte_level.encode(text)
        assert not set(ids) & set(byte_level.specials.ids.values()), repr(text)
        assert byte_level.decode(ids) == text


def test_where_whole_words_are_tokens_names_are_parted(byte_level_json):
    """With ignore_merges a name that happens to be one word would be taken whole."""
    spec = json.loads(byte_level_json)
    spec["model"]["ignore_merges"] = True
    spec["model"]["vocab"]["stop"] = len(spec["model"]["vocab"])
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": spec["model"]["vocab"]["stop"], "content": "stop"})
    tokenizer = BpeTokenizer(json.dumps(spec))
    control = tokenizer.specials.ids["stop"]
    assert tokenizer.encode_with_specials("stop") == [control]
    for text in ("stop", "a stop", "stopstop\nstop", "stop\n" * 3000):
        assert control not in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_cut_characters_decode_as_transformers_does(byte_level, byte_level_json):
    theirs = tokenizers.Tokenizer.from_str(byte_level_json)
    draw = random.Random(2)
    for _ in range(500):
        ids = [draw.randrange(byte_level.vocab_size) for _ in range(draw.randint(1, 12))]
        assert byte_level.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


def test_the_alphabet_is_gpt2s():
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert byte_of_character() == {character: byte for byte, character in bytes_to_unicode().items()}


def gguf_arrays(byte_level_json):
    spec = json.loads(byte_level_json)
    tokens = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    merges = [" ".join(merge) for merge in spec["model"]["merges"]]
    types = [3 if token in NAMES else 1 for token in tokens]
    return tokens, merges, types


def test_from_gguf_arrays(byte_level, byte_level_json):
    tokens, merges, types = gguf_arrays(byte_level_json)
    tokenizer = BpeTokenizer.from_gguf([*tokens, "[PAD1200]"], merges, [*types, 5], "smollm")
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (byte_level.vocab_size, byte_level.end_of_text)
    for text in texts(500):
        assert tokenizer.encode_with_specials(text) == byte_level.encode_with_specials(text)
        assert tokenizer.encode(text) == byte_level.encode(text)
    assert tokenizer.fingerprint != byte_level.fingerprint
    assert tokenizer.same_ids(byte_level) and byte_level.same_ids(tokenizer)
    # Merges change places, a token is added, another rule cuts: other ids.
    others = [(tokens, [*merges[5:], *merges[:5]], types, "smollm"), (tokens, merges, types, "gpt-2")]
    others.append(([*tokens, "<|more|>"], merges, [*types, 3], "smollm"))
    for arrays in others:
        assert not BpeTokenizer.from_gguf(*arrays).same_ids(byte_level)


def test_what_other_versions_of_the_file_say_otherwise_changes_no_id(byte_level, byte_level_json):
    spec = json.loads(byte_level_json)
    spec["model"]["merges"] = [
        merge.split(" ") if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]
    ]
    spec["post_processor"], spec["model"]["unk_token"] = None, None
    assert BpeTokenizer(json.dumps(spec)).same_ids(byte_level)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("gpt-2", tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)),
        (
            "smollm",
            tokenizers.pre_tokenizers.Sequence(
                [
                    tokenizers.pre_tokenizers.Digits(individual_digits=True),
                    tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            ),
        ),
        ("llama-bpe", None),
        ("qwen2", None),
        ("gpt-4o", None),
    ],
)
def test_texts_are_cut_as_the_models_cut_them(name, theirs):
    if theirs is None:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

        theirs = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), "isolated"),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    spec = {"version": "1.0", "added_tokens": [], "pre_tokenizer": pre_tokenizer(name)}
    spec["model"] = {"type": "BPE", "vocab": {}, "merges": []}
    ours = tokenizers.Tokenizer.from_str(json.dumps(spec)).pre_tokenizer
    for text in [*texts(800), "I'll WE'RE it's 1234567 x2 12  34\n\n\n a", SCRIPTS]:
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text), repr(text)


def test_every_rule_can_be_read():
    assert {"smollm", "gpt-2", "llama-bpe", "default", "qwen2", "gpt-4o", "phi-2"} <= set(PRE_TOKENIZERS)
    for name in PRE_TOKENIZERS:
        spec = {"version": "1.0", "added_tokens": [], "pre_tokenizer": pre_tokenizer(name)}
        spec["model"] = {"type": "BPE", "vocab": {}, "merges": []}
        made = tokenizers.Tokenizer.from_str(json.dumps(spec))
        assert "".join(part for part, _ in made.pre_tokenizer.pre_tokenize_str("a 1,")) == "aĠ1,"


@pytest.mark.slow
def test_the_real_model(smollm2):
    """The model cuts digits apart before all else, as the file says (smollm). transformers' reader of GGUF does not
    know that rule and cuts as GPT-2 does: by that rule ids are equal throughout, by the right one wherever no
    whitespace stands before a number.
    """
    from gguf import GGUFReader

    fields = GGUFReader(smollm2).fields
    tokens, merges, types, pre = (
        fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges", "token_type", "pre")
    )
    tokenizer = BpeTokenizer.from_gguf(tokens, merges, types, pre, str(smollm2))
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (49152, 0)
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    differ = []
    for text in texts(300):
        ids = tokenizer.encode_with_specials(text)
        assert tokenizer.decode(ids) == text
        differ += [text] if ids != theirs(text, add_special_tokens=False)["input_ids"] else []
    for text in differ:
        assert any(a.isspace() and b.isnumeric() for a, b in itertools.pairwise(text)), repr(text)
    gpt2 = BpeTokenizer.from_gguf(tokens, merges, types, "gpt-2", str(smollm2))
    for text in texts(300):
        assert gpt2.encode_with_specials(text) == theirs(text, add_special_tokens=False)["input_ids"]


def test_llamas_vocabulary_without_its_model(pieces, tmp_path):
    """A folder that has only tokenizer.json gives the ids of the SentencePiece model that it was made from."""
    pieces.save_huggingface(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    tokenizer = open_tokenizer(tmp_path)
    assert isinstance(tokenizer, BpeTokenizer) and tokenizer.strips_right == pieces.strips_right
    for text in texts(names=tuple(pieces.specials.ids)):
        ids = pieces.encode_with_specials(text)
        assert tokenizer.encode_with_specials(text) == ids
        assert tokenizer.decode(ids) == pieces.decode(ids)
        assert tokenizer.encode(text) == pieces.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_segment(" x", first=False) == pieces.encode_segment(" x", first=False)


def test_what_we_write_gives_our_ids_in_transformers(byte_level, tmp_path):
    byte_level.save_huggingface(tmp_path, chat_template="x", eos=byte_level.specials.ids["<|im_end|>"])
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 1200}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in texts(300):
        assert theirs(text)["input_ids"] == byte_level.encode_with_specials(text)
    assert (theirs.eos_token, theirs.pad_token, theirs.chat_template) == ("<|im_end|>", "<|endoftext|>", "x")
    assert open_tokenizer(tmp_path).fingerprint == byte_level.fingerprint


def test_saved_opened_and_sent_it_is_the_same(byte_level, byte_level_json, tmp_path):
    byte_level.save(tmp_path)
    for again in (
        open_tokenizer(tmp_path),
        open_tokenizer(tmp_path / "tokenizer.json"),
        pickle.loads(pickle.dumps(byte_level)),
    ):
        assert again.fingerprint == byte_level.fingerprint and again.end_of_text == byte_level.end_of_text
    spec = json.loads(byte_level_json)
    assert BpeTokenizer(json.dumps(spec, indent=3)).fingerprint == byte_level.fingerprint
    spec["model"]["merges"].pop()
    assert BpeTokenizer(json.dumps(spec)).fingerprint != byte_level.fingerprint


def test_an_end_of_text_by_another_name(byte_level_json, tmp_path):
    renamed = byte_level_json.replace("<|endoftext|>", "<|finis|>")
    with pytest.raises(UserError, match="no token that ends a document"):
        BpeTokenizer(renamed)
    tokenizer = BpeTokenizer(renamed, end_of_text="<|finis|>")
    assert tokenizer.end_of_text == 0
    tokenizer.save(tmp_path)
    assert open_tokenizer(tmp_path).end_of_text == 0
    assert pickle.loads(pickle.dumps(tokenizer)).end_of_text == 0


def test_wrong_ids_and_text(byte_level):
    for wrong in (-1, 1200):
        with pytest.raises(ValueError, match="1200 ids"):
            byte_level.decode([wrong])
    for encode in (byte_level.encode, byte_level.encode_with_specials):
        with pytest.raises(ValueError):
            encode("a\ud800b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "holds no model"),
        ("[]", "one object"),
        ('{"model": {"type": "Unigram", "vocab": []}}', "holds a Unigram model"),
        ('{"model": {"type": "BPE", "vocab": {"a": "0"}, "merges": []}}', "whole numbers"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "decoder": {"type": "WordPiece"}}', "WordPiece"),
        (
            '{"model": {"vocab": {"a": 0}, "merges": []}, "decoder": {"type": "ByteLevel"}, "added_tokens": [{}]}',
            r"added_tokens\[0\].id is missing",
        ),
        ('{"model": {"vocab": {"a": 0}, "merges": ["a b"]}, "decoder": {"type": "ByteLevel"}}', "can read"),
    ],
)
def test_what_is_no_such_tokenizer_is_refused(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=message):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(pre="smolm"), "did it mean 'smollm'"),
        (dict(types=[1]), "but 1 token types"),
        (dict(merges=["a"]), "is no pair"),
        (dict(merges=["a b c"]), "is no pair"),
        (dict(merges=["zq qz"]), "can read"),
        (dict(twice=True), "twice"),
    ],
)
def test_damaged_gguf_arrays_are_refused(byte_level_json, change, message):
    tokens, merges, types = gguf_arrays(byte_level_json)
    if change.pop("twice", False):
        tokens[-1] = tokens[-2]
    arrays = dict(tokens=tokens, merges=merges, types=types, pre="smollm") | change
    with pytest.raises(UserError, match=message):
        BpeTokenizer.from_gguf(**arrays)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"neither tokenizer.model nor tokenizer.json"):
        open_tokenizer(tmp_path)
