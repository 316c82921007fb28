"""A model's next-token distributions over whole documents: what the source caches and the evaluation both need.

One document to a row, so that a document whose activations overflow cannot reach another one. Documents of similar
length share a batch, and batches have few shapes, so that few programs are compiled.
"""

import functools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from fusejax import sharding
from fusejax.errors import UserError
from fusejax.kernels.placement import Placement
from fusejax.kernels.sample_unembed import sample_unembed
from fusejax.kernels.topk_unembed import Implementation, topk_unembed
from fusejax.models.config import check_ids
from fusejax.tokenizers import Tokenizer

_AHEAD = 2  # batches that the device has queued while the host works on an earlier one
_HALVINGS = 3  # the shortest rows are max_length / 8
_SHARE = 0.8  # of the free memory may a batch take, by its program's own account
_MOST_TOKENS = 1 << 14  # of a batch on one device: more is no faster
_UNKNOWN_TOKENS = 1 << 13  # of a batch where devices do not tell their memory


class Scores(NamedTuple):
    """One document's distributions; row t is that of input t + 1.

    ids int32 [n, k]; logprobs float32 [n, k] sorted descending; ce float32 [n] in nats, 0 where the label is −1.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    ce: np.ndarray

    @property
    def broken(self) -> bool:
        """Whether the model gave values that are not numbers."""
        return bool(np.isnan(self.ce).any() or np.isnan(self.logprobs).any())


class Draws(NamedTuple):
    """Independent draws from each distribution, instead of its largest entries."""

    rounds: int
    seed: int


class Group(NamedTuple):
    """Documents that are scored together. `first`: the number of the first one, on which its draws depend."""

    name: Any
    inputs: Sequence[np.ndarray]
    labels: Sequence[np.ndarray]
    first: int = 0


class Batch(NamedTuple):
    """The documents (their numbers) that run together in one [rows, length] batch."""

    length: int
    rows: int
    documents: np.ndarray


def inputs_and_labels(ids: np.ndarray, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """What the model reads and what it should predict: int32 [b + n] each, b = 1 where a BOS goes in front, else 0.

    The last label is EOS; −1 where the tokenizer has none.
    """
    front = [tokenizer.bos_id] if tokenizer.adds_bos else []
    back = -1 if tokenizer.eos_id is None else tokenizer.eos_id
    line = np.concatenate([np.asarray(front, np.int32), np.asarray(ids, np.int32), np.asarray([back], np.int32)])
    return line[:-1], line[1:]


def check_fits(tokenizer: Tokenizer, rows: int, model: str) -> None:
    """UserError unless the model has an embedding row for every token of text and for EOS."""
    wanted = max((i for i, token in enumerate(tokenizer.canonical_bytes) if token is not None), default=0)
    wanted = max(wanted, tokenizer.eos_id or 0, (tokenizer.bos_id or 0) if tokenizer.adds_bos else 0)
    if wanted >= rows:
        raise UserError(
            f"{model}: its tokenizer does not fit: it has token id {wanted}, the model knows {rows} tokens; "
            "put the tokenizer that the model was trained with into its folder"
        )


def plan(lengths: np.ndarray, max_length: int, batch_tokens: int, row_multiple: int = 1) -> list[Batch]:
    """Batches of at most `batch_tokens` tokens (but at least one row), the longest documents first.

    lengths int [documents]. A batch is as long as max_length over 1, 2, 4 or 8, whichever just holds its longest
    document; rows depend on that length alone, are a multiple of `row_multiple`, and only the last may stay empty.
    """
    shapes = sorted({max(-(-max_length // (8 << i)) * 8, 8) for i in range(1, _HALVINGS + 1)} | {max_length})
    order = np.argsort(-np.asarray(lengths), kind="stable")
    batches = []
    at = 0
    while at < len(order):
        longest = lengths[order[at]]
        length = next((shape for shape in shapes if shape >= longest), None)
        if length is None:
            raise ValueError(f"a document of {longest} tokens does not fit max_length {max_length}")
        rows = max(batch_tokens // length // row_multiple, 1) * row_multiple
        batches.append(Batch(length, rows, order[at : at + rows]))
        at += rows
    return batches


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _forward(
    structure: Any,
    k: int,
    vocab_size: int | None,
    placement: Placement | None,
    implementation: Implementation,
    state: Any,
    ids_BL: jax.Array,
    labels_BL: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(ids, log-probabilities, CE) of a batch. Models of the same structure share the compiled program."""
    decoder = nnx.merge(structure, state)
    hidden_BLD = decoder.hidden(ids_BL)
    out = topk_unembed(
        hidden_BLD,
        decoder.unembedding(),
        labels_BL,
        k=k,
        vocab_size=vocab_size,
        logit_cap=decoder.config.logit_softcap,
        placement=placement,
        implementation=implementation,
    )
    return out.ids, out.logprobs, out.ce


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _draw(
    structure: Any,
    draws: Draws,
    vocab_size: int | None,
    placement: Placement | None,
    state: Any,
    ids_BL: jax.Array,
    labels_BL: jax.Array,
    numbers_B: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(drawn ids, no log-probabilities, CE) of a batch; a row's draws depend on seed, document and position alone."""
    B, L = ids_BL.shape
    decoder = nnx.merge(structure, state)

    def uniforms(number: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(draws.seed), number), position)
        return jax.random.uniform(key, (draws.rounds,))

    out = sample_unembed(
        decoder.hidden(ids_BL),
        decoder.unembedding(),
        jax.vmap(jax.vmap(uniforms, (None, 0)), (0, None))(numbers_B, jnp.arange(L)),
        labels_BL,
        vocab_size=vocab_size,
        logit_cap=decoder.config.logit_softcap,
        placement=placement,
    )
    return out.ids, jnp.zeros((B, L, 0)), out.ce


