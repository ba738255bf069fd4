"""Small shard folders of random documents, for tests of what reads them."""

import functools
import pathlib

import numpy as np

from phijax.data.shard_manifest import Manifest
from phijax.data.shards import ShardWriter
from phijax.text.tokenizer import Tokenizer
from phijax.text.train_tokenizer import train_tokenizer


@functools.cache
def small_tokenizer(vocab_size: int = 300) -> Tokenizer:
    return train_tokenizer(["some words to train a tokenizer on, " * 3], vocab_size=vocab_size)


def write_synthetic(
    folder: pathlib.Path, *, seed: int = 0, documents: int = 60, block: int = 32, shards: int = 2, mean_length: int = 40
) -> pathlib.Path:
    """Documents whose tokens repeat a short random motif, so that a model can learn them."""
    tokenizer = small_tokenizer()
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    entries = []
    for number in range(shards):
        name = f"shard-{number:05d}-of-{shards:05d}.arrayrecord"
        with ShardWriter(folder / name, block, np.dtype("uint16")) as writer:
            for _ in range(number, documents, shards):
                motif = draw.integers(3, 280, draw.integers(2, 6))
                length = int(draw.integers(2, 2 * mean_length))
                writer.add(np.append(np.resize(motif, length), tokenizer.end_of_text).astype(np.uint16))
            entries.append(writer.close())
    manifest = Manifest(
        block=block,
        dtype="uint16",
        seed=seed,
        split="all",
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        shards=tuple(entries),
        inputs=(),
        ignored_files=(),
        documents_read=documents,
        documents_kept=documents,
        documents_in_other_split=0,
        documents_dropped={},
        unknown_tokens=0,
        settings={},
    )
    tokenizer.save(folder)
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder
