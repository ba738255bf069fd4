"""What a run begins with: the model and weights of `init_from`, and what travels with them into all that it writes."""

import dataclasses
import shlex
from typing import Any

from etils import epath

from phijax import config as configs
from phijax.checkpoint import reading
from phijax.checkpoint.steps import CHECKPOINTS_FOLDER
from phijax.config import Config
from phijax.data.shards import Shards
from phijax.errors import UserError
from phijax.interchange.facts import TRAVELLING
from phijax.interchange.native.source import START, model_of
from phijax.interchange.open import open_checkpoint
from phijax.interchange.opened import Opened
from phijax.model import params as model_params
from phijax.model.config import CHECKPOINT, ModelConfig, ModelSection, by_hand, model_to_dict, resolve_model
from phijax.model.presets import PRESETS
from phijax.text.tokenizer import TextTokenizer

# Longer context is trained from weights of a shorter one: these may differ between start weights and the run.
CHANGED_BY_CONTEXT = ("max_position", "rope_theta", "sliding_window", "long_rope")
# Says where a preset's LongRoPE lists come from, and decides nothing once they are there.
_NO_PART = ("requires_long_rope",)
# Settings of generation_config.json that name ids of one vocabulary.
_OF_IDS = ("suppress_tokens", "begin_suppress_tokens", "sequence_bias")


def resolve(config: Config, workdir: epath.Path | None = None) -> ModelConfig:
    """The model of a run. With model.preset="checkpoint": that of `init_from`, or what the run in `workdir` began with.

    Weights are not read, and no process waits for another. Raises: UserError.
    """
    if config.model.preset != CHECKPOINT:
        return resolve_model(config.model, PRESETS)
    model = _begun_with(workdir)
    if model is None:
        if not config.init_from:
            raise UserError(
                "model.preset=checkpoint is the model of the start weights, but init_from names none.\n"
                "Add --config.init_from=CHECKPOINT, or take another preset."
            )
        model = open_checkpoint(config.init_from, verify=False).model
    return resolve_model(config.model, {**PRESETS, CHECKPOINT: model})


def _begun_with(workdir: epath.Path | None) -> ModelConfig | None:
    """The model of the start weights of the run in `workdir`, which may be gone by now; of an old run, its own."""
    before = workdir and reading.newest_identity(workdir / CHECKPOINTS_FOLDER)
    return model_of(workdir, before.get(START) or before) if before else None


@dataclasses.dataclass(frozen=True)
class Start:
    """Weights to start with, checked; what manifests of the run say of them; what is to be said of them."""

    opened: Opened
    facts: dict[str, Any]
    lines: list[str]


def open_start(config: Config, model: ModelConfig, shards: Shards, *, verify: bool = True) -> Start:
    """Collective where `verify`. Args: shards: any of the run's data: all have one tokenizer.

    Raises: UserError for what is no checkpoint, of another model, or of another tokenizer than the data.
    """
    opened = open_checkpoint(config.init_from, verify=verify)
    lines = check_model(opened, config.model, model)
    theirs, same, said = check_tokenizer(opened, shards, config.init_from_other_tokenizer)
    facts, lost = facts_of(opened, theirs, shards.tokenizer(), same)
    lines += said
    if lost:
        lines.append(f"init_from: not taken over, since the data's tokenizer lacks the tokens: {', '.join(lost)}")
    lines.append(f"weights of {config.init_from}; step, optimizer and data begin anew")
    return Start(opened, facts, lines)


def kept(before: dict[str, Any] | None, begun: Start | None) -> dict[str, Any]:
    """What goes on into the identity of a run's steps, from the start on."""
    facts = begun.facts if begun else (before or {}).get(START)
    return {START: facts} if facts else {}


def check_model(opened: Opened, section: ModelSection, model: ModelConfig) -> list[str]:
    """Whether the weights of `opened` can start `model`, which `section` describes. -> lines on what differs and may.

    Raises: UserError naming every field that differs, but those of CHANGED_BY_CONTEXT that were set by hand and leave
      every leaf its shape; with the flags that make them equal.
    """
    hands = by_hand(section)
    changed = configs.differences(computed(opened.model), computed(model))
    free = [name for name in _context(opened.model, model) if name in hands]
    shown = {key: (_short(old), _short(new)) for key, (old, new) in changed.items()}
    refused = [key for key in changed if key.split(".")[0] not in free]
    if refused:
        raise UserError(
            f"init_from={opened.path} is the checkpoint of another model:\n"
            + "".join(f"  model.{key} is {shown[key][0]} there, {shown[key][1]} here\n" for key in refused)
            + "".join(
                f"  so {path} has shape {old} there, {new} here\n"
                for path, (old, new) in _reshaped(opened.model, model).items()
            )
            + "Nothing is cast, cut or reshaped: take other weights, or the checkpoint's model, with\n  "
            + _remedies(opened, section, model, list(dict.fromkeys(key.split(".")[0] for key in refused)))
        )
    return [f"init_from: model.{key} was {old}, goes on with {new}" for key, (old, new) in shown.items()]


