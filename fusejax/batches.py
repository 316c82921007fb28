"""Training batches: packed documents, and beside every token the rows of the sources that predict its successor.

Batch s is a function of (configuration, s) alone and is found in O(1): resuming needs nothing but the step number,
and the order does not depend on how many processes or threads make the batches.
"""

import io
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from fusejax import conversations, models, sources, tokenizers
from fusejax.alignment import Chains, load_token_table, unpack_chain
from fusejax.config import Config, ModelConfig
from fusejax.deciding import DocumentCe, deciding_ce, document_ce, joint_ce
from fusejax.errors import UserError
from fusejax.fusion import TokenTable
from fusejax.outputs import check_inputs, write_atomically
from fusejax.packing import Packing, pack
from fusejax.scoring import inputs_and_labels
from fusejax.source_cache import SourceCache
from fusejax.store import Store
from fusejax.tokenizers import Tokenizer

Arrays = dict[str, np.ndarray]


def token_tables(config: Config) -> list[TokenTable]:
    """Every source's token table, in the order of the configuration (host arrays).

    A token that the target's tokenizer has and its embedding has no row for, such as an added padding token, is none.
    """
    rows = models.read_config(config.target.model, config.target.revision)[1].vocab_size
    tables = [load_token_table(config.folder / "alignment" / source.label) for source in config.sources]
    known = [np.where(table.ids < rows, table.ids, -1) for table in tables]
    return [TokenTable(ids, table.prefix_hash) for ids, table in zip(known, tables, strict=True)]  # type: ignore[arg-type]


def token_counts(tokens: Store) -> np.ndarray:
    """int64 [documents]: the number of tokens of each, from a file beside the store that the first call writes."""
    path = tokens.folder / "counts.npy"
    if path.exists():
        counts = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        if counts.shape == (len(tokens),):
            return counts
    counts = np.fromiter((len(record["ids"]) for record in tokens), np.int64, len(tokens))
    buffer = io.BytesIO()
    np.save(buffer, counts, allow_pickle=False)
    write_atomically(path, buffer.getvalue())
    return counts


