"""JSON of strangers: what is refused before and after it is parsed, in one form of message, and what is not."""

import os
import re

import pytest
from etils import epath

from phijax.errors import UserError
from phijax.storage import strict_json


def parse(text: str | bytes) -> strict_json.Fields:
    return strict_json.parse(text.encode() if isinstance(text, str) else text, "x.json")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON: Expecting property name"),
        ("[]", "must hold one object of names and values, but holds []"),
        ("3", "but holds 3"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": [-Infinity]}', "-Infinity is no number"),
        ('{"a": 1e400}', "the number 1e400 is too large"),
        ('{"a": 1' + "0" * 400 + "}", "has 401 digits"),
        ('{"a": ' + "9" * 5000 + "}", "has 5,000 digits"),  # more than Python itself takes
        ('{"a": 1, "b": 2, "a": 1}', "'a' stands twice in one object"),
        ('{"a": {"b": [{"c": 1, "c": 2}]}}', "'c' stands twice in one object"),
        ('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", "more than 32 objects and lists inside each other"),
        ("[" * 200_000, "more than 32 objects and lists"),
        ('{"a":' * 33 + "1" + "}" * 33, "more than 32 objects and lists"),
        (b'{"a": "\xff"}', "not JSON in UTF-8: invalid start byte"),
        ('{"a": 1}'.encode("utf-16"), "not JSON in UTF-8"),
        (r'{"a": "\ud83d"}', "not JSON in UTF-8: surrogates not allowed"),
        ('{"a": 1} {"b": 2}', "Extra data"),
        ("", "not JSON"),
    ],
)
def test_what_no_file_of_a_tool_holds_is_refused_by_one_message(text, says):
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        parse(text)
    assert str(caught.value).startswith("x.json ") and len(str(caught.value)) < 200


def test_what_real_files_hold_is_read():
    text = r'{"model_max_length": 1000000000000000019884624838656, "s": "\ud83d\ude00[[[[\"{{", "f": 1e-05, "n": null}'
    values = parse("\ufeff" + text).values
    assert values == {"model_max_length": 1000000000000000019884624838656, "s": '😀[[[["{{', "f": 1e-5, "n": None}
    assert parse('{"a":' * 32 + "1" + "}" * 32).values
    assert parse('{"a": "' + "[" * 1000 + r'\\", "b": "\\\"[' + "[" * 1000 + '"}').values["a"].endswith("\\")


FIELDS = parse(
    '{"i": 3, "f": 0.5, "t": "x", "b": true, "n": null, "l": [1, 2, true], "neg": -1, "big": 2147483648,'
    '"o": {"p": {"q": [1, 2.5, 0]}}, "r": [{"a": 1}, {"a": "1"}, 7], "long": "' + "y" * 500 + '", "s": ["a", 1]}'
)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda f: f.integer("f"), "x.json: f=0.5 must be a whole number from 0 to 2,147,483,647."),
        (lambda f: f.integer("b"), "x.json: b=True must be a whole number from 0 to 2,147,483,647."),
        (lambda f: f.integer("neg"), "x.json: neg=-1 must be"),
        (lambda f: f.integer("big"), "x.json: big=2147483648 must be"),
        (lambda f: f.integer("i", least=4, most=7), "x.json: i=3 must be a whole number from 4 to 7."),
        (lambda f: f.integer("none"), "x.json: none is missing; it must be a whole number"),
        (lambda f: f.integer("n"), "x.json: n is missing"),
        (lambda f: f.number("b"), "x.json: b=True must be a finite number."),
        (lambda f: f.number("neg", above=0), "x.json: neg=-1 must be a finite number above 0."),
        (lambda f: f.number("t"), "x.json: t='x' must be a finite number."),
        (lambda f: f.text("i"), "x.json: i=3 must be text."),
        (lambda f: f.boolean("i"), "x.json: i=3 must be true or false."),
        (lambda f: f.object("l"), "x.json: l=[1, 2, True] must be an object"),
        (lambda f: f.integers("l"), "x.json: l[2]=True must be a whole number"),
        (lambda f: f.integers("t"), "x.json: t='x' must be a list, each a whole number"),
        (lambda f: f.texts("t"), "x.json: t='x' must be a list, each text."),
        (lambda f: f.texts("s"), "x.json: s[1]=1 must be text."),
        (lambda f: f.object("o").object("p").numbers("q", above=0), "x.json: o.p.q[2]=0 must be a finite number above"),
        (lambda f: f.objects("r"), "x.json: r[2]=7 must be an object"),
        (lambda f: f.integer("long"), "x.json: long='" + "y" * 56 + "... must be a whole number"),
        (lambda f: f.only("i", "f"), "x.json: t is not known; there are i, f."),
        (lambda f: parse('{"r": [{}, {"a": "1"}]}').objects("r")[1].integer("a"), "x.json: r[1].a='1' must be a whole"),
        (lambda f: parse(r'{"o": {"\u001b[2J": 1}}').object("o").only("a"), r"x.json: o.'\x1b[2J' is not known"),
    ],
)
def test_a_field_of_another_type_or_range_is_refused_with_its_place(ask, says):
    with pytest.raises(UserError, match=re.escape(says)):
        ask(FIELDS)


def test_fields_are_given_as_they_are_and_defaults_where_there_is_none():
    assert (FIELDS.integer("i"), FIELDS.number("i"), FIELDS.text("t"), FIELDS.boolean("b")) == (3, 3.0, "x", True)
    assert type(FIELDS.number("i")) is float
    assert FIELDS.object("o").object("p").numbers("q") == [1.0, 2.5, 0.0]
    assert FIELDS.integer("none", None) is None and FIELDS.integer("n", 7) == 7
    assert FIELDS.texts("none", []) == [] and FIELDS.objects("none", []) == []
    assert FIELDS.object("none", {}).integer("x", 1) == 1 and FIELDS.object("none", None) is None
    assert not FIELDS.has("n") and FIELDS.has("b")


def test_numbers_from_elsewhere_are_held_too():
    """Of GGUF, whose reader makes its values itself."""
    fields = strict_json.Fields({"a": float("nan"), "b": 10**400, "c": float("inf")}, "x.gguf", "llama")
    for name in "abc":
        with pytest.raises(UserError, match=rf"x.gguf: llama.{name}=.* must be a finite number above 0"):
            fields.number(name, above=0)


def test_pipes_folders_and_large_files_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b" " * 11)
    for path, says in (
        (tmp_path / "pipe", "no regular file"),
        (tmp_path, "no regular file"),
        (epath.Path("/dev/zero"), "no regular file"),
        (tmp_path / "large", "has 11 bytes; a file of its kind is read up to 10"),
        (tmp_path / "none", "cannot be read: No such file"),
    ):
        with pytest.raises(UserError, match=says):
            strict_json.read(path, 10)


def test_a_refusal_of_a_large_value_says_its_beginning_alone():
    fields = parse('{"a": [' + ",".join(["[1]"] * 100_000) + "]}")
    with pytest.raises(UserError) as caught:
        fields.integer("a")
    assert len(str(caught.value)) < 150
