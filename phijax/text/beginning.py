"""The tokens that stand before every plain text: what the files of a Hugging Face folder say of them, read and written.

A conversation is another matter: its template says how it begins.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from phijax.errors import UserError
from phijax.text.special_files import CONFIG_FILE, JSON_FILE, MAP_FILE, read_object


def read_beginning(folder: epath.Path, bos: int | None) -> tuple[int, ...]:
    """Ids that transformers puts before a text.

    By the rule of transformers 5: the post-processor of tokenizer.json decides; where there is no such file,
    add_bos_token of tokenizer_config.json.

    Args: bos: the id that config.json or generation_config.json calls so.
    Raises: UserError for files that cannot be read.
    """
    whole = read_object(folder / JSON_FILE)
    if whole is not None:
        try:
            return _leading(whole.get("post_processor"))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(f"{folder / JSON_FILE}: its post_processor cannot be read ({error!r}).") from error
    config = read_object(folder / CONFIG_FILE) or {}
    return (bos,) if config.get("add_bos_token") is True and bos is not None else ()


def write_beginning(folder: epath.PathLike, begin: Sequence[int]) -> None:
    """Makes the files of `folder` say that these ids, and no others, stand before every text.

    Nothing where there is no tokenizer.json. Raises: UserError for an id that it has no token for.
    """
    folder = epath.Path(folder)
    whole = read_object(folder / JSON_FILE)
    if whole is None:
        return
    config, kinds = read_object(folder / CONFIG_FILE) or {}, read_object(folder / MAP_FILE) or {}
    names = _names(whole, config)
    if unknown := [i for i in begin if i not in names]:
        raise UserError(f"{folder / JSON_FILE} has no token of id {unknown[0]}, with which texts are to begin.")
    tokens = [names[i] for i in begin]
    if begin:
        whole["post_processor"] = post_processor(tokens, begin)
        config["bos_token"] = tokens[0]
        kinds["bos_token"] = kinds.get("eos_token") if _text(kinds.get("eos_token")) == tokens[0] else tokens[0]
    elif _leading(whole.get("post_processor")):
        whole["post_processor"] = None
    # What goes by names alone: transformers 4's Llama class, llama.cpp's converter.
    config["add_bos_token"] = bool(begin)
    (folder / JSON_FILE).write_text(json.dumps(whole, ensure_ascii=False, indent=1) + "\n")
    (folder / CONFIG_FILE).write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n")
    if kinds:
        (folder / MAP_FILE).write_text(json.dumps(kinds, ensure_ascii=False, indent=2) + "\n")


def post_processor(tokens: Sequence[str], ids: Sequence[int]) -> dict[str, Any]:
    """tokenizer.json's, that puts these special tokens before every text."""

    def special(part: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": token, "type_id": part}} for token in tokens]

    def text(name: str, part: int) -> list[dict[str, Any]]:
        return [{"Sequence": {"id": name, "type_id": part}}]

    return {
        "type": "TemplateProcessing",
        "single": special(0) + text("A", 0),
        "pair": special(0) + text("A", 0) + special(1) + text("B", 1),
        "special_tokens": {
            token: {"id": token, "ids": [i], "tokens": [token]} for token, i in zip(tokens, ids, strict=True)
        },
    }


def _leading(processor: Any) -> tuple[int, ...]:
    """Ids that a post-processor of tokenizer.json puts before a single text."""
    if not isinstance(processor, dict):
        return ()
    if "processors" in processor:
        return tuple(i for step in processor["processors"] for i in _leading(step))
    if processor.get("type") in ("BertProcessing", "RobertaProcessing"):
        return (processor["cls"][1],)
    ids: list[int] = []
    for part in processor.get("single") or () if processor.get("type") == "TemplateProcessing" else ():
        if "SpecialToken" not in part:
            break
        ids += processor["special_tokens"][part["SpecialToken"]["id"]]["ids"]
    if wrong := [i for i in ids if type(i) is not int or i < 0]:
        raise TypeError(f"{wrong[0]!r} is no id")
    return tuple(ids)


def _text(entry: Any) -> str | None:
    """Of a token that stands as a string, or as an object with its flags."""
    found = entry.get("content") if isinstance(entry, dict) else entry
    return found if isinstance(found, str) else None


def _names(whole: Mapping[str, Any], config: Mapping[str, Any]) -> dict[int, str]:
    """Id -> token, of the vocabulary and of what was added to it."""
    model = whole.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    names = {i: token for token, i in vocab.items()} if isinstance(vocab, dict) else {}
    decoder = config.get("added_tokens_decoder")
    for i, entry in (decoder if isinstance(decoder, dict) else {}).items():
        if str(i).isdecimal() and (token := _text(entry)) is not None:
            names[int(i)] = token
    for entry in whole.get("added_tokens") or ():
        if isinstance(entry, dict) and (token := _text(entry)) is not None:
            names[entry.get("id")] = token
    return names
