"""How good an alignment is: how many rows it covers, what mass it keeps, and what it predicts of the true text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fusejax.alignment.chain import GoldChain
from fusejax.alignment.rows import Tokens, row_mapper
from fusejax.alignment.tokens import TokenTable, table_columns, token_table
from fusejax.tokenizers import Tokenizer

KINDS = ("same token", "same end", "inside a token", "fallback")


@dataclass
class Quality:
    """(sum, count) pairs over documents; `report` makes the means."""

    rows: int = 0
    kinds: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    empty: tuple[float, int] = (0.0, 0)
    kept: tuple[float, int] = (0.0, 0)
    mapped_ce: tuple[float, int] = (0.0, 0)

    def add_kinds(self, counts: np.ndarray) -> None:
        """counts: int[4], rows of each of KINDS."""
        for name, count in zip(KINDS, counts.tolist(), strict=True):
            self.kinds[name] += count
            self.rows += count

    def report(self) -> dict[str, Any]:
        """{rows, aligned, share, kinds (shares of rows), empty, mass_kept, mapped_ce}; see `quality`.

        The last three are None where nothing was measured.
        """
        aligned = self.rows - self.kinds["fallback"]
        return {
            "rows": self.rows,
            "aligned": aligned,
            "share": aligned / self.rows if self.rows else 0.0,
            "kinds": {name: n / self.rows if self.rows else 0.0 for name, n in self.kinds.items()},
            "empty": _mean(self.empty),
            "mass_kept": _mean(self.kept),
            "mapped_ce": _mean(self.mapped_ce),
        }


def row_kinds(target: Tokens, source: Tokens, row_map_T2: np.ndarray) -> np.ndarray:
    """int8[T]: for each target row the index in KINDS of how it was found."""
    row_T, consumed_T = row_map_T2[:, 0], row_map_T2[:, 1]
    if not len(source.ids):
        return np.full(len(row_T), 3, np.int8)
    starts_T = np.concatenate([[0], target.boundaries[:-1]])[: len(row_T)]
    starts_R = np.concatenate([[0], source.boundaries[:-1]])
    same = starts_T == starts_R[np.maximum(row_T, 0)]
    return np.select([row_T < 0, consumed_T > 0, same], [3, 2, 0], 1).astype(np.int8)


def quality(
    source_rows: Mapping[str, np.ndarray] | Sequence[Mapping[str, np.ndarray]],
    text: str | Sequence[str],
    target_tok: Any,
    source_tok: Any,
    rows: str = "inside",
    tokens: str = "prefix",
    gold_chain: bool = True,
) -> dict[str, Any]:
    """The alignment report of one document or of several.

    source_rows: for each text the source's rows, one per token of it: ids int[n, k], logprobs float[n, k] (natural
    logarithms of its true probabilities) and ce float[n]. Returns `Quality.report`: mass_kept is the mean probability
    that the top-k cut and the token map leave of a row (rows inside a token are left out); mapped_ce is the mean
    cross-entropy of the mapped distribution, scaled to 1, on the true next target token, over the aligned rows that
    have one; a probability p counts as 0.98 p + 0.02/V, so that a miss costs a finite sum. Rows of which nothing is
    left (`empty`: their share of the aligned rows) fall back and are counted so.
    """
    target_tok, source_tok = Tokenizer.of(target_tok), Tokenizer.of(source_tok)
    texts = [text] if isinstance(text, str) else list(text)
    documents = [source_rows] if isinstance(source_rows, Mapping) else list(source_rows)
    tokenized = [(Tokens.of(target_tok, one), Tokens.of(source_tok, one)) for one in texts]
    table = token_table(target_tok, source_tok, tokens, table_columns(source_tok, rows), tokenized)
    map_rows = row_mapper(target_tok, source_tok, rows)
    chain = GoldChain(source_tok) if gold_chain else None
    total = Quality()
    for one, (target, source), values in zip(texts, tokenized, documents, strict=True):
        row_map_T2 = map_rows(one.encode(), target, source)
        kinds_T = row_kinds(target, source, row_map_T2)
        empty_T = measure(total, target, source, row_map_T2, table, values, target_tok.vocab_size, chain)
        kinds_T[empty_T] = KINDS.index("fallback")
        total.add_kinds(np.bincount(kinds_T, minlength=len(KINDS)))
    return total.report()


def measure(
    total: Quality,
    target: Tokens,
    source: Tokens,
    row_map_T2: np.ndarray,
    table: TokenTable,
    source_rows: Mapping[str, np.ndarray],
    vocab_size: int,
    chain: GoldChain | None,
) -> np.ndarray:
    """Add one document's mass kept and mapped cross-entropy to `total`; returns the rows of which nothing is left."""
    labelled_T = (row_map_T2[:, 0] >= 0) & (np.arange(len(target.ids)) < len(target.ids) - 1)
    labelled_T &= row_map_T2[:, 0] < len(source.ids) - 1
    t_N = np.flatnonzero(labelled_T)
    if not len(t_N):
        return t_N
    row_N, consumed_N = row_map_T2[t_N].T
    label_N, source_label_N = target.ids[t_N + 1], source.ids[row_N + 1]
    ids_NK = np.asarray(source_rows["ids"])[row_N].astype(np.int64)
    known_NK = (ids_NK >= 0) & (ids_NK < len(table.ids))
    ids_NK = np.where(known_NK, ids_NK, 0)
    images_NK = table.ids[ids_NK, consumed_N[:, None]]
    begun_N = table.prefix_hash[source_label_N, consumed_N]
    follows_NK = table.prefix_hash[ids_NK, consumed_N[:, None]] == begun_N[:, None]
    images_NK = np.where(known_NK & follows_NK, images_NK, -1)
    probs_NK = np.exp(np.asarray(source_rows["logprobs"])[row_N].astype(np.float64))
    probs_NK = np.where(images_NK >= 0, probs_NK, 0.0)
    kept_N = probs_NK.sum(-1)
    usable_N = kept_N > 0
    p_N = np.where(images_NK == label_N[:, None], probs_NK, 0.0).sum(-1)
    all_N = kept_N
    if chain is not None:
        gold_N = np.exp(chain(target.boundaries, row_map_T2, source.ids, source.boundaries, source_rows)[t_N])
        first_N = table.ids[source_label_N, consumed_N]
        at_first_N = np.where(images_NK == first_N[:, None], probs_NK, 0.0).sum(-1)
        moved_N = np.where(first_N == label_N, 0.0, np.minimum(gold_N, at_first_N))
        added_N = np.where(first_N == label_N, np.maximum(gold_N - at_first_N, 0.0), gold_N)
        p_N, all_N = p_N + added_N, kept_N + added_N - moved_N
    share_N = p_N[usable_N] / all_N[usable_N]
    ce_N = -np.log(0.98 * share_N + 0.02 / vocab_size)
    total.mapped_ce = _plus(total.mapped_ce, ce_N)
    total.kept = _plus(total.kept, np.minimum(kept_N[usable_N & (consumed_N == 0)], 1.0))
    total.empty = _plus(total.empty, ~usable_N)
    return t_N[~usable_N]


def _plus(pair: tuple[float, int], values: np.ndarray) -> tuple[float, int]:
    return pair[0] + float(values.sum()), pair[1] + len(values)


def _mean(pair: tuple[float, int]) -> float | None:
    return pair[0] / pair[1] if pair[1] else None
