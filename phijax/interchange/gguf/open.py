"""Opens a GGUF file."""

import functools

from etils import epath

from phijax.errors import UserError
from phijax.interchange.facts import Facts
from phijax.interchange.gguf.config import family_of, model_of
from phijax.interchange.gguf.file import read_file
from phijax.interchange.gguf.sampling import settings_of
from phijax.interchange.gguf.source import GgufSource
from phijax.interchange.gguf.tokenizer import PREFIX, open_tokenizer, stop_ids, token_id
from phijax.interchange.opened import Opened


def open_gguf(path: epath.PathLike) -> Opened:
    """A GGUF file of an architecture of `families/`. Its header is checked; weights are read when asked for.

    Raises: UserError for a file that is damaged, hostile, of another architecture, or that computes otherwise.
    """
    file = read_file(path)
    family = family_of(file)
    model = model_of(file, family)
    source = GgufSource(file, family, model)
    template = file.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{path}: tokenizer.chat_template is no text.")
    ids = {"bos_id": "bos_token_id", "eos_id": "eos_token_id", "pad_id": "padding_token_id"}
    name = file.metadata.get("general.name")
    facts = Facts(
        architecture=family.classes[0],
        generation=settings_of(file.metadata) or None,
        name=name if isinstance(name, str) else None,
        gguf_kinds=tuple(sorted(source.kinds())),
        **{ours: token_id(file, PREFIX + key, model.vocab_size) for ours, key in ids.items()},
    )
    # llama.cpp puts bos before SentencePiece's ids where a file does not say.
    default = file.metadata.get("tokenizer.ggml.model") == "llama"
    begins = file.metadata.get("tokenizer.ggml.add_bos_token", default) is True and facts.bos_id is not None
    return Opened(
        path=file.path,
        kind="gguf",
        model=model,
        weights=source,
        tokenizer=functools.partial(open_tokenizer, file),
        chat_template=template,
        begin=(facts.bos_id,) if begins else (),
        stop_ids=stop_ids(file, model.vocab_size),
        facts=facts,
    )
