"""GPT-2's alphabet: every byte as one visible character, so that a byte-level vocabulary is a list of strings."""

import functools
from collections.abc import Mapping


@functools.cache
def byte_of_character() -> Mapping[str, int]:
    """Character -> byte, all 256. Printable Latin-1 stands for itself; the other bytes, in order, for U+0100 and up.

    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
    """
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def bytes_of_token(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for.

    A token with a character outside of the alphabet was never made from bytes: it stands for its own UTF-8.
    """
    table = byte_of_character()
    if any(character not in table for character in token):
        return token.encode()
    return bytes(table[character] for character in token)
