"""The stage `align`: row maps of every document and the token table, for each source; then its gold chains."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, FiniteFloat

from fusejax import corpus, hosts, outputs, paths, tokenizers
from fusejax.alignment import cache
from fusejax.alignment.causes import fallback_causes
from fusejax.alignment.chain import GoldChain, pack_chain, unpack_chain
from fusejax.alignment.quality import KINDS, Quality, measure, row_kinds, top_tokens
from fusejax.alignment.rows import Tokens, row_mapper
from fusejax.alignment.tokens import TokenTable, table_columns
from fusejax.alignment.turns import View, map_turns, views
from fusejax.config import Config, ModelConfig
from fusejax.conversations import text_ce
from fusejax.deciding import document_ce
from fusejax.errors import UserError
from fusejax.outputs import Inputs, fingerprint, write_atomically
from fusejax.parallel import run_shards
from fusejax.progress import progress, say
from fusejax.source_cache import SourceCache, folder_of
from fusejax.store import Store, StoreWriter, read_manifest

if TYPE_CHECKING:
    from fusejax import fusion

_TABLE = "token_table.npz"
_REPORT = "report.json"
_COUNTED = 4096  # about how many documents the token map `stats` counts in, evenly over the corpus
_SAMPLE = 256  # about how many documents the report is of where there is a cache to read, evenly over the corpus
_REPORT_FORMAT = 4


class _Documents(BaseModel):
    counted: int
    measured: int
    there: int


class _Collisions(BaseModel):
    rows: float | None
    mass: float | None


class _TopToken(BaseModel):
    token: str
    image: str | None
    mass: float


class _Report(BaseModel):
    """What is read of a report; see `Quality.report`."""

    documents: _Documents
    rows: int
    share: FiniteFloat
    kinds: dict[str, FiniteFloat]
    fallback_causes: dict[str, FiniteFloat]
    empty: float | None
    mass_kept: float | None
    collisions: _Collisions
    mapped_ce: float | None
    mapped_ce_per_byte: float | None
    source_top_ce_per_byte: float | None
    source_ce_per_byte: float | None
    text_ce: list[tuple[str, float | None]]
    top_tokens: list[_TopToken]


def run(config: Config) -> None:
    """Write `alignment/<label>` of every source that is not there yet; a half-done one goes on where it stopped.

    Each is a store in the documents' order, of `row_map` int16 or int32 [n_target, 2] (see
    `fusejax.alignment.row_map`), kinds and causes (see `quality`), with the token table and the report beside it. Where
    the source's cache is there and alignment.gold_chain is set, `chain` in it is a store of the gold chains (see
    `chain.pack_chain`). Raises UserError where a folder was made from another text or tokenizer.

    Documents are spread over processes and, under jax.distributed, over hosts that share the folder; the result does
    not depend on how many there are.
    """
    for source in config.sources:
        pair = Pair(config, source)
        made = pair.make_row_maps()
        made |= pair.make_chains()
        made |= pair.make_report()
        report = read_report(config.folder, source.label)
        say(f"align {source.label}: {_said(report) if made else 'done before, skipped'}")


def _said(report: dict[str, Any]) -> str:
    counted, there = report["documents"]["counted"], report["documents"]["there"]
    sample = "" if counted == there else f" (in {counted} of {there} documents)"
    return f"{report['share']:.1%} of {report['rows']} rows aligned{sample}"


def read_report(folder: Path, label: str) -> dict[str, Any]:
    """What the stage says of a source's alignment in the output folder `folder`: see `fusejax.alignment.quality`."""
    path = folder / "alignment" / label / _REPORT
    found = outputs.read_object(path, {"report": _Report}, "remove it and run the stage `align` again")
    if found is None:
        raise UserError(f"{path}: no alignment report here; run the stage `align` first")
    return found["report"]


def load_token_table(folder: str | Path) -> "fusion.TokenTable":
    """`read_token_table` (host arrays) as the fusion takes it; needs JAX."""
    from fusejax import fusion

    return fusion.TokenTable(*read_token_table(folder))  # type: ignore[arg-type]


