"""Whether transformers, where it is installed, reads our ids out of a folder that was written."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

from etils import epath

from phijax.errors import UserError
from phijax.text.special_files import CONFIG_FILE
from phijax.text.tokenizer import TextTokenizer

# What tokenizers differ in: whitespace of every kind, beginnings, digits, scripts, joined characters, code, names.
TEXTS = (
    "",
    " ",
    "a",
    " a",
    "  two  spaces   and    more     ",
    "\ttabs\t\t and \n newlines\n\n\n\r\n end \n",
    "line\u2028separator, no\u00a0break, zero\u200bwidth, \ufeffmark",
    "It's they'LL we'Ve I'm",
    "0 12 345 6789 10000000 3.14159 1,000 ½ ² ٣",
    'Hello, world! (Really?) "Yes" - said... [x]{y}<z>/\\|~`@#$%^&*_+=',
    "Größe déjà vu e\u0301 ﬁ ＦＵＬＬ ﷺ",
    "Καλημέρα Привет 你好，世界 こんにちは مرحبا नमस्ते 안녕하세요 สวัสดี",
    "🎉 👨\u200d👩\u200d👧 🇪🇺 👍🏽",
    "def f(x):\n    if x:\n\t\treturn {'a': x ** 2}  # squared\n",
    "\u2581 \u2581a a\u2581 <0x0A> <s> </s> <unk> <|x|> <| |>",
    "\x00\x01\x1b[31m\x7f",
    "x" * 100,
    "the quick brown fox jumps over the lazy dog. " * 8,
)
_NAMES = 12  # of special tokens, and of symbols, that are tried
_SECONDS = 120

# torch is not needed and takes three times as long. Our own process must not lose it, so this is another.
_CHILD = """
import json, sys
for name in ("torch", "tensorflow", "flax", "jax"):
    sys.modules[name] = None
import transformers
texts = json.load(sys.stdin)
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
print(json.dumps({"version": transformers.__version__, "ids": ids}))
"""


def compare(folder: epath.Path, tokenizer: TextTokenizer | None, *, strict: bool, say: Callable[[str], None]) -> str:
    """A sentence for the model card; "" where there is no tokenizer. `tokenizer`: None: one that is not read here.

    Args:
      strict: whether a difference is an error. It is where tokenizer.json was written by us: who uses the folder would
        get other text than the model was trained on. Where it could only be copied, it is a warning.
    Raises: UserError for a difference, with the first text.
    """
    if tokenizer is None:
        copied = (folder / CONFIG_FILE).exists()
        return "Its ids were not compared: phijax does not read its files, which are copied." if copied else ""
    texts = [*TEXTS, *_with_names(tokenizer)]
    try:
        version, theirs = _read(folder, texts)
    except _NotCompared as reason:
        if str(reason):
            say(f"warning: the tokenizer's ids are not compared with those of transformers: {reason}")
        return f"Its ids were not compared with those of transformers{f': {reason}' if str(reason) else ''}."
    ours = [tokenizer.encode_with_specials(text) for text in texts]
    differ = [n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    if not differ:
        return f"Its ids were compared with those of transformers {version} on {len(texts)} texts: equal."
    n = differ[0]
    what = (
        f"transformers {version} reads {len(differ)} of {len(texts)} texts otherwise than phijax; the first, "
        f"{texts[n][:60]!r}, as {theirs[n][:12]}, which here is {ours[n][:12]}"
    )
    if strict:
        raise UserError(
            f"The tokenizer's files would give other ids: {what}.\nNothing was written. --format=phijax and gguf keep "
            "them; another version of transformers may read them rightly."
        )
    say(f"warning: {what}")
    return f"Not equal: {what}."


class _NotCompared(Exception):
    """With the reason; without, where transformers is not installed."""


def _read(folder: epath.Path, texts: Sequence[str]) -> tuple[str, list[list[int]]]:
    """transformers' version and ids. Raises: _NotCompared."""
    if importlib.util.find_spec("transformers") is None:
        raise _NotCompared()
    quiet = {"TRANSFORMERS_VERBOSITY": "critical", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    done = None
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _CHILD, os.fspath(folder)],
            input=json.dumps(texts),
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=_SECONDS,
            env={**os.environ, **quiet, **offline},
        )
        found = json.loads(done.stdout.splitlines()[-1])
        return str(found["version"]), found["ids"]
    except subprocess.TimeoutExpired:
        raise _NotCompared(f"it took more than {_SECONDS} seconds") from None
    except (OSError, ValueError, IndexError) as error:
        last = (done.stderr.strip().splitlines() if done else [])[-1:] or [str(error)]
        raise _NotCompared(f"transformers cannot read them here ({last[0][:200]})") from None


def _with_names(tokenizer: TextTokenizer) -> list[str]:
    texts = []
    for names in (list(tokenizer.specials.ids), list(tokenizer.symbols.ids)):
        some = names if len(names) <= _NAMES else [*names[: _NAMES // 2], *names[-_NAMES // 2 :]]
        texts += [f"{name}\n\n Hi {name}x{name} {name}  y\t{name}" for name in some]
        texts.append("".join(some))
    return texts
