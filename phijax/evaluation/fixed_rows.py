"""A fixed number of rows of tokens, from shards or from a text file, to compare models on."""

import numpy as np
from etils import epath

from phijax.data.rows import RowIndex
from phijax.data.shards import Shards
from phijax.errors import UserError
from phijax.storage import strict_json
from phijax.text.tokenizer import TextTokenizer

_LONGEST_TEXT = 1 << 30  # bytes of a file


def read_fixed_rows(
    path: epath.PathLike, tokenizer: TextTokenizer, *, count: int, length: int, vocab_size: int
) -> list[np.ndarray]:
    """The first `count` rows, each (length + 1,) int32: what is read and, moved by one, what is to be predicted.

    Args:
      path: a folder of token shards, whose rows are its records (`length` is then theirs), or a text file in UTF-8,
        cut into rows.
    Raises: UserError for shards of another tokenizer, for text that is too short for one row.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"{path} is not there. Give a folder of token shards, or a text file.")
    if path.is_dir():
        shards = Shards.open(path)
        shards.require_tokenizer(tokenizer, "the checkpoint")
        index = RowIndex(shards, shards.block, "held out", str(path), begin=None)  # of the stream's own tokens
        rows = [index.read(number) for number in range(min(count, len(index)))]
        found = [np.concatenate([row["tokens"], row["targets"][-1:]]) for row in rows]
    else:
        ids = np.array(tokenizer.encode(strict_json.read_text(path, _LONGEST_TEXT)), np.int32)
        starts = range(0, min(count * length, len(ids) - length), length)
        found = [ids[start : start + length + 1] for start in starts]
        if not found:
            raise UserError(f"{path} has {len(ids)} tokens: too few for one row of {length}. Give a longer text.")
    if (largest := max(int(row.max()) for row in found)) >= vocab_size:
        raise UserError(f"{path} holds the token id {largest}; the model's ids are 0 to {vocab_size - 1}.")
    return found
