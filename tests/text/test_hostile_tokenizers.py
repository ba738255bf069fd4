"""tokenizer.json made to harm: bounds are checked first, and what kills the library is tried apart: a UserError."""

import base64
import copy
import io
import json
import os
import pickle

import pytest
import sentencepiece
from text_samples import CHAPTERS

from phijax.curation import jobs
from phijax.errors import UserError
from phijax.text import tokenizer_bounds, tokenizer_trial
from phijax.text.bpe import BpeTokenizer
from phijax.text.open import open_tokenizer
from phijax.text.sentencepiece_model import charsmap as charsmap_of
from phijax.text.tokenizer import Tokenizer

pytest.importorskip("tokenizers")


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def normalizers(*steps):
    return {"normalizer": {"type": "Sequence", "normalizers": list(steps)}}


def split(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def nest(depth):
    step = {"type": "NFC"}
    for _ in range(depth):
        step = {"type": "Sequence", "normalizers": [step]}
    return {"normalizer": step}


def charsmap(text):
    return base64.b64encode((4).to_bytes(4, "little") + bytes(4) + text.encode() + b"\0").decode()


BOUNDED = {
    "grows": (normalizers(*[replace({"String": "a"}, "a" * 1000)] * 4), "1,000 times as long"),
    "grows by steps": (normalizers(*[replace({"String": "a"}, "aa")] * 30), "128 times as long"),
    "grows between": (normalizers(*[replace({"Regex": "(?=a)"}, "a")] * 30), "128 times as long"),
    "grows by its table": (
        normalizers({"type": "Precompiled", "precompiled_charsmap": charsmap("a" * 50_000)}),
        "50,000 times as long",
    ),
    "puts much before": (normalizers({"type": "Prepend", "prepend": "a" * 5000}), "more than 1,024 characters before"),
    "many steps": (normalizers(*[{"type": "NFC"}] * 100), "more than 64 steps"),
    "deep": (nest(12), "more than 64 steps, or more than 8"),
    "no list": ({"normalizer": {"type": "Sequence", "normalizers": 5}}, "normalizers must be a list"),
    "no step": ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": ["x"]}}, 'an object with "type"'),
    "no text": ({"pre_tokenizer": split(5)}, "a pattern of its pre_tokenizer"),
    "long pattern": ({"pre_tokenizer": split("a" * 70_000)}, "65,536 characters"),
    "added are no list": ({"added_tokens": {"a": 1}}, "added_tokens must be a list"),
    "half a character": (normalizers({"type": "Prepend", "prepend": "\ud800"}), "surrogates not allowed"),
    "added are no objects": ({"added_tokens": ["a"]}, "added_tokens must be a list"),
}
IN_MODEL = {
    "far id": (lambda model: model["vocab"].update(far=10**18), "one has the id 1,000,000"),
    "merges twice": (lambda model: model.update(merges=model["merges"] * 20), "merges; its vocabulary has room for"),
    "merges no list": (lambda model: model.update(merges={"a": 1}), "merges must be a list"),
    "long prefix": (lambda model: model.update(continuing_subword_prefix="#" * 5000), "must be a short text"),
    "unknown no text": (lambda model: model.update(unk_token=["a"]), "unk_token must be a short text"),
}
TRIED = {
    "regex": ({"pre_tokenizer": split("(a+)+$")}, "retry-limit"),
    "regex of others": ({"pre_tokenizer": split("(q+q+)+y")}, "retry-limit"),
    "regex of a normalizer": (normalizers(replace({"Regex": "(a+)+$"}, "")), "retry-limit"),
    "pieces of no length": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "chunk size"),
}


@pytest.fixture
def spec(byte_level_json):
    return json.loads(byte_level_json)


@pytest.mark.parametrize(("change", "message"), [*BOUNDED.values(), *TRIED.values()], ids=[*BOUNDED, *TRIED])
def test_steps(spec, change, message, tmp_path):
    if "pre_tokenizer" in change:  # ids stay those of bytes
        change = {
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [change["pre_tokenizer"], spec["pre_tokenizer"]]}
        }
    (tmp_path / "tokenizer.json").write_text(json.dumps({**spec, **change}))
    with pytest.raises(UserError, match=message) as told:
        open_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(told.value)


@pytest.mark.parametrize(("change", "message"), IN_MODEL.values(), ids=IN_MODEL)
def test_models(spec, change, message):
    change(spec["model"])
    with pytest.raises(UserError, match=message):
        BpeTokenizer(json.dumps(spec), "here.json")


@pytest.mark.parametrize("prefix", ["##", "\u00e9"])
def test_a_prefix_that_merges_do_not_have(spec, prefix):
    """The library cuts the prefix off without looking, and its panic may not unwind."""
    spec["model"]["continuing_subword_prefix"] = prefix
    with pytest.raises(UserError, match=r"here.json .*tried in a process of its own, it fails inside"):
        BpeTokenizer(json.dumps(spec), "here.json")


@pytest.mark.parametrize("death", ["os.abort()", "memory"])
def test_what_ends_the_child_ends_nothing_here(spec, death, monkeypatch, tmp_path):
    """Whatever the library may do: here one that aborts, or takes all there is."""
    (tmp_path / "tokenizers").mkdir()
    act = "import os; os.abort()" if death == "os.abort()" else "return bytearray(1 << 40)"
    library = f"class Tokenizer:\n    @staticmethod\n    def from_str(text):\n        {act}\n"
    (tmp_path / "tokenizers" / "__init__.py").write_text(library)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        tokenizer_trial.limited_child, "_of_process", lambda pid, c=tokenizer_trial.limited_child._Child(): c
    )
    with pytest.raises(UserError, match="SIGABRT" if death == "os.abort()" else "asked for more than 128 MB"):
        tokenizer_trial.require_harmless("{}", {}, "here.json")


