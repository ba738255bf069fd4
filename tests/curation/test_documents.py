"""Every format gives its documents, what cannot be used is named, a file that breaks off is never taken for whole."""

import gzip
import io
import json
import os

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from phijax.curation.documents import InputFile, Part, find_inputs, parts_of, read_part
from phijax.errors import UserError

TEXTS = ["plain", "two\r\nlines\r\n", "日本語 🎉 Ω", "  leading, trailing  \n"]
ROWS = [json.dumps({"text": text, "id": i}, ensure_ascii=i % 2 == 0) for i, text in enumerate(TEXTS)]


def part_of(path):
    return Part(InputFile(path.name, str(path), path.stat().st_size), 0, path.stat().st_size)


def read(path, text_field="text"):
    return list(read_part(part_of(path), text_field))


def write_compressed(path, content):
    if path.name.endswith(".gz"):
        content = gzip.compress(content)
    elif path.name.endswith(".zst"):
        content = zstandard.compress(content)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "A.JSONL"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_json_lines(tmp_path, name, end):
    path = write_compressed(tmp_path / name, ("\n".join(ROWS) + end).encode())
    assert [document.text for document in read(path)] == TEXTS
    assert len({document.index for document in read(path)}) == len(TEXTS)


def test_compressed_files_longer_than_a_read_and_of_many_members(tmp_path):
    rows = [json.dumps({"text": f"{i} " + os.urandom(3000).hex()}) for i in range(500)]
    content = "\n".join(rows).encode()
    halves = content[:1_000_000], content[1_000_000:]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, halves)))
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, halves)))
    (tmp_path / "a.jsonl").write_bytes(content)
    plain = read(tmp_path / "a.jsonl")
    assert [document.text for document in plain] == [json.loads(row)["text"] for row in rows]
    assert all(content[document.index :].startswith(row.encode()) for document, row in zip(plain, rows, strict=True))
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        assert read(tmp_path / name) == plain  # where a line begins too: packing a file again moves no document


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    table = {"id": [1, 2, 3, 4, 5, 6], "text": [*TEXTS, None, " "]}
    pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=2)
    found = read(path)
    assert [document.text for document in found] == [*TEXTS, None, None]
    assert [document.dropped for document in found[4:]] == ["no text field", "empty"]
    assert [document.index for document in found] == list(range(6))
    assert {document.dropped for document in read(path, "id")} == {"text field is no string"}
    with pytest.raises(UserError, match=r"no column 'txt'. It has: id, text. Try --text_field=text"):
        read(path, "txt")


def test_text_files(tmp_path):
    for content, text, dropped in [
        (b"# a\r\n\r\nb", "# a\r\n\r\nb", None),
        (b"\xef\xbb\xbfafter a mark", "after a mark", None),
        (b"", None, "empty"),
        (b" \n\t ", None, "empty"),
        (b"caf\xe9", None, "not UTF-8"),
        (b"\xed\xa0\x80", None, "not UTF-8"),
    ]:
        (tmp_path / "a.md").write_bytes(content)
        ((document),) = read(tmp_path / "a.md")
        assert (document.text, document.dropped) == (text, dropped)


def test_lines_that_cannot_be_used_are_named(tmp_path):
    lines = {
        b'{"text": "good"}': None,
        b'{"text": ""}': "empty",
        b'{"text": "  \\n"}': "empty",
        b'{"text": "bro': "malformed JSON",
        b'{"text": "\xff"}': "not UTF-8",
        b'{"text": "half a pair \\ud83d"}': "not UTF-8",
        b'{"body": "good"}': "no text field",
        b'{"text": null}': "no text field",
        b'["text"]': "no text field",
        b'{"text": ["a"]}': "text field is no string",
        b"[" * 100_000: "malformed JSON",
        b"1" * 10_000: "malformed JSON",
    }
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    assert [document.dropped for document in read(tmp_path / "a.jsonl")] == list(lines.values())


