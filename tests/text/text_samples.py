"""Texts that tokenizers get wrong: many scripts, code, whitespace of all kinds, names of special tokens."""

import pydoc_data.topics
import random

CHAPTERS = sorted(pydoc_data.topics.topics.values())[:40]

SCRIPTS = "Καλημέρα κόσμε, Привет, 你好，世界, こんにちは, مرحبا, नमस्ते, 안녕하세요, สวัสดี, déjà vu, Größe"

PLAIN = [
    "",
    "a",
    " ",
    "  ",
    "   leading and trailing   ",
    "\ttabs\t\tand   runs   of    spaces",
    "a" + " " * 37 + "b",
    "one\r\ntwo\r\n\r\nthree\n\n\n  four\r",
    "\nstarts with a newline",
    SCRIPTS,
    "emoji 🎉 and joined 👨‍👩‍👧 and flags 🇪🇺, composed é and decomposed é",
    "\ufeffbyte order mark, \x01 and \x1b[31m, line\u2028separator, nbsp\u00a0",
    "ﬁ ligature, ＦＵＬＬ width, ½, 12345678  90",
    "def f(x):\n    if x:\n\t\treturn {'a': x ** 2}  # squared\n",
    "<0x0A> <| |> <|user <user> |>",
    "x" * 300,
]

SPECIAL = [
    "<|user|>\nSYS\nHI<|end|>\n<|assistant|>\n",
    "<|user|>\n\n  Hi there<|end|>  <|assistant|> Yes<|end|><|endoftext|>",
    "<|endoftext|>\nhi<|endoftext|>  two",
    " <|user|>Hi",
    "a <|end|>\u00a0\u2003 b",
    "<|end|>\x1c\x85b",  # \x1c is whitespace to Python, not to Unicode
    "<s> hi</s>\n\nthere <unk> x",
    "<|user|<|user|>>",
    "<|end|><|end|>\n\n<|end|>",
    "<|system|>\r\n\tBe brief.<|end|>\r\n<|placeholder3|>",
]

_ALPHABETS = [(9, 13), (0x20, 0x7E), (0x20, 0x20), (0x80, 0x24F), (0x370, 0x6FF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF)]


def random_text(draw: random.Random, names: tuple[str, ...] = ()) -> str:
    """Up to 40 characters and names, whitespace often."""
    pieces = []
    for _ in range(draw.randint(0, 40)):
        if names and draw.random() < 0.1:
            pieces.append(draw.choice(names))
        elif draw.random() < 0.3:
            pieces.append(draw.choice("  \n\t\r"))
        else:
            pieces.append(chr(draw.randint(*draw.choice(_ALPHABETS))))
    return "".join(pieces)
