"""Which chat format a checkpoint's template is; what is none of ours is said to be none."""

import builtins

import pytest
from template_samples import DROPS_SYSTEM, IM, JOINED, SKIPS_EMPTY_SYSTEM, TOOLS

from phijax.errors import UserError
from phijax.text.chat import CHATML, CHATML_PLAIN, FORMATS, PHI3, PHI3_APRIL, PHI3_OLD, PHI4, recognise
from phijax.text.chat_templates import Refused, render_template

pytest.importorskip("jinja2")


# Written in other ways than ours: by joining the role into the token, by variables, with whitespace control.
@pytest.mark.parametrize(
    ("template", "format"),
    [
        (JOINED, PHI3),
        (SKIPS_EMPTY_SYSTEM, PHI3),
        (DROPS_SYSTEM, PHI3_OLD),
        ("{{ bos_token }}" + DROPS_SYSTEM, PHI3_APRIL),
        (TOOLS, PHI4),
    ],
)
def test_templates_written_otherwise(pieces, template, format):
    assert recognise(template, pieces) is format


def test_chatml_by_its_default_system_message(byte_level):
    assert recognise(IM, byte_level) is CHATML_PLAIN
    default = "{% if messages[0].role != 'system' %}{{'<|im_start|>system\n" + CHATML.default_system
    assert recognise(default + "<|im_end|>\n'}}{% endif %}" + IM, byte_level) is CHATML
    other = default.replace("SmolLM", "Nobody")
    assert recognise(other + "<|im_end|>\n'}}{% endif %}" + IM, byte_level) is None


def test_our_own_templates(pieces, byte_level):
    for format in FORMATS:
        tokenizer = byte_level if format in (CHATML, CHATML_PLAIN) else pieces
        assert recognise(format.template, tokenizer) is format
        assert recognise("{# as ours #}" + format.template, tokenizer) is format


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{{ messages[0]['content'] }}",
        JOINED.replace("message['content']", "message['content'] | trim"),
        JOINED.replace("eos_token", "'</s>'"),
        JOINED.replace("'<|end|>\\n'", "'<|end|>'"),
        DROPS_SYSTEM.replace("{% for", "{{ messages[0].content if messages[0].role == 'system' }}{% for", 1),
        "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endfor %}",
        IM,  # its tokens are not in this tokenizer
        "{% if",
        "{{ nothing.at.all }}",
        "{{ raise_exception('no') }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ 'a' * 1000000000 }}",
        "{% for i in range(1000000000) %}a{% endfor %}",
        "{{ 'a' | center(1000000000) }}",
        "x" * 70_000,
    ],
)
def test_all_else_is_none_of_them(pieces, template):
    assert recognise(template, pieces) is None


def test_no_template(pieces):
    assert recognise(None, pieces) is None


def test_without_jinja2_nothing_is_guessed(pieces, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.split(".")[0] == "jinja2":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    assert recognise(PHI3.template, pieces) is PHI3  # word for word ours
    with pytest.raises(UserError, match="needs jinja2"):
        recognise(JOINED, pieces)


def test_whose_turn_it_is_may_be_computed():
    def rendered(template, messages):
        return render_template(template, [(messages, False)], where="a test")[0]

    assert rendered("{% for m in messages %}{{ loop.index0 % 2 }}{% endfor %}", [{}, {}, {}]) == "010"
    for wrong in ("{{ '%9999d' % 1 }}", "{{ 9 ** 9 ** 9 }}", "{{ 1 % 0 }}"):
        assert isinstance(rendered(wrong, [{}]), Refused)