def _reshaped(there: ModelConfig, here: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Leaves that another max_position alone gives another shape: learned positions. Path -> theirs, ours."""
    old = model_params.shapes(there)
    new = model_params.shapes(dataclasses.replace(there, max_position=here.max_position))
    return {path: (old[path], new[path]) for path in old if old[path] != new[path]}


def _context(there: ModelConfig, here: ModelConfig) -> list[str]:
    """The fields of CHANGED_BY_CONTEXT with which weights of the one model are weights of the other."""
    reshaped = _reshaped(there, here)
    return [name for name in CHANGED_BY_CONTEXT if name != "max_position" or not reshaped]


def computed(model: ModelConfig) -> dict[str, Any]:
    """The fields that decide what a model computes."""
    return {name: value for name, value in dataclasses.asdict(model).items() if name not in _NO_PART}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _remedies(opened: Opened, section: ModelSection, model: ModelConfig, refused: list[str]) -> str:
    """The flags to paste: the checkpoint's model as a whole, field by field, and for another context on purpose."""
    hands = by_hand(section)
    # What was set by hand would overrule the checkpoint's again.
    names = ["long_rope_from" if name == "long_rope" else name for name in refused if name in hands]
    unset = [f"--config.model.{name}={'none' if name == 'long_rope_from' else 'preset'}" for name in names]
    preset = [] if section.preset == CHECKPOINT else [f"--config.model.preset={CHECKPOINT}"]
    ways = [" ".join([*preset, *unset])]
    fields = [_flag(name, getattr(opened.model, name), opened) for name in refused]
    if section.preset != CHECKPOINT and None not in fields:
        ways.append("or, the same by field,\n  " + " ".join(filter(None, fields)))
    context = [name for name in refused if name in _context(opened.model, model)]
    here = [_flag(name, getattr(model, name), None) for name in context]
    if context and None not in here:
        ways.append(
            f"Another context may be meant ({', '.join(context)}): a preset's values count once set by hand,\n  "
            + " ".join([*preset, *unset, *filter(None, here)])
        )
    return "\n".join(ways)


def _flag(name: str, value: Any, opened: Opened | None) -> str | None:
    """The flag that gives a field of the model this value; None where none can. `opened`: whose value it is."""
    if name != "long_rope":
        return f"--config.model.{name}={value}"
    preset = next((preset for preset, known in PRESETS.items() if value and known.long_rope == value), None)
    if preset is None and value and opened is not None and opened.kind == "huggingface":
        return f"--config.model.long_rope_from={shlex.quote(str(opened.path / 'config.json'))}"
    return preset and f"--config.model.long_rope_from={preset}"


def check_tokenizer(opened: Opened, shards: Shards, other: bool) -> tuple[TextTokenizer | None, bool | None, list[str]]:
    """-> the checkpoint's tokenizer, where it has one; whether the data are of it, None: not known; lines to say.

    Raises: UserError where they are of another, unless `other`.
    """
    try:
        theirs, missing = opened.tokenizer(), ""
        same: bool | None = shards.made_with(theirs)
    except UserError as error:  # a checkpoint without one is no mistake: the data have one
        theirs, missing = None, str(error)
        # A step that was copied without its run still says what its data were.
        said = ((opened.facts.identity or {}).get("data") or {}).get("tokenizer")
        same = None if said is None else said == shards.tokenizer_fingerprint
    if same:
        return theirs, True, []
    if same is None:
        line = f"warning: whether the data are of the tokenizer of {opened.path} is not known: {missing}"
        return None, None, [line]
    whose = f"that of {opened.path}" + (f" ({theirs.vocab_size} ids, {theirs.fingerprint[:12]})" if theirs else "")
    data = f"the data are of another tokenizer ({shards.vocab_size} ids, {shards.tokenizer_fingerprint[:12]}) than"
    if other:
        return theirs, False, [f"warning: init_from: {data} {whose}"]
    place = shlex.quote(str(opened.facts.tokenizer_folder or opened.path))
    raise UserError(
        f"init_from: {data} {whose}: the same id means one text to the weights and another in the data.\n"
        f"Prepare the text again with --tokenizer={place}; or, where the weights are to learn other ids on purpose, "
        "--config.init_from_other_tokenizer=true"
    )


def facts_of(
    opened: Opened, theirs: TextTokenizer | None, ours: TextTokenizer, same: bool | None
) -> tuple[dict[str, Any], list[str]]:
    """What a run's manifests say of its start weights, as JSON, with the ids of the data's tokenizer; what is lost.

    Args:
      theirs, ours: the checkpoint's tokenizer and the data's. same: whether they are one; where not, special tokens
        that both have move by their names, and the rest is lost.
    """
    lost: list[str] = []

    def moved(i: int, what: str) -> int | None:
        known = i if same is not False else theirs and ours.specials.ids.get(theirs.specials.names.get(i, ""))
        lost.extend([f"{what} {i}"] * (known is None))
        return known

    facts: dict[str, Any] = {"model": model_to_dict(opened.model)}
    for key, value in opened.facts.said(*TRAVELLING).items():
        facts[key] = moved(value, key) if key.endswith("_id") else value
    stops = [i for i in (moved(i, "stop id") for i in opened.stop_ids) if i is not None]
    if stops:  # the data's documents end a text too
        facts["stop_ids"] = list(dict.fromkeys([*stops, ours.end_of_text]))
    facts["chat_template"] = opened.chat_template
    if same is False:
        facts["generation"] = {k: v for k, v in facts.get("generation", {}).items() if not _is_of_ids(k)}
        names = theirs.specials.ids if theirs else [""]
        template = opened.chat_template
        if template and any(name in template and name not in ours.specials.ids for name in names):
            lost.append("the chat template")
            facts["chat_template"] = None
    if facts.get("eos_id") is not None and facts["eos_id"] not in ours.specials.names:
        lost.append(f"eos_id {facts['eos_id']}")  # no tokenizer file could name it as what ends a text
        facts["eos_id"] = None
    return {name: value for name, value in facts.items() if value is not None}, lost


def _is_of_ids(name: str) -> bool:
    return name.endswith(("_id", "_ids")) or name in _OF_IDS
