"""The stage `align`: row maps of every document and the token map, for each source, from text and tokenizers alone."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from fusejax import tokenizers
from fusejax.alignment.chain import GoldChain
from fusejax.alignment.quality import KINDS, Quality, measure, row_kinds
from fusejax.alignment.rows import Tokens, row_mapper
from fusejax.alignment.tokens import TokenTable, table_columns, token_table
from fusejax.config import Config
from fusejax.errors import UserError
from fusejax.progress import progress, say
from fusejax.source_cache import SourceCache
from fusejax.store import Store, StoreWriter, fingerprint, read_manifest, write_atomically
from fusejax.tokenizers import Tokenizer

if TYPE_CHECKING:
    from fusejax import fusion

_TABLE = "token_map.npz"
_COUNTED = 4096  # about how many documents the token map `stats` counts in, evenly over the corpus
_SAMPLE = 256  # about how many documents have their mapped distributions measured, evenly over the corpus


def run(config: Config) -> None:
    """Write `alignment/<label>` of every source that is not there yet; a half-done one goes on where it stopped.

    Each is a store in the documents' order with `row_map` int32[n_target, 2] (see `fusejax.alignment.row_map`), a file
    with the token table, and a summary: rows, aligned, share, kinds, mass_kept, mapped_ce (see `quality`; the last two
    where the source's cache is there). Raises UserError where a folder was made from another text or tokenizer.
    """
    target = tokenizers.for_model(config.target)
    documents = Store(config.folder / "data/train/documents")
    for source in config.sources:
        folder = config.folder / "alignment" / source.label
        _Pair(config, folder, documents, target, tokenizers.for_model(source), source.label).run()


def load_token_table(folder: str | Path) -> "fusion.TokenTable":
    """The token table (host arrays) that the stage left in alignment/<label>."""
    from fusejax import fusion

    path = Path(folder) / _TABLE
    try:
        with np.load(path, allow_pickle=False) as table:
            return fusion.TokenTable(table["ids"], table["prefix_hash"])
    except FileNotFoundError:
        raise UserError(f"{path}: no token map here; run the stage `align` first") from None
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove {folder} and run the stage `align` again") from None


class _Pair:
    """The target's tokenizer and one source's."""

    def __init__(
        self, config: Config, folder: Path, documents: Store, target: Tokenizer, source: Tokenizer, label: str
    ) -> None:
        self._config, self._folder, self._documents, self._label = config, folder, documents, label
        self._target, self._source = target, source
        tokens = config.folder / "data/train/tokens"
        self._target_tokens = Store(tokens / target.fingerprint)
        self._source_tokens = Store(tokens / source.fingerprint)
        self._same = target.text_fingerprint == source.text_fingerprint

    def run(self) -> None:
        inputs = {
            "text": fingerprint(self._documents.inputs),
            "target_tokenizer": self._target.fingerprint,
            "source_tokenizer": self._source.fingerprint,
            "rows": self._config.alignment.rows,
            "tokens": self._config.alignment.tokens,
        }
        writer = StoreWriter(self._folder, inputs, len(self._documents))
        if writer.done and writer.summary and (self._folder / _TABLE).exists():
            say(f"align {self._label}: done before, skipped")
            return
        table = self._write_table()
        self._map_rows = row_mapper(self._target, self._source, self._config.alignment.rows)
        missing = writer.missing()
        with progress(f"align {self._label}", sum(len(span) for _, span in missing)) as bar:
            for shard, span in missing:
                writer.write(shard, [self._record(i) for i in span])
                bar.advance(len(span))
        writer.finish({})
        report = self._report(table)
        writer.finish(report)
        say(f"align {self._label}: {report['share']:.1%} of {report['rows']} rows aligned")

    def _write_table(self) -> TokenTable:
        """The token table goes first, so that a complete store always has one beside it."""
        columns = 1 if self._same else table_columns(self._source, self._config.alignment.rows)
        sample = None
        if self._config.alignment.tokens == "stats":
            every = -(-len(self._documents) // _COUNTED)
            sample = (self._tokens(i) for i in range(0, len(self._documents), every))
        table = token_table(self._target, self._source, self._config.alignment.tokens, columns, sample)
        buffer = io.BytesIO()
        np.savez(buffer, ids=table.ids, prefix_hash=table.prefix_hash)
        write_atomically(self._folder / _TABLE, buffer.getvalue())
        return table

    def _tokens(self, i: int) -> tuple[Tokens, Tokens]:
        target, source = self._target_tokens[i], self._source_tokens[i]
        return Tokens(target["ids"], target["boundaries"]), Tokens(source["ids"], source["boundaries"])

    def _record(self, i: int) -> dict[str, np.ndarray]:
        target, source = self._tokens(i)
        row_map_T2 = self._map_rows(self._documents[i]["text"].encode("utf-8"), target, source)
        kinds = np.bincount(row_kinds(target, source, row_map_T2), minlength=len(KINDS))
        return {"row_map": row_map_T2, "kinds": kinds.astype(np.int32)}

    def _report(self, table: TokenTable) -> dict[str, Any]:
        """The summary; what needs the source's rows is measured on a sample, where its cache is there."""
        total = Quality()
        cache_folder = self._config.folder / "sources" / self._label
        cached = (read_manifest(cache_folder) or {}).get("complete", False)
        cache = SourceCache(cache_folder) if cached else None
        chain = GoldChain(self._source) if self._config.alignment.gold_chain else None
        every = -(-len(self._documents) // _SAMPLE)
        for i, record in enumerate(Store(self._folder)):
            total.add_kinds(record["kinds"])
            if cache is not None and i % every == 0:
                target, source = self._tokens(i)
                rows = cache[i]
                if len(rows["ce"]):  # else the source gave no numbers there
                    measure(total, target, source, record["row_map"], table, rows, self._target.vocab_size, chain)
        return total.report()
