"""GGUF files that are damaged or hostile: one clear message, within a second, in little memory."""

import struct
import time
import tracemalloc

import numpy as np
import pytest
from gguf_case import ARRAY, F32, LONG, Q4_0, STRING, gguf, key, opened, tensor, text

from phijax.errors import UserError
from phijax.interchange.gguf.file import read_file
from phijax.interchange.gguf.write import write_gguf
from phijax.interchange.open import open_checkpoint

pytest.importorskip("gguf")

HUGE = (1 << 64) - 1


def array(name: str, kind: int, count: int, items: bytes = b"") -> bytes:
    return text(name) + struct.pack("<IIQ", ARRAY, kind, count) + items


NESTED = array("a", ARRAY, 1, struct.pack("<IQ", ARRAY, 1) * 1000)

HOSTILE = {
    "nothing": (b"", "0 bytes"),
    "too short": (b"GGUF", "4 bytes"),
    "another format": (gguf(magic=b"PK\3\4"), "does not begin with GGUF"),
    "version of the future": (gguf(version=4), "version 0x4"),
    "version 1": (gguf(version=1), "version 0x1"),
    "big-endian": (gguf(version=3 << 24), "big-endian"),
    "tensors past all": (gguf(counts=(HUGE, 0)), f"counts {HUGE} tensors"),
    "keys past all": (gguf(counts=(0, HUGE)), f"counts {HUGE} keys"),
    "more keys than there are": (gguf([key("a", "u32", 1)], counts=(0, 60000)), "is no name"),
    "more tensors than there are": (gguf(tensors=[tensor("a", [1])], counts=(60000, 0)), "past the end of the file"),
    "a key of any length": (gguf([struct.pack("<Q", HUGE)], counts=(0, 1)), "a key is said to be"),
    "a text past the end": (gguf([text("a") + struct.pack("<IQ", STRING, 1 << 40)]), "is said to be"),
    "a key that is no text": (gguf([key(b"\xff\xfe", "u32", 1)]), "not UTF-8"),
    "a value that is no text": (gguf([key("a", "str", b"\xc3")]), "not UTF-8"),
    "a key with control characters": (gguf([key("a\x1b[2J", "u32", 1)]), "is no name"),
    "one key twice": (gguf([key("a", "u32", 1), key("a", "u32", 2)]), "'a' is there twice"),
    "a value of no type": (gguf([text("a") + struct.pack("<II", 77, 0)]), "type 77"),
    "numbers past the end": (gguf([array("a", 4, HUGE // 4)]), "past the end of the file"),
    "texts past the end": (gguf([array("a", STRING, 1 << 19)], data=b"\0" * 64), "524288 texts"),
    "texts without end": (gguf([array("a", STRING, HUGE)]), f"{HUGE} texts"),
    "arrays in arrays": (gguf([NESTED]), "array of arrays"),
    "values of no type": (gguf([array("a", 99, 1, b"\0")]), "type 99"),
    "alignment zero": (gguf([key("general.alignment", "u32", 0)]), "general.alignment=0"),
    "alignment of no power": (gguf([key("general.alignment", "u32", 48)]), "general.alignment=48"),
    "alignment without bound": (gguf([key("general.alignment", "u32", 1 << 31)]), "general.alignment"),
    "alignment as text": (gguf([key("general.alignment", "str", "32")]), "general.alignment='32'"),
    "a name that climbs": (gguf(tensors=[tensor("../../etc/passwd", [1])], data=b"\0" * 32), "is no name of a tensor"),
    "a name with dots": (gguf(tensors=[tensor("blk..weight", [1])], data=b"\0" * 32), "is no name of a tensor"),
    "a name with control characters": (gguf(tensors=[tensor("a\nb", [1])], data=b"\0" * 32), "is no name of a tensor"),
    "a name without end": (gguf(tensors=[tensor("a" * 65, [1])], data=b"\0" * 32), "65 bytes long"),
    "no name": (gguf(tensors=[tensor("", [1])], data=b"\0" * 32), "is no name of a tensor"),
    "no dimension": (gguf(tensors=[tensor("a", [])]), "0 dimensions"),
    "many dimensions": (gguf(tensors=[text("a") + struct.pack("<I", 1 << 31)]), "2147483648 dimensions"),
    "an empty dimension": (gguf(tensors=[tensor("a", [0, 4])]), "shape (4, 0)"),
    # 2^33 x 2^31 floats: 2^66 bytes, which is 0 in 64 bits.
    "a product that overflows": (gguf(tensors=[tensor("a", [1 << 33, 1 << 31])], data=b"\0" * 64), "the file at"),
    "a tensor past the end": (gguf(tensors=[tensor("a", [9])], data=b"\0" * 32), "the file at"),
    "an offset past the end": (gguf(tensors=[tensor("a", [1], 1 << 63)], data=b"\0" * 32), "the file at"),
    "an offset between": (gguf(tensors=[tensor("a", [1], 4)], data=b"\0" * 32), "no multiple of 32"),
    "a part of a block": (gguf(tensors=[tensor("a", [16, 2], kind=Q4_0)], data=b"\0" * 64), "in blocks of 32"),
    "a tensor of no type": (gguf(tensors=[tensor("a", [1], kind=255)], data=b"\0" * 32), "type 255"),
    "a removed type": (gguf(tensors=[tensor("a", [32], kind=4)], data=b"\0" * 32), "type 4"),
    "one tensor twice": (gguf(tensors=[tensor("a", [1]), tensor("a", [1], 32)], data=b"\0" * 64), "is there twice"),
    "tensors over each other": (
        gguf(tensors=[tensor("a", [16]), tensor("b", [8], 32)], data=b"\0" * 64),
        "a and b lie over each other",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_at_once(case, tmp_path):
    content, message = HOSTILE[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(UserError) as refused:
        open_checkpoint(path)
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert message in str(refused.value) and "model.gguf" in str(refused.value)
    assert len(str(refused.value)) < 600 and "\x1b" not in str(refused.value)
    # tracemalloc alone makes it some five times as slow; the first case also imports the package gguf.
    assert seconds < 3 and peak < 32 << 20


def test_texts_and_entries_have_bounds(tmp_path):
    """A file that is as large as it says, and all of it header, would keep a reader busy for minutes."""
    path = tmp_path / "model.gguf"
    for content, message in (
        (gguf([array("a", STRING, 1 << 21, b"\0" * (8 << 21))]), "2097152 texts"),
        (gguf([array(f"a{i}", STRING, 1 << 19, b"\0" * (8 << 19)) for i in range(3)]), "524288 texts"),
        (gguf(counts=(0, 1 << 17), data=b"\0" * (1 << 22)), "131072 keys"),
    ):
        path.write_bytes(content)
        start = time.process_time()
        with pytest.raises(UserError, match=message):
            read_file(path)
        assert time.process_time() - start < 1.5


def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path):
    whole = gguf(
        [key("general.architecture", "str", "phi3"), array("a", STRING, 2, text("x") + text("yz")), key("b", "f32", 2)],
        [tensor("a", [4, 2]), tensor("b", [8], 32)],
        bytes(64),
    )
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    assert set(read_file(path).tensors) == {"a", "b"}
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            read_file(path)


def test_what_the_header_says_is_read(tmp_path):
    path = tmp_path / "model.gguf"
    numbers = np.arange(6, dtype=np.float32)
    path.write_bytes(
        gguf(
            [
                key("general.alignment", "u32", 64),
                key("x.u8", "u8", 200),
                key("x.i32", "i32", -5),
                key("x.bool", "bool", True),
                key("x.long", "u64", 1 << 40),
                array("x.list", 6, 6, numbers.tobytes()),
                array("x.texts", STRING, 2, text("é") + text("")),
            ],
            [tensor("a", [3, 2]), tensor("b.weight", [32, 1], 64, Q4_0)],
            b"",
        )
    )
    content = path.read_bytes()
    start = -(-len(content) // 64) * 64
    path.write_bytes(content.ljust(start, b"\0") + numbers.tobytes().ljust(64, b"\0") + bytes(18))
    file = read_file(path)
    assert file.metadata["x.u8"] == 200 and file.metadata["x.i32"] == -5 and file.metadata["x.long"] == 1 << 40
    assert file.metadata["x.bool"] is True and file.metadata["x.texts"] == ["é", ""]
    np.testing.assert_array_equal(file.metadata["x.list"], numbers)
    assert file.tensors["a"].shape == (2, 3) and file.tensors["a"].kind == F32
    assert file.tensors["b.weight"].size == 18 and file.tensors["b.weight"].offset == file.tensors["a"].offset + 64
    raw = file.data[file.tensors["a"].offset :][:24].view(np.float32)
    np.testing.assert_array_equal(raw, numbers)


def test_damage_anywhere_in_a_header_is_a_message(tmp_path):
    """One to three bytes of a real header replaced: it opens, or it is refused, and nothing else happens."""
    path = write_gguf(opened(LONG), tmp_path / "m.gguf", kind="Q8_0")
    whole = path.read_bytes()
    end = min(tensor.offset for tensor in read_file(path).tensors.values())
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            # The names and scores of tokens are most of a header: keys are before them, tensors behind.
            low, high = ((0, 1500), (end - 2500, end), (0, end))[rng.integers(3)]
            damaged[rng.integers(low, high)] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
        path.write_bytes(damaged)
        try:
            open_checkpoint(path).tokenizer()
            outcomes.add("opened")
        except UserError:
            outcomes.add("refused")
    assert outcomes == {"opened", "refused"}


@pytest.mark.parametrize("where", ["nowhere.gguf", "folder.gguf"])
def test_no_file(where, tmp_path):
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(UserError):
        open_checkpoint(tmp_path / where)