@pytest.mark.parametrize("part_bytes", [1, 2, 3, 7, 30, 64, 1000])
def test_parts_of_a_file_have_each_line_once(tmp_path, part_bytes):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(['{"text": "one"}', "", '{"text": "a longer one"}', '{"text": "3"}', "", ""]))
    parts = parts_of([part_of(path).file], part_bytes)
    assert len(parts) == -(-path.stat().st_size // part_bytes)
    found = [document for part in parts for document in read_part(part, "text")]
    assert found == read(path)
    assert [document.text for document in found] == ["one", "a longer one", "3"]


def test_only_json_lines_are_cut(tmp_path):
    files = [InputFile(name, name, 100) for name in ("a.txt", "a.parquet", "a.jsonl.gz")] + [InputFile("e.md", "e", 0)]
    assert [(part.start, part.stop) for part in parts_of(files, 10)] == [(0, 100)] * 3 + [(0, 0)]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_files_that_break_off_are_refused_at_every_length(tmp_path, name):
    rows = [f"{i} " + "ab " * i for i in range(200)]
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path)
    else:
        write_compressed(path, "\n".join(json.dumps({"text": row}) for row in rows).encode())
    content = path.read_bytes()
    for length in range(1, len(content), max(len(content) // 50, 1)):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="broken"):
            read(path)
    path.write_bytes(content[: len(content) // 2] + b"\0\0\0\0" + content[len(content) // 2 + 4 :])
    with pytest.raises(UserError, match="broken"):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_files_that_are_not_what_their_name_says(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is plain text, whatever the name says")
    with pytest.raises(UserError, match="broken"):
        read(tmp_path / name)


def test_a_file_that_is_gone(tmp_path):
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read"):
        list(read_part(Part(InputFile("a.jsonl", str(tmp_path / "a.jsonl"), 10), 0, 10), "text"))


@pytest.mark.parametrize(("module", "name"), [("zstandard", "a.jsonl.zst"), ("pyarrow", "a.parquet")])
def test_what_a_missing_extra_says(tmp_path, monkeypatch, module, name):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(UserError, match=rf"needs {module}: .venv/bin/pip install -e '.\[data\]'"):
        read(tmp_path / name)


@pytest.fixture
def folder(tmp_path):
    for name in ("b.txt", "a/c.jsonl", "a/deep/d.md", "a/e.csv", ".git/f.txt", ".g.txt", "out/h.txt"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "in" / "a" / "loop").symlink_to(tmp_path / "in")
    return tmp_path / "in"


def test_folders_are_read_with_all_below(folder):
    files, ignored = find_inputs(str(folder), outside=str(folder / "out"))
    assert [file.name for file in files] == ["a/c.jsonl", "a/deep/d.md", "b.txt"]
    assert [file.bytes for file in files] == [9, 11, 5]
    assert ignored == ["a/e.csv", "a/loop/"]  # which leads back to where it is


def test_globs_and_files(folder, monkeypatch):
    def names(pattern):
        return [file.name for file in find_inputs(pattern, outside="out")[0]]

    assert names(f"{folder}/*.txt") == ["b.txt"]
    assert names(f"{folder}/a/*/*.md") == ["deep/d.md"]
    assert set(names(f"{folder}/**/*.md")) >= {"a/deep/d.md"}
    assert names(f"{folder}/b.txt") == ["b.txt"]
    monkeypatch.chdir(folder)
    assert names("*.txt") == ["b.txt"] and names("b.txt") == ["b.txt"]
    (folder / "with[1].txt").write_text("x")
    assert names(f"{folder}/with[1].txt") == ["with[1].txt"]


def names(pattern, outside="out"):
    files, ignored = find_inputs(str(pattern), outside=str(outside))
    return [file.name for file in files], ignored


@pytest.fixture
def linked(tmp_path):
    """data/: a.txt, deep/b.txt, and links to a folder and a file beside it, to itself, and up."""
    data, other = tmp_path / "data", tmp_path / "other"
    for file in (
        data / "a.txt",
        data / "deep" / "b.txt",
        other / "c.txt",
        other / "inner" / "d.txt",
        tmp_path / "e.txt",
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)
    (data / "A_link").symlink_to(other)
    (data / "A_loop").symlink_to(data)
    (data / "A_up").symlink_to("..")
    (data / "A_twice").symlink_to(data / "deep")
    (data / "e.txt").symlink_to(tmp_path / "e.txt")
    (other / "back").symlink_to(data / "deep")
    return data


def test_links_are_followed_once_and_what_is_not_is_told(linked):
    files = ["A_link/c.txt", "A_link/inner/d.txt", "a.txt", "deep/b.txt", "e.txt"]
    assert names(linked) == (files, ["A_link/back/", "A_loop/", "A_twice/", "A_up/"])
    (linked.parent / "root").symlink_to(linked)
    assert names(linked.parent / "root") == names(linked)


def test_the_output_is_no_input_through_a_link_either(linked):
    (linked / "A_link" / "c.txt").unlink()
    assert names(linked, outside=linked.parent / "other")[0] == ["a.txt", "deep/b.txt", "e.txt"]


def test_a_glob_follows_links_without_going_in_circles(linked):
    files = ["A_link/c.txt", "A_link/inner/d.txt", "a.txt", "deep/b.txt", "e.txt"]
    assert names(linked / "**" / "*.txt") == (files, ["A_link/back/", "A_loop/", "A_twice/", "A_up/"])
    assert names(linked / "**" / "inner" / "*.txt")[0] == ["A_link/inner/d.txt"]
    assert names(linked / "**")[0] == files
    assert names(linked / "*") == (["a.txt", "e.txt"], ["A_link/", "A_loop/", "A_twice/", "A_up/", "deep/"])


def test_links_to_nothing_and_pipes_are_refused_where_they_would_be_read(linked):
    (linked / "notes").symlink_to("nowhere")  # of no kind that is read
    os.mkfifo(linked / "pipe.log")
    assert names(linked)[1][-2:] == ["notes", "pipe.log"]
    for pattern in (linked, linked / "*.md", linked / "x.md"):
        (linked / "x.md").symlink_to("nowhere")
        with pytest.raises(UserError, match=r"x\.md is a link to nowhere, where nothing is"):
            names(pattern)
        (linked / "x.md").unlink()
        os.mkfifo(linked / "x.md")
        with pytest.raises(UserError, match=r"x\.md is a pipe"):
            names(pattern)
        (linked / "x.md").unlink()
    (linked / "x.md").symlink_to("x.md")
    with pytest.raises(UserError, match=r"x\.md cannot be read: .*symbolic links"):
        names(linked)


def test_folders_with_odd_names_are_entered(tmp_path):
    odd = [b"caf\xe9", b"old~", b"[a]", b"a%20b", b"a\\b", b"a\nb"]
    for name in odd:
        os.mkdir(os.fsencode(tmp_path) + b"/" + name)
        with open(os.fsencode(tmp_path) + b"/" + name + b"/" + name + b".txt", "wb") as file:
            file.write(name)
    files, ignored = find_inputs(str(tmp_path), outside="out")
    assert sorted(os.fsencode(file.name) for file in files) == sorted(name + b"/" + name + b".txt" for name in odd)
    assert ignored == [] and all(file.bytes == os.stat(file.path).st_size for file in files)
    texts = [next(read_part(part, "text")).text for part in parts_of(files, 1 << 20)]
    assert sorted(text or "" for text in texts) == sorted(["", "old~", "[a]", "a%20b", "a\\b", "a\nb"])


def test_input_that_means_nothing(folder, tmp_path):
    with pytest.raises(UserError, match="means no file of"):
        find_inputs(str(tmp_path / "nothing" / "*"), outside="out")
    with pytest.raises(UserError, match=r"means a/e\.csv too|means e\.csv too"):
        find_inputs(f"{folder}/a/*", outside="out")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="means no file of"):
        find_inputs(str(empty), outside="out")
    (empty / "a.pdf").write_bytes(b"")
    with pytest.raises(UserError, match=r"It has 1 others, as a\.pdf"):
        find_inputs(str(empty), outside="out")


def test_reading_does_not_hold_the_file(tmp_path):
    """A file of one compressed line after another is read as it is asked for."""
    path = tmp_path / "a.jsonl.zst"
    buffer = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(buffer, closefd=False) as writer:
        for i in range(2000):
            writer.write(json.dumps({"text": f"{i} " + os.urandom(1000).hex()}).encode() + b"\n")
    path.write_bytes(buffer.getvalue()[:-1000])
    documents = read_part(part_of(path), "text")
    assert next(documents).text.startswith("0 ")  # though the file is broken at its end
    with pytest.raises(UserError, match="broken"):
        list(documents)
