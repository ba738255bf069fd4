"""Chat templates made to take all time or memory are refused by name; known ones are not even tried in the child."""

import pytest
from template_samples import DROPS_SYSTEM, IM, JOINED

from phijax.errors import UserError
from phijax.text import chat_templates
from phijax.text.chat import BOS, FORMATS, PHI3_APRIL, PHI3_OLD, recognise

pytest.importorskip("jinja2")


def nested(text: str, depth: int) -> str:
    return f"{{% set s = '{text}' %}}" + "{% for c in s %}" * depth + "{% endfor %}" * depth


MEMORY = {
    "ljust": "{{ 'a'.ljust(4000000000) }}",
    "ljust of a content": "{{ messages[0].content.rjust(4000000000) | length }}",
    "indent": "{{ messages | tojson(indent=1000000000) }}",
    "doubled": "{% set ns = namespace(a='aaaaaaaaaaaaaaaa') %}" + "{% set ns.a = ns.a ~ ns.a %}" * 40,
    "replaced": "{{ 'aaaa'" + ".replace('a', 'aaaaaaaaaaaaaaaaaaaa')" * 9 + " }}",
    "joined": "{% set a = 'a' * 1 if false else 'aaaaaaaaaaaaaaaaaaaa' %}" + "{% set a = a.join(a) %}" * 7,
}
TIME = {
    "loops": nested("x" * 3000, 4),
    "macro": "{% macro m(n) %}{% if n %}{% set x = m(n[1:]) %}{% set y = m(n[1:]) %}{% endif %}{% endmacro %}{{ m('"
    + "x" * 60
    + "') }}",
}


@pytest.mark.parametrize("template", MEMORY.values(), ids=MEMORY)
def test_memory_without_bound(byte_level, template):
    with pytest.raises(UserError, match=r"template of /models/odd .*stopped: it asked for more than 256 MB"):
        recognise(template, byte_level, where="/models/odd")


@pytest.mark.parametrize("template", TIME.values(), ids=TIME)
def test_time_without_bound(byte_level, template, monkeypatch):
    monkeypatch.setattr(chat_templates, "_SECONDS", 0.1)
    with pytest.raises(UserError, match=r"template of /models/odd .*stopped: it took more than .* processor time"):
        recognise(template, byte_level, where="/models/odd")


@pytest.fixture
def no_child(monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("a child was asked")

    monkeypatch.setattr(chat_templates.limited_child, "ask", refuse)


def test_known_templates_are_rendered_here(pieces, no_child):
    assert recognise(DROPS_SYSTEM, pieces) is PHI3_OLD
    assert recognise(DROPS_SYSTEM.replace("\\n", "\n"), pieces) is PHI3_OLD
    assert recognise(BOS + DROPS_SYSTEM, pieces) is PHI3_APRIL
    with pytest.raises(AssertionError, match="a child"):
        recognise(JOINED, pieces)


def test_our_own_need_no_rendering(pieces, byte_level, no_child):
    for form in FORMATS:
        tokenizer = byte_level if "im_start" in form.template else pieces
        assert recognise(form.template, tokenizer) is form
        if not form.start:  # else there would be two of them
            assert recognise(BOS + form.template, tokenizer)


def test_without_the_tokens_of_any_format_nothing_is_rendered(pieces, no_child):
    class Plain:
        specials = type("Specials", (), {"names": {}, "ids": {}})

    assert recognise(IM, Plain) is None