class Batches:
    """The batches of a job.

    A batch is a dict of arrays; B = batch.sequences, L = max_length, S sources, K the widest source's top-k:
      ids, segment_ids, positions int32 [B, L]: documents (text tokens and EOS; BOS in front where the target was
        trained with one), segment 0 = padding, positions restart with each document;
      labels int32 [B, L]: the document's next token, −1 where there is none; of a conversation, what the assistant
        says and what ends its turns alone.
    With sources also:
      source_ids int32 [B, L, S, K] in the source's vocabulary, −1 = empty; source_logprobs float32 [B, L, S, K];
      source_valid bool [B, L, S]: the row map has a row; source_consumed int32 [B, L, S]: bytes of that row's next
        token that lie before this row's boundary; source_labels int32 [B, L, S]: that row's true next source token,
        −1 = none;
      source_ce float32 [B, L, S]: the cross-entropy that decides between sources (`deciding_ce`); inf where a source
        says nothing;
      gold_logprobs float32 [B, L, S]: under alignment.gold_chain, the source's log-probability of the true next target
        token's bytes; −inf where there is none.
    Under `compat: fusellm` the documents of a sequence are one segment, whose labels run on from document to document.
    """

    def __init__(self, config: Config, with_sources: bool = True) -> None:
        """Opens the stores. Raises UserError where one is missing, or was made from another text or tokenizer."""
        self._config = config
        self._tokenizer = tokenizers.for_model(config.target)
        self._tokens = _tokens(config, self._tokenizer)
        counts = token_counts(self._tokens)
        # A document without a token has nothing to teach.
        self._lengths = np.where(counts > 0, counts + self._tokenizer.added, 0)
        self._sources = [_Source(config, source) for source in config.sources] if with_sources else []
        self._packings: list[Packing] = []
        self._first_sequence = [0]  # of each epoch
        if not self._lengths.any():
            raise UserError(f"{self._tokens.folder}: no document has any tokens, so there is nothing to train on")
        self.steps_total: int = config.batch.steps or self._steps_of(config.batch.epochs)

    def __len__(self) -> int:
        return self.steps_total

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of all documents, EOS and BOS included, padding not."""
        return int(self._lengths.sum())

    def documents(self, step: int) -> list[np.ndarray]:
        """The numbers of the documents in each sequence of batch `step`."""
        n = self._config.batch.sequences
        return [self._sequence(step * n + i) for i in range(n)]

    def batch(self, step: int, rows: Sequence[int] | None = None) -> Arrays:
        """Batch `step`, or only its sequences `rows`. After the last epoch's documents come empty sequences."""
        if not 0 <= step < self.steps_total:
            raise IndexError(f"step {step} of {self.steps_total}")
        sequences = self.documents(step)
        chosen = range(len(sequences)) if rows is None else rows
        out = self._empty(len(chosen))
        for b, sequence in enumerate(chosen):
            at = 0
            for segment, document in enumerate(sequences[sequence].tolist(), start=1):
                at += self._put(out, b, at, segment, document)
            if self._config.fusion.level == "block":
                for s, source in enumerate(self._sources):
                    parts = [source.document_ce(document) for document in sequences[sequence].tolist()]
                    out["source_ce"][b, :, s] = joint_ce(parts)
        return one_segment(out) if self._config.compat else out

    def iterate(
        self, start: int = 0, stop: int | None = None, rows: Sequence[int] | None = None, ahead: int = 2
    ) -> Iterator[tuple[int, Arrays]]:
        """(step, batch) from `start` on; a thread makes up to `ahead` batches in advance."""
        steps = iter(range(start, self.steps_total if stop is None else stop))
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            waiting: deque[tuple[int, Future[Arrays]]] = deque()
            try:
                for _ in range(ahead):
                    _submit(pool, waiting, self, steps, rows)
                while waiting:
                    step, future = waiting.popleft()
                    made = future.result()
                    _submit(pool, waiting, self, steps, rows)
                    yield step, made
            finally:
                for _, future in waiting:
                    future.cancel()

    def _steps_of(self, epochs: int) -> int:
        for _ in range(epochs):
            self._pack_next()
        return -(-self._first_sequence[epochs] // self._config.batch.sequences)

    def _pack_next(self) -> None:
        epoch = len(self._packings)
        config = self._config
        self._packings.append(pack(self._lengths, config.max_length, config.seed, epoch, config.batch.packed))
        self._first_sequence.append(self._first_sequence[-1] + len(self._packings[-1]))

    def _sequence(self, i: int) -> np.ndarray:
        """Documents of sequence i, counted over all epochs; none after the last epoch."""
        while self._first_sequence[-1] <= i:
            if self._config.batch.steps is None and len(self._packings) == self._config.batch.epochs:
                return np.zeros(0, np.int64)
            self._pack_next()
        epoch = int(np.searchsorted(self._first_sequence, i, side="right")) - 1
        return self._packings[epoch].sequence(i - self._first_sequence[epoch])

    def _empty(self, B: int) -> Arrays:
        L, S = self._config.max_length, len(self._sources)
        out = {name: np.zeros((B, L), np.int32) for name in ("ids", "segment_ids", "positions")}
        out["labels"] = np.full((B, L), -1, np.int32)
        if not S:
            return out
        K = max(source.width for source in self._sources)
        out["source_ids"] = np.full((B, L, S, K), -1, np.int32)
        out["source_logprobs"] = np.zeros((B, L, S, K), np.float32)
        out["source_valid"] = np.zeros((B, L, S), bool)
        out["source_consumed"] = np.zeros((B, L, S), np.int32)
        out["source_labels"] = np.full((B, L, S), -1, np.int32)
        out["source_ce"] = np.full((B, L, S), np.inf, np.float32)
        if self._config.fusion.gate and self._config.fusion.ce_unit == "byte":
            out["label_bytes"] = np.zeros((B, L), np.int32)
        if self._config.alignment.gold_chain:
            out["gold_logprobs"] = np.full((B, L, S), -np.inf, np.float32)
        return out

    def _put(self, out: Arrays, b: int, at: int, segment: int, document: int) -> int:
        """Write a document into sequence b from position `at` on; how many positions it takes."""
        record = self._tokens[document]
        inputs, labels = inputs_and_labels(record["ids"], self._tokenizer)
        n = len(inputs)
        span = slice(at, at + n + int(self._tokenizer.eos_id is not None))
        out["ids"][b, at : at + n] = inputs
        out["labels"][b, at : at + n] = conversations.spoken_labels(labels, record)
        if self._tokenizer.eos_id is not None:
            out["ids"][b, at + n] = self._tokenizer.eos_id
        out["segment_ids"][b, span] = segment
        out["positions"][b, span] = np.arange(span.stop - span.start)
        # The BOS row has no row of a source beside it.
        text = slice(at + int(self._tokenizer.adds_bos), at + n)
        if "label_bytes" in out:  # of the text that sources are measured on, too: after the first token, without EOS
            out["label_bytes"][b, text.start : text.stop - 1] = np.diff(record["boundaries"])
        for s, source in enumerate(self._sources):
            for name, array in source.rows(document, record).items():
                out[name][(b, text, s) if array.ndim == 1 else (b, text, s, slice(array.shape[1]))] = array
        return span.stop - span.start


def one_segment(batch: Arrays) -> Arrays:
    """The batch without boundaries between the documents of a sequence: one segment, running positions and labels."""
    ids, there = batch["ids"], batch["segment_ids"] > 0
    labels = np.full_like(batch["labels"], -1)
    labels[:, :-1] = np.where(there[:, 1:], ids[:, 1:], -1)
    positions = np.where(there, np.arange(ids.shape[1], dtype=np.int32), 0)
    return batch | {"segment_ids": there.astype(np.int32), "positions": positions, "labels": labels}


def _submit(
    pool: ThreadPoolExecutor,
    waiting: deque[tuple[int, Future[Arrays]]],
    batches: Batches,
    steps: Iterator[int],
    rows: Sequence[int] | None,
) -> None:
    step = next(steps, None)
    if step is not None:
        waiting.append((step, pool.submit(batches.batch, step, rows)))


def _tokens(config: Config, tokenizer: Tokenizer) -> Store:
    return Store(config.folder / "data/train/tokens" / tokenizer.fingerprint)


class _Source:
    """One source's stores, and its rows brought to the target's positions."""

    def __init__(self, config: Config, source: ModelConfig) -> None:
        self._config, self.label = config, source.label
        self._tokenizer = tokenizers.for_model(source)
        self._tokens = _tokens(config, self._tokenizer)
        self._has_targets_tokens = self._tokens.folder == _tokens(config, tokenizers.for_model(config.target)).folder
        self._cache = SourceCache.of(config, source)
        wanted = sources.inputs(config, source, self._tokenizer)
        check_inputs(self._cache.folder, {key: self._cache.inputs.get(key) for key in wanted}, wanted)
        self.width = self._cache.width
        if config.alignment.gold_chain or config.fusion.level == "token":
            self._cache.require_token_ce()
        self._row_maps = Store(config.folder / "alignment" / source.label)
        self._chains = Chains(config, source) if config.alignment.gold_chain else None

    def rows(self, document: int, target: Arrays) -> Arrays:
        """The source_* arrays of a document, [n, ...] for the n text tokens of the target; none if the source broke."""
        cache = self._cache[document]
        tokens = target if self._has_targets_tokens else self._tokens[document]
        row_map_T2 = self._row_maps[document]["row_map"]
        n_source = len(tokens["ids"])
        if n_source and not len(cache["ce"]):
            return {}
        if len(row_map_T2) != len(target["ids"]) or len(cache["ce"]) != n_source:
            raise UserError(
                f"{self._cache.folder}: document {document} has {len(cache['ce'])} rows for {n_source} tokens and "
                f"{len(row_map_T2)} row map entries for {len(target['ids'])} target tokens; remove it and "
                f"{self._row_maps.folder} to make both anew"
            )
        row_T, valid_T = np.maximum(row_map_T2[:, 0], 0), row_map_T2[:, 0] >= 0
        _, labels_R = inputs_and_labels(tokens["ids"], self._tokenizer)
        labels_R = labels_R[int(self._tokenizer.adds_bos) :]
        fusion = self._config.fusion
        out = {
            "source_ids": np.where(valid_T[:, None], cache["ids"][row_T], -1),
            "source_logprobs": cache["logprobs"][row_T],
            "source_valid": valid_T,
            "source_consumed": np.where(valid_T, row_map_T2[:, 1], 0),
            "source_labels": np.where(valid_T, labels_R[row_T], -1),
            "source_ce": deciding_ce(
                self._document_ce(cache, tokens),
                conversations.text_ce(cache["ce"], tokens),
                tokens["boundaries"],
                target["boundaries"],
                level=fusion.level,
                unit=fusion.ce_unit,
                window=fusion.window,
            ),
        }
        if self._chains is not None:
            out["gold_logprobs"] = unpack_chain(self._chains[document], row_map_T2, cache["ce"])
        return out

    def document_ce(self, document: int) -> DocumentCe:
        """This source's cross-entropy over a document; of no weight where the source broke."""
        cache, tokens = self._cache[document], self._tokens[document]
        if len(tokens["ids"]) and not len(cache["ce"]):
            return DocumentCe(0.0, 0.0)
        return self._document_ce(cache, tokens)

    def _document_ce(self, cache: Arrays, tokens: Arrays) -> DocumentCe:
        return document_ce(
            conversations.text_ce(cache["ce"], tokens),
            tokens["boundaries"],
            has_eos=self._tokenizer.eos_id is not None,
            unit=self._config.fusion.ce_unit,
            half=self._config.compat is not None,
        )