def test_a_pattern_that_only_a_text_brings_to_an_end_that_is_none(spec):
    """Characters that no trial knows."""
    steps = [split(r"([\x{0e01}-\x{0e30}]+)+$"), spec["pre_tokenizer"]]
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    tokenizer = BpeTokenizer(json.dumps(spec), "here.json")
    for encode in (tokenizer.encode, tokenizer.encode_with_specials):
        with pytest.raises(UserError, match=r"here.json cannot encode .*retry-limit"):
            encode("\u0e01" * 60 + "!")
        assert encode("a")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "large"])
def test_no_regular_file(byte_level_json, tmp_path, name, kind):
    (tmp_path / "tokenizer.json").write_text(byte_level_json)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(UserError, match=f"{name} (is no regular file|has 1,099,511,627,776 bytes)"):
        open_tokenizer(tmp_path)


def test_many_added_tokens_take_no_time_by_their_square(spec):
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    first = len(spec["model"]["vocab"])
    spec["added_tokens"] += [{"id": first + i, "content": f"<|{i}|>", **entry} for i in range(140_000)]
    with pytest.raises(UserError, match="added tokens; read are up to 131,072"):
        BpeTokenizer(json.dumps(spec), "here.json")


def test_published_kinds_of_steps_are_read(spec):
    marks = normalizers(
        {"type": "Precompiled", "precompiled_charsmap": charsmap("a" * 18)}, replace({"Regex": " {2,}"}, "\u2581")
    )
    tokenizer_bounds.check_spec({**spec, **marks}, "a published kind")
    clip = normalizers(
        {"type": "NFC"}, replace({"Regex": r"\s+"}, " "), replace({"Regex": " {2,}"}, " "), {"type": "Lowercase"}
    )
    llama = normalizers({"type": "Prepend", "prepend": "\u2581"}, replace({"String": " "}, "\u2581"))
    for change in (clip, llama, {"normalizer": {"type": "Sequence", "normalizers": []}}, {"normalizer": None}):
        assert BpeTokenizer(json.dumps(copy.deepcopy(spec) | change)).encode("ab")


def test_pieces_that_grow(tmp_path):
    """SentencePiece's own table of characters, made by its own trainer."""
    rules, out = tmp_path / "rules.tsv", io.BytesIO()
    rules.write_text("61\t" + " ".join(["61"] * 1000) + "\n")
    options = {"vocab_size": 600, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    sentences = "\n".join(CHAPTERS).split("\n")
    for more, growth in (({"normalization_rule_tsv": str(rules)}, 1000), ({"normalization_rule_name": "nmt_nfkc"}, 18)):
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_writer=out, **options, **more)
        assert tokenizer_bounds.charsmap_growth(charsmap_of(out.getvalue())) == growth
        if growth == 18:
            Tokenizer(out.getvalue())
        else:
            with pytest.raises(UserError, match=r"here.model: its normalizer can make a text 1,000 times as long"):
                Tokenizer(out.getvalue(), where="here.model")


@pytest.fixture
def asked(monkeypatch):
    """Requests of the child, from an empty memory of tokenizers."""
    made, real = [], tokenizer_trial.limited_child.ask
    monkeypatch.setattr(tokenizer_trial, "_survived", lambda memory=set(): memory)
    monkeypatch.setattr(
        tokenizer_trial.limited_child, "ask", lambda work, **more: made.append(work) or real(work, **more)
    )
    return made


def test_each_is_tried_once(byte_level_json, asked):
    first = BpeTokenizer(byte_level_json)
    assert BpeTokenizer(byte_level_json).encode("a") == first.encode("a")
    assert asked == ["try_tokenizer"]
    spec = json.loads(byte_level_json)
    spec["model"]["vocab"]["more"] = len(spec["model"]["vocab"])
    BpeTokenizer(json.dumps(spec))
    assert len(asked) == 2


def test_processes_of_ours_know_what_was_tried(byte_level_json, asked):
    """By what they are started with: workers of prepare, and what is pickled to a worker of training."""
    tokenizer = BpeTokenizer(byte_level_json)
    sent, known = pickle.dumps(tokenizer), tokenizer_trial.survived()
    tokenizer_trial._survived().clear()
    assert pickle.loads(sent).encode("a") == tokenizer.encode("a")
    assert len(asked) == 1 and tokenizer_trial.survived() == known


def count_trials(path):
    """What a worker of prepare does with a tokenizer; its counts say how many it knew before."""
    known = len(tokenizer_trial.survived())
    open_tokenizer(path)
    return {"before": known, "after": len(tokenizer_trial.survived())}


def test_workers_of_prepare_begin_with_what_their_parent_tried(byte_level_json, asked, tmp_path):
    folder = tmp_path / "tokenizer"
    BpeTokenizer(byte_level_json).save(folder)
    open_tokenizer(folder)
    tasks = [
        jobs.Task(_write_trials, (folder, tmp_path / str(i)), tmp_path / str(i), tmp_path / f"{i}.done") for i in "ab"
    ]
    counts = [count for _, count in jobs.run(tasks, 2)]
    assert counts == [{"before": 1, "after": 1}] * 2


def _write_trials(folder, output):
    output.write_bytes(b"")
    return count_trials(folder)
