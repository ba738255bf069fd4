"""Trains a tokenizer of phi-3's construction: SentencePiece BPE with Llama's settings, then phi-3's added tokens."""

import io
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from phijax.errors import UserError
from phijax.text.tokenizer import PHI3_ADDED_TOKENS, Tokenizer

_LONGEST_LINE = 4000  # characters. SentencePiece skips lines of more than _LONGEST_BYTES without an error.
_LONGEST_BYTES = 4 * _LONGEST_LINE + 1
# A line with U+2585 is skipped without an error; U+2581 is SentencePiece's mark for a space, NUL ends its strings.
_RESERVED = str.maketrans({"\u2585": " ", "\u2581": " ", "\0": " "})
_SPECIAL_PIECES = 3 + 256  # <unk>, <s>, </s>, and the bytes


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of `vocab_size` ids, the last eleven of them phi-3's added tokens. The same for the same texts.

    Takes a minute and 1.1 GB for 100 MB of text.
    Raises UserError when `vocab_size` is too large or too small for the text, naming one that is not.
    """
    num_pieces = vocab_size - len(PHI3_ADDED_TOKENS)
    if num_pieces <= _SPECIAL_PIECES:
        raise UserError(
            f"vocab_size={vocab_size} leaves no room: 256 bytes, 3 control pieces and {len(PHI3_ADDED_TOKENS)} added "
            "tokens come first. Take 1000 or more; phi-3 has 32011."
        )
    model, failed = io.BytesIO(), []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_noting(_lines(texts), failed),
            model_writer=model,
            model_type="bpe",
            vocab_size=num_pieces,
            character_coverage=0.99995,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            # Text must come back as it was: no Unicode folding, no lost spaces.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            max_sentence_length=_LONGEST_BYTES,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=4,  # not the machine's number: it is written into the model, whose bytes are the fingerprint
            minloglevel=2,
        )
    except RuntimeError as error:
        if failed:
            raise failed[0] from None
        raise _user_error(str(error), vocab_size) from error
    return Tokenizer(model.getvalue(), where="the trained tokenizer")


def _noting(lines: Iterable[str], failed: list[BaseException]) -> Iterator[str]:
    """`lines`, and in `failed` what ended them: SentencePiece makes a RuntimeError of it, of Ctrl-C too."""
    try:
        yield from lines
    except (Exception, KeyboardInterrupt) as error:
        failed.append(error)
        raise


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines, so that no piece joins a newline with a word: in Llama's vocabulary a newline is a byte of its own."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _LONGEST_LINE):
                yield line[start : start + _LONGEST_LINE].translate(_RESERVED)


def _user_error(message: str, vocab_size: int) -> UserError:
    added = len(PHI3_ADDED_TOKENS)
    if too_high := re.search(r"Vocabulary size too high.*<= (\d+)", message):
        most = int(too_high[1]) + added
        return UserError(
            f"vocab_size={vocab_size} is more than this text has pieces for. Largest that it has: {most}.\n"
            f"Give more text, or --vocab_size={most} or less."
        )
    if too_low := re.search(r"smaller than required_chars\. (\d+) vs (\d+)", message):
        least = int(too_low[2]) + added
        return UserError(
            f"vocab_size={vocab_size} does not hold the characters of this text. Smallest that does: {least}.\n"
            f"Try --vocab_size={least * 2}."
        )
    if "sentences_.empty()" in message:
        return UserError("There is no text to train a tokenizer on.")
    return UserError(f"SentencePiece could not train a tokenizer: {message}")
