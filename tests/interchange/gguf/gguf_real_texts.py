"""Texts that tokenizers have fallen over."""

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Straße, naïve café, Ελληνικά, русский, עברית, العربية, हिन्दी, ไทย, 漢字かなカナ, 한국어",
    "def f(x):\n\treturn {'a': [x, x + 1]}  # code\n\n\nclass A:\n    pass\n",
    "  two   three    four     spaces      ",
    "\ttabs\t\tand\t \tmore",
    "lines\r\nof\r\nDOS\r\n\r\n",
    "🎉 👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b\u00a0\ufeff",
    "12345678 3.14 1,000,000 0x1F",
    "I'll DON'T it's they've 'quoted'",
    "<|user|>\nnames in text<|end|> </s> <s>",
    "\x00\x01\x7f",
    "",
    " ",
    "\n",
]
