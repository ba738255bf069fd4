"""What phijax generate refuses, and how it reads prompts, before a model is opened."""

import pytest

from phijax import generate
from phijax.errors import UserError


def prompts(*arguments: str) -> list[str]:
    generate.FLAGS.unparse_flags()
    rest = generate.FLAGS(["generate", "--checkpoint=x", *arguments])
    return generate._check(rest[1:])


def test_a_prompt_a_line(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('"a\u2028b"\n\n{"prompt": "c\\nd"}\r\n\n', newline="")  # U+2028 ends no line of JSON
    assert prompts("--prompt=first", f"--prompt_file={file}") == ["first", "a\u2028b", "c\nd"]
    text = tmp_path / "prompt.txt"
    text.write_text("one\ntwo\n")
    assert prompts(f"--prompt_file={text}") == ["one\ntwo\n"]
    assert prompts() == [""]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompt"),
        ('"a"\n[1]\n', r"prompts.jsonl:2: a string, or an object"),
        ('"a"\n\n{\n', r"prompts.jsonl:3 is not JSON"),
        ('"a\\ud800"\n', "prompts.jsonl:1 is not JSON in UTF-8"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path, content, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        prompts(f"--prompt_file={file}")


@pytest.mark.parametrize("flag", ["--prompt=a\udcff", "--stop=\udcff", "--chat --message=\udcff"])
def test_bytes_that_are_no_utf8_are_refused(flag):
    with pytest.raises(UserError, match="is no text in UTF-8"):
        prompts(*flag.split(" "))
