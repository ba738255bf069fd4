"""GGUF files in and out: `open_gguf`, `write_gguf`."""

import functools

from etils import epath

from phijax.errors import UserError
from phijax.interchange import model_card
from phijax.interchange.gguf.config import architecture_of, model_of
from phijax.interchange.gguf.file import read_file
from phijax.interchange.gguf.sampling import settings_of
from phijax.interchange.gguf.source import GgufSource
from phijax.interchange.gguf.tokenizer import open_tokenizer, stop_ids
from phijax.interchange.gguf.write import architecture_for, write_gguf
from phijax.interchange.opened import Opened
from phijax.storage import durable

__all__ = ["open_gguf", "write_card", "write_gguf"]

CLASSES = {"phi3": "Phi3ForCausalLM", "llama": "LlamaForCausalLM"}  # transformers' names


def open_gguf(path: epath.PathLike) -> Opened:
    """A GGUF file of architecture phi3 or llama. Its header is checked; weights are read when asked for.

    Raises: UserError for a file that is damaged, hostile, of another architecture, or that computes otherwise.
    """
    file = read_file(path)
    architecture = architecture_of(file)
    model = model_of(file, architecture)
    source = GgufSource(file, architecture, model)
    template = file.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{path}: tokenizer.chat_template is no text.")
    extra = {"architecture": CLASSES[architecture], "gguf_kinds": sorted(source.kinds())}
    ids = {"bos_id": "bos_token_id", "eos_id": "eos_token_id", "pad_id": "padding_token_id"}
    extra |= {
        ours: file.metadata[f"tokenizer.ggml.{key}"]
        for ours, key in ids.items()
        if f"tokenizer.ggml.{key}" in file.metadata
    }
    # llama.cpp puts bos before SentencePiece's ids where a file does not say.
    default = file.metadata.get("tokenizer.ggml.model") == "llama"
    begins = file.metadata.get("tokenizer.ggml.add_bos_token", default) is True and "bos_id" in extra
    if generation := settings_of(file.metadata):
        extra["generation"] = generation
    if isinstance(name := file.metadata.get("general.name"), str):
        extra["name"] = name
    return Opened(
        path=file.path,
        kind="gguf",
        model=model,
        weights=source,
        tokenizer=functools.partial(open_tokenizer, file),
        chat_template=template,
        begin=(extra["bos_id"],) if begins else (),
        stop_ids=stop_ids(file, model.vocab_size),
        extra=extra,
    )


def write_card(opened: Opened, output: epath.PathLike) -> None:
    """A model card beside the file in the folder `output`, where there is none; nothing where `output` is the file."""
    path = epath.Path(output) / model_card.FILE
    if epath.Path(output).suffix != ".gguf" and not path.exists():
        durable.write_text(path, model_card.render(opened, architecture_for(opened), "gguf"))
