"""Generator: prompts in, continuations out."""

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phijax.errors import UserError
from phijax.inference import placement, programs
from phijax.inference.prefix_cache import Prefix, PrefixCache
from phijax.inference.sampling import Sampling, Settings
from phijax.inference.stopping import Continuation, Result
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
    ):
        """`params` as `checkpoint.open.load_params` gives them; they are copied into the layout of inference.

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
        Raises: UserError for a max_length that the model does not have.
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
        form = placement.matrix_format(self.backend, self.mesh)
        self._weights = placement.place(model, self._layout, params, self.mesh, form)
        self._cache_sharding = placement.cache_sharding(model, self._layout, self.mesh)
        _, self._attention_factor = inverse_frequencies(model, self.max_length)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: Sampling | None = None,
        *,
        names: Sequence[int] = (),
        kept: PrefixCache | None = None,
    ) -> list[Result]:
        """Continues each prompt.

        Args:
          names: the rows' own numbers, for their draws; default 0, 1, ...
          kept: of one prompt: the cache of the last one, for what both begin with; then of this one. It changes no bit.
        Raises: UserError for a prompt that is too long, or settings that mean nothing.
        """
        pieces = self.stream(prompts, sampling, names=names, kept=kept)
        results = {piece.row: piece.result for piece in pieces if piece.result}
        if sampling is not None and sampling.max_tokens == 0:
            return [Result("", (), (), "length") for _ in prompts]
        return [results[row] for row in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: Sampling | None = None,
        *,
        names: Sequence[int] = (),
        kept: PrefixCache | None = None,
        with_logits: bool = False,
    ) -> Iterator[Piece]:
        """As `generate`, token by token; joined, a row's texts are its result's. Arguments are checked at the call.

        Of a stream that is not read to its end nothing is kept. With max_tokens=0 there is no piece.
        """
        sampling = sampling or Sampling()
        if sampling.stop and self.tokenizer is None:
            raise UserError("stop texts need a tokenizer, and this checkpoint has none. Give stop_ids.")
        ids = [self.ids(prompt, room_for=min(1, sampling.max_tokens)) for prompt in prompts]
        names = list(names) or list(range(len(ids)))
        if len(names) != len(ids):
            raise UserError(f"{len(names)} names for {len(ids)} prompts.")
        assert kept is None or len(ids) == 1
        if sampling.max_tokens == 0:
            return iter(())
        return self._groups(ids, names, sampling, with_logits, kept or PrefixCache())

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

    def _groups(self, ids, names, sampling, with_logits, kept: PrefixCache) -> Iterator[Piece]:
        for start in range(0, len(ids), LARGEST_BATCH):
            here = slice(start, start + LARGEST_BATCH)
            for piece in self._decode(ids[here], names[here], sampling, with_logits, kept):
                yield dataclasses.replace(piece, row=piece.row + start)

    def _decode(
        self, ids: list[list[int]], names: list[int], sampling: Sampling, with_logits: bool, kept: PrefixCache
    ) -> Iterator[Piece]:
        room = [min(sampling.max_tokens, self.max_length - len(i)) for i in ids]
        texts = [self._continuation(i, n, sampling) for i, n in zip(ids, room, strict=True)]
        count = len(ids)
        held = 1 << (count - 1).bit_length()
        batch = max(self._layout.least_rows, held)
        one_by_one = np.int32(count) if self._alone else None
        plan, settings = sampling.plan, Settings.of(sampling)
        length = sum(self._pieces(max(len(i) + n for i, n in zip(ids, room, strict=True))))
        frequencies = np.stack([self._frequencies(len(i)) for i in ids] + [self._frequencies(1)] * (batch - count))
        behind, cache, length = self._begun(ids, frequencies, held, length, kept)
        filled = list(ids)
        logits = jnp.concatenate(behind + [behind[0]] * (batch - count))
        rows = self._rows(ids, names, batch, plan.penalises)
        logprobs, rows = programs.first(plan, settings, logits, rows, one_by_one)

        def step(advance: np.ndarray):
            return programs.step(
                self.model,
                self._layout,
                self._attention_factor,
                plan,
                self._weights,
                cache,
                settings,
                rows,
                frequencies,
                advance,
                one_by_one,
            )

        while True:
            ahead = None
            going = [text.finish is None and text.count + 1 < n for text, n in zip(texts, room, strict=True)]
            switch = any(g and self._switches_at(len(i) + t.count) for g, i, t in zip(going, ids, texts, strict=True))
            if any(going) and not switch:
                # Begun before the host reads the last one's tokens: a row that these end has gone a place too far.
                ahead = step(np.array(going + [False] * (batch - count), np.int32))
            tokens = np.asarray(rows.tokens)
            values = np.asarray(logprobs)
            for row, text in enumerate(texts):
                if text.finish is None:
                    new = text.add(int(tokens[row]), float(values[row]))
                    seen = np.asarray(logits[row, : self.model.vocab_size]) if with_logits else None
                    result = text.result() if text.finish else None
                    yield Piece(row, int(tokens[row]), float(values[row]), new, result, seen)
            advance = np.array([text.finish is None for text in texts] + [False] * (batch - count), np.int32)
            if not advance.any():
                if count == 1:
                    kept.put(Prefix(filled[0], frequencies[0], cache if ahead is None else ahead[-1], length))
                return
            if ahead is None:
                cache = self._with_long_lists(cache, ids, texts, filled, frequencies)
                ahead = step(advance)
            logits, logprobs, rows, cache = ahead

    def _with_long_lists(self, cache, ids, texts, filled: list[Sequence[int]], frequencies: np.ndarray):
        """Where a row's long list takes over, the cache anew, since its keys were rotated by the short one.

        Returns: the cache; `filled` and `frequencies` are changed where they are.
        """
        for row, text in enumerate(texts):
            if text.finish is None and self._switches_at(len(ids[row]) + text.count - 1):
                filled[row] = [*ids[row], *text.tokens[:-1]]
                frequencies[row] = self._frequencies(len(filled[row]) + 1)
                _, cache = self._filled(cache, row, filled[row], frequencies[row])
        return cache

    def _begun(self, ids: list[list[int]], frequencies: np.ndarray, rows: int, length: int, kept: PrefixCache):
        """-> logits behind each prompt, a cache of `rows` rows with them, and its length: `length`, or more."""
        before, done = kept.take(ids[0], frequencies[0])
        if before is None:
            cache, behind = self._empty_cache(rows, length), []
            for row, prompt in enumerate(ids):
                values, cache = self._filled(cache, row, prompt, frequencies[row])
                behind.append(values)
            return behind, cache, length
        cache = before.cache
        if before.length < length:
            cache = programs.insert(self._layout, self._empty_cache(1, length), cache, np.int32(0))
        *_, (values, _, cache) = self._prefill(ids[0], frequencies[0], cache=cache, done=done)
        return [values], cache, max(length, before.length)

    def _filled(self, cache, row: int, ids: Sequence[int], frequencies: np.ndarray):
        """-> logits behind these ids, and the cache with them in its row `row`."""
        *_, (values, _, prompt_cache) = self._prefill(ids, frequencies)
        return values, programs.insert(self._layout, cache, prompt_cache, np.int32(row))

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

    def _rows(self, ids: list[list[int]], names: list[int], batch: int, penalises: bool) -> programs.Rows:
        surplus = [0] * (batch - len(ids))
        seen = None
        if penalises:
            seen = np.zeros((batch, self.model.padded_vocab_size), bool)
            for row, prompt in enumerate(ids):
                seen[row, prompt] = True
        rows = programs.Rows(
            tokens=np.zeros(batch, np.int32),
            positions=np.array([*map(len, ids), *surplus], np.int32),
            numbers=np.zeros(batch, np.int32),
            names=np.array([*names, *surplus], np.int32),
            seen=seen,
        )
        return jax.device_put(rows, NamedSharding(self.mesh, PartitionSpec()))

    def _frequencies(self, length: int) -> np.ndarray:
        """(R/2,) for a sequence of this length, by the rule of this generator."""
        return inverse_frequencies(self.model, length if self._per_sequence else self.max_length)[0]

    def _switches_at(self, position: int) -> bool:
        return self._per_sequence and position == self.model.long_rope.original_max_position

    def _continuation(self, ids: list[int], room: int, sampling: Sampling) -> Continuation:
        return Continuation(
            TextStream(self.tokenizer, before=ids) if self.tokenizer is not None else None,
            stop=sampling.stop,
            stop_ids=(*self.stop_ids, *sampling.stop_ids),
            max_tokens=room,
            known=self.tokenizer.vocab_size if self.tokenizer is not None else 0,
        )