def program(
    structure: Any,
    *,
    k: int,
    vocab_size: int | None,
    mesh: Mesh,
    draws: Draws | None = None,
    implementation: Implementation = "auto",
) -> functools.partial[Any]:
    """The jitted function of a batch with its static arguments: (state, ids, labels[, numbers]) → arrays.

    structure: the graph of a Decoder (`nnx.split`). The rest as in `Scorer`.
    """
    placement = sharding.placement(mesh)
    if draws is None:
        return functools.partial(_forward, structure, k, vocab_size, placement, implementation)
    return functools.partial(_draw, structure, draws, vocab_size, placement)


class Scorer:
    """Runs a model over documents; a program is compiled for each batch length that occurs."""

    def __init__(
        self,
        model: Any,
        *,
        k: int,
        vocab_size: int | None = None,
        max_length: int,
        batch_tokens: int | None,
        mesh: Mesh,
        draws: Draws | None = None,
        implementation: Implementation = "auto",
    ) -> None:
        """model: a Decoder, laid out over `mesh`. k: entries kept of each distribution, 0 for the cross-entropy alone.

        vocab_size: ids from here on get probability 0 (rows of a padded embedding that stand for no token). draws:
        instead of the k largest entries, `Scores.ids` is as many draws, and `logprobs` has no columns. implementation:
        of `topk_unembed`. batch_tokens: of a batch; None: as many as the devices have memory for, see `_fitting`.
        """
        self.max_length, self._mesh = max_length, mesh
        self._row_multiple = sharding.batch_shards(mesh)
        structure, self._state = nnx.split(model)
        self._known: int = model.config.vocab_size
        self._program = program(
            structure, k=k, vocab_size=vocab_size, mesh=mesh, draws=draws, implementation=implementation
        )
        self._numbered = draws is not None
        # Over several processes' devices each gets all results: which of them keeps what is their caller's to say.
        self._gather = jax.jit(lambda out: out, out_shardings=sharding.replicated(mesh))
        self.batch_tokens = self._fitting() if batch_tokens is None else batch_tokens

    def __call__(
        self, inputs: Sequence[np.ndarray], labels: Sequence[np.ndarray]
    ) -> Iterator[tuple[list[int], list[Scores]]]:
        """Batch by batch, in the order that suits the device: (numbers of the documents, their scores).

        inputs, labels: int32 [n] for each document, see `inputs_and_labels`.
        """
        for _, places, scores in self.stream([Group(None, inputs, labels)]):
            yield places, scores

    def stream(self, groups: Iterable[Group]) -> Iterator[tuple[Any, list[int], list[Scores]]]:
        """The same over groups of documents, without a pause of the device in between.

        Yields (name, places in the group, scores). Batches never mix groups, so that a document's result does not
        depend on which other groups there are; a group's last batch comes before the next group's first. Raises
        UserError for a token id that the model does not know.
        """
        running: deque[tuple[Any, Batch, Any, np.ndarray]] = deque()
        for group in groups:
            lengths = np.array([len(line) for line in group.inputs], np.int64)
            for number, (line, labels) in enumerate(zip(group.inputs, group.labels, strict=True), group.first):
                check_ids(line, self._known, f"document {number}")
                check_ids(np.maximum(labels, 0), self._known, f"document {number}")  # -1: nothing to predict
            for batch in plan(lengths, self.max_length, self.batch_tokens, self._row_multiple):
                running.append((group.name, batch, self._start(batch, group), lengths))
                if len(running) > _AHEAD:
                    done, *rest = running.popleft()
                    yield done, *_finish(*rest)
        while running:
            done, *rest = running.popleft()
            yield done, *_finish(*rest)

    def _fitting(self) -> int:
        """Tokens of a batch: what the compiled program of the smallest one says that the devices' free memory holds.

        At most `_MOST_TOKENS` for each device that has rows of its own; `_UNKNOWN_TOKENS` in all where the devices say
        nothing of their memory, as CPUs do. Counts the rows' share of memory alone as if all of it grew with them.
        """
        free = _free_memory(self._mesh)
        if free is None:
            return _UNKNOWN_TOKENS
        sharding_B = sharding.batch_sharding(self._mesh)
        line_BL = jax.ShapeDtypeStruct((self._row_multiple, self.max_length), jnp.int32, sharding=sharding_B)
        number_B = jax.ShapeDtypeStruct((self._row_multiple,), jnp.int32, sharding=sharding_B)
        inputs = (line_BL, line_BL, *([number_B] if self._numbered else []))
        jitted: Any = self._program.func
        needed = jitted.lower(*self._program.args, self._state, *inputs).compile().memory_analysis()
        per_row = needed.temp_size_in_bytes + (_AHEAD + 1) * needed.output_size_in_bytes
        most = max(_MOST_TOKENS // self.max_length, 1)
        rows = int(np.clip(_SHARE * free // max(per_row, 1), 1, most))
        if self._mesh.is_multi_process:  # all run the same batches
            rows = int(multihost_utils.process_allgather(np.int32(rows)).min())
        return rows * self._row_multiple * self.max_length

    def _start(self, batch: Batch, group: Group) -> Any:
        ids_BL = np.zeros((batch.rows, batch.length), np.int32)
        labels_BL = np.full((batch.rows, batch.length), -1, np.int32)
        numbers_B = np.zeros(batch.rows, np.int32)
        for row, i in enumerate(batch.documents):
            ids_BL[row, : len(group.inputs[i])] = group.inputs[i]
            labels_BL[row, : len(group.labels[i])] = group.labels[i]
            numbers_B[row] = group.first + i
        arrays = {"ids": ids_BL, "labels": labels_BL} | ({"numbers": numbers_B} if self._numbered else {})
        out = self._program(self._state, *sharding.put_batch(arrays, self._mesh).values())
        return self._gather(out) if self._mesh.is_multi_process else out


def _free_memory(mesh: Mesh) -> int | None:
    """Bytes free on the fullest of this process' devices; None where they do not tell."""
    stats = [device.memory_stats() for device in mesh.local_devices]
    return min((s["bytes_limit"] - s["bytes_in_use"] for s in stats if s and "bytes_limit" in s), default=None)


def _finish(batch: Batch, arrays: Any, lengths: np.ndarray) -> tuple[list[int], list[Scores]]:
    """Wait for a batch and cut it into documents."""
    ids, logprobs, ce = jax.device_get(arrays)
    scores = [
        Scores(ids[row, : lengths[i]], logprobs[row, : lengths[i]], ce[row, : lengths[i]])
        for row, i in enumerate(batch.documents)
    ]
    return batch.documents.tolist(), scores
