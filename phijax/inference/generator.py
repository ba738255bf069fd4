"""Generator: prompts in, continuations out."""

import copy
import dataclasses
import operator
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phijax.errors import UserError
from phijax.inference import batch as batches
from phijax.inference import fitting, placement, programs
from phijax.inference.batch import Batch, Chosen
from phijax.inference.prefix_cache import Prefix, PrefixCache
from phijax.inference.sampling import MOST_INT32, Sampling
from phijax.inference.stopping import Continuation, Result
from phijax.model import cached
from phijax.model.backend import CHOICES, Backend
from phijax.model.config import ModelConfig
from phijax.model.params import Params
from phijax.model.rope import inverse_frequencies
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.text.stream import TextStream
from phijax.text.tokenizer import TextTokenizer

LARGEST_BATCH = 32  # rows decoded at once; more prompts are taken in turns


@dataclasses.dataclass(frozen=True)
class Piece:
    """A step of a stream: row `row` got `token`, and `text` has become certain (it may be empty)."""

    row: int
    token: int
    logprob: float
    text: str
    result: Result | None  # on the row's last piece
    logits: np.ndarray | None = None  # (V,) float32, what the token was chosen from; where it was asked for


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A prompt of a call: `row` is its number there, `limit` how many tokens it may be given."""

    row: int
    ids: list[int]
    sampling: Sampling
    name: int
    limit: int


class Generator:
    """A model whose weights lie ready for inference.

    Batches need no padding on the left: each row has its own length. On one CPU a prompt's continuation is the same
    bit for bit whatever else is in the batch.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Params,
        tokenizer: TextTokenizer | None = None,
        backend: Backend | None = None,
        mesh: Mesh | None = None,
        max_length: int | None = None,
        *,
        stop_ids: Sequence[int] = (),
        begin: Sequence[int] = (),
        long_rope: Literal["auto", "declared", "per_sequence"] = "auto",
        cache_dtype: Literal["auto", "int8"] = "auto",
        owned: bool = False,
    ):
        """`params` as `load_params` gives them or as training holds them; they are copied into the layout of inference.

        Args:
          tokenizer: None: prompts must be ids, and results have no text.
          backend: None: the choice for the mesh's devices.
          max_length: declared length of prompt and answer together; None: the model's. Decides the LongRoPE list.
          stop_ids: tokens that end every answer.
          begin: ids put before a prompt that is given as text.
          long_rope: "declared": one list for all, the long one if max_length exceeds the original length;
            "per_sequence": transformers' rule, the long list once a sequence is longer than the original length, its
            cache then computed anew, once; "auto": by max_length where it is given.
          cache_dtype: of keys and values; "auto": that of computation. In int8 they take half of bfloat16's memory.
          owned: nobody else uses `params`: arrays that lie as inference wants them are taken, not copied.
        Raises: UserError for a max_length that the model does not have, and for params as `with_params`.
        """
        self.model, self.tokenizer = model, tokenizer
        self.mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
        platform = self.mesh.devices.flat[0].platform
        self.backend = backend or CHOICES["gpu" if platform in ("cuda", "rocm") else platform]
        self.max_length = max_length or model.max_position
        if not 1 <= self.max_length <= model.max_position:
            raise UserError(f"max_length={self.max_length}: this model's positions end at {model.max_position}.")
        self.stop_ids, self.begin = tuple(stop_ids), tuple(begin)
        self._per_sequence = model.long_rope is not None and (
            long_rope == "per_sequence" or (long_rope == "auto" and max_length is None)
        )
        self._layout = placement.choose_layout(model, self.backend, self.mesh, cache_dtype)
        # Of partitioned programs the promise is 1e-5, not bits.
        self._alone = self.mesh.size == 1 and platform == "cpu"
        self._schemes = fitting.schemes_of(params)  # a change of low rank has none: merged, it is floats
        self._weights, self._weights_id = self._place(params, owned), object()
        self._cache_sharding = placement.cache_sharding(model, self._layout, self.mesh)
        _, self._attention_factor = inverse_frequencies(model, self.max_length)

    def with_params(self, params: Params) -> "Generator":
        """The same with other weights, laid out as at construction and run by the same compiled programs.

        They are a copy: what becomes of `params`, donation included, changes nothing. This generator keeps its own,
        so besides `params` two copies are held until one of the generators is dropped.

        Args: params: as training holds them or as `load_params` gives them; on any devices, in any float dtype. Where
          this generator's weights are quantised, floats are rounded to the nearest in the same scheme.
        Raises: UserError that names the first leaf that is missing, unknown, or of another shape, type or scheme.
        """
        other = copy.copy(self)
        other._weights = self._place(params)
        other._weights_id = object()
        return other

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        names: Sequence[int] = (),
        kept: PrefixCache | None = None,
    ) -> list[Result]:
        """Continues each prompt.

        Args:
          sampling: for all, or one for each prompt.
          names: the rows' own numbers, 0 to 2^31 - 1, for their draws; default 0, 1, ... where all have one sampling, 0
            where each has its own: an answer is then the one that its prompt gets alone.
          kept: of one prompt: the cache of the last one, for what both begin with; then of this one. It changes no bit.
        Raises: UserError for a prompt that is too long, or settings that mean nothing.
        """
        pieces = self.stream(prompts, sampling, names=names, kept=kept)
        results = {piece.row: piece.result for piece in pieces if piece.result}
        return [results.get(row, Result("", (), (), "length")) for row in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        names: Sequence[int] = (),
        kept: PrefixCache | None = None,
        with_logits: bool = False,
    ) -> Iterator[Piece]:
        """As `generate`, token by token; joined, a row's texts are its result's. Arguments are checked at the call.

        Of a stream that is not read to its end nothing is kept. A row with max_tokens=0 has no piece.
        """
        alike = sampling is None or isinstance(sampling, Sampling)
        samplings = [sampling or Sampling()] * len(prompts) if alike else list(sampling)
        names = list(names) or (list(range(len(prompts))) if alike else [0] * len(prompts))
        for what, given in (("samplings", samplings), ("names", names)):
            if len(given) != len(prompts):
                raise UserError(f"{len(given)} {what} for {len(prompts)} prompts.")
        names = [_name(name) for name in names]
        assert kept is None or len(prompts) == 1
        asked = [self._asked(*one) for one in zip(range(len(prompts)), prompts, samplings, names, strict=True)]
        return self._groups([one for one in asked if one.limit], with_logits, kept or PrefixCache())

    def _asked(self, row: int, prompt: str | Sequence[int], sampling: Sampling, name: int) -> _Asked:
        if sampling.stop and self.tokenizer is None:
            raise UserError("stop texts need a tokenizer, and this checkpoint has none. Give stop_ids.")
        ids = self.ids(prompt, room_for=min(1, sampling.max_tokens))
        return _Asked(row, ids, sampling, name, min(sampling.max_tokens, self.max_length - len(ids)))

    def ids(self, prompt: str | Sequence[int], room_for: int = 1) -> list[int]:
        """Raises: UserError for a prompt that is empty, too long, or has ids that the model lacks.

        Args: room_for: tokens of an answer that must fit behind it.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UserError("This checkpoint has no tokenizer: give prompts as token ids.")
            prompt = [*self.begin, *self.tokenizer.encode(prompt)]
        ids = self.known(prompt, "prompt")
        if len(ids) + room_for > self.max_length:
            answer = "with at least one of an answer " if room_for else ""
            raise UserError(f"The prompt has {len(ids)} tokens; {answer}{self._room()}")
        return ids

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """(T,) -> (T, V) float32: row t is what the model says of token t + 1. Computed as prompts are.

        Raises: UserError for a text that is empty, longer than the model takes, or has ids that the model lacks.
        """
        ids = self.known(ids, "text")
        if len(ids) > self.max_length:
            raise UserError(f"The text has {len(ids)} tokens; {self._room()}")
        parts = [
            np.asarray(values)[:count, : self.model.vocab_size]
            for values, count, _ in self._prefill(ids, self._frequencies(len(ids)), every=True)
        ]
        return np.concatenate(parts)

    def known(self, ids: Sequence[int], what: str) -> list[int]:
        """Raises: UserError for what is no list of ids, is empty, or has ids that the model lacks."""
        try:
            ids = [operator.index(i) for i in ids]
        except TypeError as error:
            raise UserError(f"The {what} must be a text or a list of ids, whole numbers: {error}.") from error
        if not ids:
            raise UserError(f"The {what} is empty, and this model has no token that begins a text. Give it some text.")
        if wrong := [i for i in ids if not 0 <= i < self.model.vocab_size]:
            raise UserError(f"The {what} has id {wrong[0]}; the model's ids are 0 to {self.model.vocab_size - 1}.")
        return ids

    def _room(self) -> str:
        declared = (
            f"\nIt was opened for max_length={self.max_length}; it has positions for {self.model.max_position}."
            if self.max_length < self.model.max_position
            else ""
        )
        return f"the model takes {self.max_length}.{declared}"

    def _groups(self, asked: list[_Asked], with_logits: bool, kept: PrefixCache) -> Iterator[Piece]:
        for start in range(0, len(asked), LARGEST_BATCH):
            yield from self._decode(asked[start : start + LARGEST_BATCH], with_logits, kept)

    def _decode(self, asked: list[_Asked], with_logits: bool, kept: PrefixCache) -> Iterator[Piece]:
        texts, filled = [self._continuation(one) for one in asked], [one.ids for one in asked]
        batch, chosen, length = self._begun(asked, kept)
        while True:
            going = [text.finish is None and text.count + 1 < one.limit for text, one in zip(texts, asked, strict=True)]
            ahead = any(going) and not any(self._switching(asked, texts, going, after=1))
            if ahead:  # Begun before the host reads what was chosen: a row that this ends has gone a place too far.
                batch, later = self._step(batch, going)
            tokens, logprobs = (np.concatenate([getattr(c, name) for c in chosen]) for name in ("tokens", "logprobs"))
            for slot, text in enumerate(texts):
                if text.finish is None:
                    new = text.add(int(tokens[slot]), float(logprobs[slot]))
                    seen = self._logits_of(chosen, slot) if with_logits else None
                    result = text.result() if text.finish else None
                    yield Piece(asked[slot].row, int(tokens[slot]), float(logprobs[slot]), new, result, seen)
                    if text.finish and text.ended_by_text:  # what the device cannot know
                        batch = batches.leave(batch, slot)
            live = [text.finish is None for text in texts]
            if not any(live):
                if len(asked) == 1:
                    frequencies = np.asarray(batch.rows.frequencies)[0]
                    kept.put(Prefix(filled[0], frequencies, batch.cache, length, self._weights_id))
                return
            if not ahead:
                batch = self._with_long_lists(batch, asked, texts, filled)
                batch, later = self._step(batch, live)
            chosen = [later]

    def _step(self, batch: Batch, live: Sequence[bool]) -> tuple[Batch, Chosen]:
        """A step of all rows up to the last that is live."""
        count = max(slot + 1 for slot, one in enumerate(live) if one) if self._alone else None
        return batches.step(self.model, self._layout, self._attention_factor, self._weights, batch, count)

    def _logits_of(self, chosen: list[Chosen], slot: int) -> np.ndarray:
        """(V,): of a step, or of the rows' entries, one by one."""
        logits = chosen[0].logits[slot] if len(chosen) == 1 else chosen[slot].logits[0]
        return np.asarray(logits[: self.model.vocab_size])

    def _switching(self, asked, texts, going: Sequence[bool], *, after: int) -> list[bool]:
        """Which of the rows that go on are where their long list takes over, with so many more tokens."""
        places = [len(one.ids) + text.count - 1 + after for one, text in zip(asked, texts, strict=True)]
        return [g and self._switches_at(place) for g, place in zip(going, places, strict=True)]

    def _with_long_lists(self, batch: Batch, asked, texts, filled: list[Sequence[int]]) -> Batch:
        """Where a row's long list takes over, its cache anew, since its keys were rotated by the short one.

        Returns: the batch; `filled` is changed where it is.
        """
        live = [text.finish is None for text in texts]
        for slot, switches in enumerate(self._switching(asked, texts, live, after=0)):
            if switches:
                filled[slot] = [*asked[slot].ids, *texts[slot].tokens[:-1]]
                frequencies = self._frequencies(len(filled[slot]) + 1)
                _, prompt = self._filled(filled[slot], frequencies)
                batch = batches.turned(self._layout, batch, slot, prompt, frequencies)
        return batch

    def _begun(self, asked: list[_Asked], kept: PrefixCache) -> tuple[Batch, list[Chosen], int]:
        """-> the batch with every prompt in it, what was chosen for each, and the cache's length."""
        held = 1 << (len(asked) - 1).bit_length()
        length = sum(self._pieces(max(len(one.ids) + one.limit for one in asked)))
        before, done = kept.take(asked[0].ids, self._frequencies(len(asked[0].ids)), self._weights_id)
        cache = self._empty_cache(held, length) if before is None else before.cache
        if before is not None and before.length < length:
            cache = programs.insert(self._layout, self._empty_cache(1, length), cache, np.int32(0))
        elif before is not None:
            length = before.length
        chosen, batch = [], None
        where = NamedSharding(self.mesh, PartitionSpec())
        for slot, one in enumerate(asked):
            frequencies, prompt = self._frequencies(len(one.ids)), None
            if before is None:
                logits, prompt = self._filled(one.ids, frequencies)
            else:
                *_, (logits, _, cache) = self._prefill(one.ids, frequencies, cache=cache, done=done)
            batch = batch or batches.empty(self.model, cache, max(self._layout.least_rows, held), where)
            new = batches.row(
                self.model,
                one.ids,
                frequencies=frequencies,
                limit=one.limit,
                sampling=one.sampling,
                name=one.name,
                stop_ids=self._stop_ids_of(one),
            )
            batch, first = batches.enter(self._layout, batch, slot, new, prompt, logits, own_bits=self._alone)
            chosen.append(first)
        return batch, chosen, length

    def _filled(self, ids: Sequence[int], frequencies: np.ndarray):
        """-> logits behind these ids, and a cache of one row with them."""
        *_, (logits, _, cache) = self._prefill(ids, frequencies)
        return logits, cache

    def _prefill(self, ids: Sequence[int], frequencies: np.ndarray, *, every: bool = False, cache=None, done: int = 0):
        """Yields, a chunk at a time: logits, how many of them count, and the prompt's cache so far.

        Args: cache: a row with the first `done` ids in it, whole chunks, and room for the others; None: without any.
        """
        chunks = programs.chunks(len(ids))
        if cache is None:
            cache = self._empty_cache(1, sum(chunks[-1][::2]))
        for start, count, bucket in chunks:
            if start < done:
                continue
            tokens = np.zeros(bucket, np.int32)
            tokens[:count] = ids[start : start + count]
            values, cache = programs.prefill(
                self.model,
                self._layout,
                self._attention_factor,
                every,
                self._weights,
                cache,
                tokens,
                np.int32(start),
                np.int32(count),
                frequencies,
            )
            yield values, count, cache

    def _empty_cache(self, rows: int, length: int):
        return programs.cache_maker(self.model, self._layout, rows, self._pieces(length), self._cache_sharding)()

    def _pieces(self, length: int) -> tuple[int, ...]:
        """Lengths of the pieces of a cache for so many places."""
        parts = self.mesh.shape["tensor"] if self._layout.cut_by_time is not None else 1
        unit = programs.CHUNKS[-1]
        return programs.piece_lengths(length, unit if unit % parts == 0 else unit * parts)

    def _frequencies(self, length: int) -> np.ndarray:
        """(R/2,) for a sequence of this length, by the rule of this generator."""
        return inverse_frequencies(self.model, length if self._per_sequence else self.max_length)[0]

    def _switches_at(self, position: int) -> bool:
        return self._per_sequence and position == self.model.long_rope.original_max_position

    def _stop_ids_of(self, one: _Asked) -> tuple[int, ...]:
        return (*self.stop_ids, *one.sampling.stop_ids)

    def _continuation(self, one: _Asked) -> Continuation:
        return Continuation(
            TextStream(self.tokenizer, before=one.ids) if self.tokenizer is not None else None,
            stop=one.sampling.stop,
            stop_ids=self._stop_ids_of(one),
            max_tokens=one.limit,
            known=self.tokenizer.vocab_size if self.tokenizer is not None else 0,
        )

    def _place(self, params: Params, owned: bool = False) -> cached.Weights:
        fitting.check(self.model, params, self._schemes)
        form = placement.matrix_format(self.backend, self.mesh)
        return placement.place(self.model, self._layout, params, self.mesh, form, schemes=self._schemes, owned=owned)


def _name(value: int) -> int:
    """A row's own number. Raises: UserError for what is none: cut to its type, it would be another row's."""
    try:
        name = operator.index(value)
    except TypeError:
        name = -1
    if not 0 <= name <= MOST_INT32:
        raise UserError(f"names has {value!r}: the number of a row is a whole number from 0 to {MOST_INT32}.")
    return name