def read_token_table(folder: str | Path) -> TokenTable:
    """What the stage left in alignment/<label>. Raises UserError where there is no token table, or a damaged one."""
    path = paths.at(folder) / _TABLE
    try:
        return cache.unpack(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no token map here; run the stage `align` first") from None
    except cache.DAMAGED as error:
        raise UserError(f"{path}: cannot be read ({error}); remove {folder} and run the stage `align` again") from None


class Chains:
    """The gold chains of one source, as the stage left them."""

    def __init__(self, config: Config, source: ModelConfig) -> None:
        """Raises UserError where they are missing or were made from another cache of the source."""
        folder = config.folder / "alignment" / source.label / "chain"
        manifest = read_manifest(folder)
        cached = SourceCache.of(config, source).inputs
        if manifest is None or not manifest["complete"] or manifest["inputs"].get("cache") != fingerprint(cached):
            raise UserError(f"{folder}: the gold chains are not made from this cache; run the stage `align` again")
        self._store = Store(folder)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """Document i's, packed: see `chain.unpack_chain`."""
        return self._store[i]


class Pair:
    """One source's alignment with the target, over all documents."""

    def __init__(self, config: Config, source: ModelConfig) -> None:
        self._config, self._model, self._label = config, source, source.label
        self._folder = config.folder / "alignment" / source.label
        self._target, self._source = tokenizers.for_model(config.target), tokenizers.for_model(source)
        self._chat = self._target.template is not None
        # Chat templates can make other tokens of a turn's beginning, so that rows may stand inside tokens all the same.
        self._same = self._target.text_fingerprint == self._source.text_fingerprint and not self._chat
        self._documents = corpus.documents(config)
        tokens = config.folder / "data/train/tokens"
        self._target_tokens = Store(tokens / self._target.fingerprint)
        self._source_tokens = Store(tokens / self._source.fingerprint)

    def make_row_maps(self) -> bool:
        """The store of row maps and the token table beside it; whether there was anything to do."""
        inputs = self._inputs() | {"tokens": self._config.alignment.tokens}
        return self._make("", self._folder, inputs, _RowMaps, table=True)

    def make_chains(self) -> bool:
        """The store of gold chains; whether there was anything to do. Nothing where there is no cache to make it of."""
        cached = self._cache()
        if cached is None or not self._config.alignment.gold_chain:
            return False
        cached.require_token_ce()
        folder = self._folder / "chain"
        inputs = self._inputs() | {"cache": fingerprint(cached.inputs)}
        manifest = read_manifest(folder)
        if manifest is not None and manifest["inputs"] != inputs and hosts.index_and_count()[0] == 0:
            paths.remove_folder(folder)  # the cache was made anew
        hosts.wait_for_all(f"align {self._label}: old chains removed")
        return self._make(": gold chains", folder, inputs, _Chains)

    def _make(self, what: str, folder: Path, inputs: Inputs, kind: "type[_Shards]", table: bool = False) -> bool:
        writer = StoreWriter(folder, inputs, len(self._documents))
        table_missing = table and not _is_whole(folder / _TABLE)
        done = writer.done and not table_missing
        hosts.wait_for_all(f"align {self._label}{what}: read")  # by all, before one of them changes it
        if done:
            return False
        if table_missing and hosts.index_and_count()[0] == 0:
            self._write_table()  # first, so that a complete store always has one beside it
        title = f"align {self._label}{what}"
        maker = partial(kind, self._config, self._model, folder, inputs)
        run_shards(title, maker, hosts.own(writer.missing()), self._config.alignment.workers)
        hosts.wait_for_all(title)
        if hosts.index_and_count()[0] == 0:
            writer.finish({})
        hosts.wait_for_all(f"{title}: finished")
        return True

    def make_report(self) -> bool:
        """The report beside the row maps, where what it is made from has changed; whether there was anything to do."""
        cached = self._cache()
        made_from = {
            "format": _REPORT_FORMAT,
            "row_maps": fingerprint(Store(self._folder).inputs),
            "cache": None if cached is None else fingerprint(cached.inputs),
            "gold_chain": self._config.alignment.gold_chain,
        }
        path = self._folder / _REPORT
        fresh = _made_from(path) == made_from
        hosts.wait_for_all(f"align {self._label}: report read")  # by all, before one of them changes it
        if fresh:
            return False
        if hosts.index_and_count()[0] == 0:
            report = {"made_from": made_from, "report": self._report(cached)}
            write_atomically(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        hosts.wait_for_all(f"align {self._label}: report")
        return True

    def _inputs(self) -> dict[str, str]:
        return {
            "text": fingerprint(self._documents.inputs),
            "target_tokenizer": self._target.fingerprint,
            "source_tokenizer": self._source.fingerprint,
            "rows": self._config.alignment.rows,
        }

    def _cache(self) -> SourceCache | None:
        """The source's cache, where it is complete."""
        manifest = read_manifest(folder_of(self._config, self._model))
        return SourceCache.of(self._config, self._model) if (manifest or {}).get("complete") else None

    def _write_table(self) -> None:
        columns = 1 if self._same else table_columns(self._source, self._config.alignment.rows)
        method, sample = self._config.alignment.tokens, None
        if method == "stats":
            every = -(-len(self._documents) // _COUNTED)
            sample = (pair for i in range(0, len(self._documents), every) for pair in self._texts(i))
        table = cache.token_table(self._target, self._source, method, columns, sample)
        write_atomically(self._folder / _TABLE, cache.pack(table))

    def _tokens(self, i: int) -> tuple[Tokens, Tokens]:
        target, source = self._target_tokens[i], self._source_tokens[i]
        return Tokens(target["ids"], target["boundaries"]), Tokens(source["ids"], source["boundaries"])

    def _views(self, i: int) -> Iterator[View]:
        """The turns of conversation i."""
        return views(self._documents[i]["text"], self._target_tokens[i], self._source_tokens[i])

    def _texts(self, i: int) -> list[tuple[Tokens, Tokens]]:
        """Document i's text in both tokenizers; of a conversation each turn's."""
        return [view.said() for view in self._views(i)] if self._chat else [self._tokens(i)]

    def _report(self, cached: SourceCache | None) -> dict[str, Any]:
        """The report of all documents by their row maps alone or, where the source's cache is there, of a sample.

        Which rows are left empty shows in the cache only, so all numbers are then those of the sample.
        """
        total, table = Quality(), read_token_table(self._folder)
        chains = Chains(self._config, self._model) if cached and self._config.alignment.gold_chain else None
        every = 1 if cached is None else -(-len(self._documents) // _SAMPLE)
        sample, row_maps = range(0, len(self._documents), every), Store(self._folder)
        by_document: list[list[Any]] = []  # [domain, nats per byte] of each document of the sample
        with progress(f"align {self._label}: report", len(sample)) as bar:
            for i in sample:
                bar.advance()
                record = row_maps[i]
                if cached is None:
                    total.add_rows(record["kinds"], record["causes"])
                    continue
                values, row_map_T2 = cached[i], record["row_map"]
                by_document.append(self._text_ce(i, values["ce"]))
                gold_T = None
                if chains is not None and len(values["ce"]):
                    gold_T = unpack_chain(chains[i], row_map_T2, values["ce"])
                self._add(total, i, row_map_T2, table, values, gold_T, record["causes"])
        report = total.report()
        report["documents"]["there"] = len(self._documents)
        report["text_ce"] = by_document
        return report | {"top_tokens": top_tokens(total, table, self._target, self._source)}

    def _add(
        self,
        total: Quality,
        i: int,
        row_map_T2: np.ndarray,
        table: TokenTable,
        values: dict[str, np.ndarray],
        gold_T: np.ndarray | None,
        causes: np.ndarray,
    ) -> None:
        """Add document i, of a conversation its turns, to the report's numbers."""
        parts: list[tuple[Tokens, Tokens, np.ndarray, slice, slice]]
        if self._chat:
            parts = [(v.target, v.source, v.local(row_map_T2), v.target_rows, v.source_rows) for v in self._views(i)]
        else:
            parts = [(*self._tokens(i), row_map_T2, slice(None), slice(None))]
        kinds_T, empty_N, at = [], [], 0
        for target, source, rows_T2, target_rows, source_rows in parts:
            kinds_T.append(row_kinds(target, source, rows_T2))
            if len(values["ce"]):
                seen = {name: array[source_rows] for name, array in values.items()}
                gold = None if gold_T is None else gold_T[target_rows]
                found = measure(total, target, source, rows_T2, table, seen, self._target.vocab_size, gold)
            else:  # the source gave no numbers there
                found = np.arange(len(rows_T2))
            empty_N.append(found + at)
            at += len(rows_T2)
        total.add_measured(np.concatenate(kinds_T), causes, np.concatenate(empty_N))

    def _text_ce(self, i: int, ce_R: np.ndarray) -> list[Any]:
        """[domain, nats per byte] of document i; None where the source has no number there, as JSON knows no inf."""
        ce = float("inf")
        if len(ce_R):
            tokens, has_eos = self._source_tokens[i], self._source.eos_id is not None
            ce = document_ce(text_ce(ce_R, tokens), tokens["boundaries"], has_eos=has_eos).mean
        return [self._documents[i]["domain"], ce if np.isfinite(ce) else None]


def _is_whole(path: Path) -> bool:
    """Whether there is a token table that can be read."""
    try:
        cache.unpack(path.read_bytes())
    except cache.DAMAGED:
        return False
    return True


def _made_from(path: Path) -> Any:
    """What a report was made from; None where there is none, or a damaged one."""
    try:
        return json.loads(path.read_text("utf-8"))["made_from"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


class _Shards(Pair, ABC):
    """Makes shards of one of a pair's stores, in any process."""

    def __init__(self, config: Config, source: ModelConfig, folder: Path, inputs: Inputs) -> None:
        super().__init__(config, source)
        self._writer = StoreWriter(folder, inputs, len(self._documents))

    def __call__(self, shard: int, span: range) -> None:
        self._writer.write(shard, [self.record(i) for i in span])

    @abstractmethod
    def record(self, i: int) -> dict[str, np.ndarray]:
        """What the store holds of document i."""


class _RowMaps(_Shards):
    def __init__(self, config: Config, source: ModelConfig, folder: Path, inputs: Inputs) -> None:
        super().__init__(config, source, folder, inputs)
        self._map_rows = row_mapper(self._target, self._source, config.alignment.rows)

    def record(self, i: int) -> dict[str, np.ndarray]:
        target, source = self._tokens(i)
        text = self._documents[i]["text"]
        if self._chat:
            both = (self._target, self._source)
            row_map_T2 = map_turns(text, self._target_tokens[i], self._source_tokens[i], both, self._map_rows)
            counts = [self._counts(v.data, v.target, v.source, v.local(row_map_T2)) for v in self._views(i)]
        else:
            row_map_T2 = self._map_rows(text.encode("utf-8"), target, source)
            counts = [self._counts(text.encode("utf-8"), target, source, row_map_T2)]
        kinds, causes = (np.sum(each, 0).astype(np.int32) for each in zip(*counts, strict=True))
        dtype = np.int16 if len(source.ids) <= np.iinfo(np.int16).max else np.int32
        return {"row_map": row_map_T2.astype(dtype), "kinds": kinds, "causes": causes}

    def _counts(
        self, data: bytes, target: Tokens, source: Tokens, row_map_T2: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """How many rows have each kind, and each cause."""
        kinds = np.bincount(row_kinds(target, source, row_map_T2), minlength=len(KINDS))
        rows = self._config.alignment.rows
        return kinds, fallback_causes(data, target, source, self._target, self._source, row_map_T2, rows)


class _Chains(_Shards):
    def __init__(self, config: Config, source: ModelConfig, folder: Path, inputs: Inputs) -> None:
        super().__init__(config, source, folder, inputs)
        self._row_maps, self._rows = Store(self._folder), SourceCache.of(config, source)
        self._chain = GoldChain(self._source)

    def record(self, i: int) -> dict[str, np.ndarray]:
        (target, source), row_map_T2, rows = self._tokens(i), self._row_maps[i]["row_map"], self._rows[i]
        if not len(rows["ce"]):  # the source gave no numbers there
            return {"rows": np.zeros(0, np.uint16), "values": np.zeros(0, np.float32)}
        if self._chat:
            gold_T = np.full(len(row_map_T2), -np.inf, np.float32)
            for v in self._views(i):
                seen = {name: array[v.source_rows] for name, array in rows.items()}
                local_T2 = v.local(row_map_T2)
                gold_T[v.target_rows] = self._chain(
                    v.target.boundaries, local_T2, v.source.ids, v.source.boundaries, seen
                )
        else:
            gold_T = self._chain(target.boundaries, row_map_T2, source.ids, source.boundaries, rows)
        return pack_chain(gold_T, row_map_T2, rows["ce"])
