"""How good an alignment is: how many rows it covers, what mass it keeps, and what it predicts of the true text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fusejax.alignment.causes import CAUSES, fallback_causes
from fusejax.alignment.chain import GoldChain
from fusejax.alignment.rows import Tokens, row_mapper
from fusejax.alignment.tokens import TokenTable, table_columns, token_table
from fusejax.errors import UserError
from fusejax.tokenizers import Tokenizer

KINDS = ("same token", "same end", "inside a token", "fallback")
TOP_TOKENS = 20
"""How many disagreeing tokens a report names."""


@dataclass
class Quality:
    """(sum, count) pairs over documents; `report` makes the means."""

    documents: int = 0
    measured: int = 0  # of the documents, those whose source rows were seen
    rows: int = 0
    kinds: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    causes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0))
    empty: tuple[float, int] = (0.0, 0)
    kept: tuple[float, int] = (0.0, 0)
    collision_rows: tuple[float, int] = (0.0, 0)
    collision_mass: tuple[float, int] = (0.0, 0)
    mapped_ce: tuple[float, int] = (0.0, 0)
    mapped_ce_bytes: tuple[float, int] = (0.0, 0)
    source_ce_bytes: tuple[float, int] = (0.0, 0)
    source_top_ce_bytes: tuple[float, int] = (0.0, 0)
    token_mass: np.ndarray = field(default_factory=lambda: np.zeros(0))  # float64[V_source], over `kept` rows

    def add_rows(self, kinds: np.ndarray, causes: np.ndarray) -> None:
        """kinds: int[len(KINDS)], causes: int[len(CAUSES)]: how many rows of a document have each."""
        self.documents += 1
        for name, count in zip(KINDS, kinds.tolist(), strict=True):
            self.kinds[name] += count
            self.rows += count
        for name, count in zip(CAUSES, causes.tolist(), strict=False):  # an older store knows fewer
            self.causes[name] += count

    def add_measured(self, kinds_T: np.ndarray, causes: np.ndarray, empty_N: np.ndarray) -> None:
        """`add_rows` of a document of which `measure` found the rows empty_N empty: they fall back.

        kinds_T: int[T], each row's index in KINDS by the row map alone.
        """
        self.measured += 1
        kinds_T, causes = kinds_T.copy(), causes.copy()
        newly = int((kinds_T[empty_N] != KINDS.index("fallback")).sum())
        kinds_T[empty_N] = KINDS.index("fallback")
        causes[CAUSES.index("nothing left")] += newly
        self.add_rows(np.bincount(kinds_T, minlength=len(KINDS)), causes)

    def report(self) -> dict[str, Any]:
        """{documents, rows, aligned, share, kinds, fallback_causes, and what was measured}: see `quality`.

        What needs the source's rows is None where there were none.
        """
        aligned = self.rows - self.kinds["fallback"]
        return {
            "documents": {"counted": self.documents, "measured": self.measured},
            "rows": self.rows,
            "aligned": aligned,
            "share": aligned / self.rows if self.rows else 0.0,
            "kinds": {name: n / self.rows if self.rows else 0.0 for name, n in self.kinds.items()},
            "fallback_causes": {name: n / self.rows if self.rows else 0.0 for name, n in self.causes.items()},
            "empty": _mean(self.empty),
            "mass_kept": _mean(self.kept),
            "collisions": {"rows": _mean(self.collision_rows), "mass": _mean(self.collision_mass)},
            "mapped_ce": _mean(self.mapped_ce),
            "mapped_ce_per_byte": _mean(self.mapped_ce_bytes),
            "source_top_ce_per_byte": _mean(self.source_top_ce_bytes),
            "source_ce_per_byte": _mean(self.source_ce_bytes),
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
    logarithms of its true probabilities) and ce float[n]. Raises UserError, naming the document, where they are not.
    Returns a dict:
      documents: {counted: of how many documents these rows are, measured: of how many the source's rows were seen};
      rows, aligned, share: target rows, those with a source row that says something, and their share;
      kinds: share of the rows by how they were found; fallback_causes: share of the rows by why they were not (see
        `fusejax.alignment.causes`);
      empty: share of the aligned rows of which the token map leaves nothing; they fall back, and count so;
      mass_kept: mean probability that the top-k cut and the token map leave of a row (rows inside a token left out);
      collisions: {rows: share of rows where two source tokens meet at one target token, mass: mean probability of the
        tokens that meet a likelier one}, over the same rows as mass_kept;
      mapped_ce: mean cross-entropy (nats) of the mapped distribution, scaled to 1, on the true next target token, over
        the aligned rows that have one; a probability p counts as 0.98 p + 0.02/V, so that a miss costs a finite sum;
      mapped_ce_per_byte: the same over the bytes of these tokens;
      source_top_ce_per_byte: what to compare that with: the same rows of the source, each once, treated alike (their
        top k scaled to 1, with the gold chain where it is on) but not mapped, on the source's own next tokens, over the
        bytes of these. Equal to mapped_ce_per_byte for equal tokenizers;
      source_ce_per_byte: cross-entropy of the source's whole distributions, over the bytes of the texts, its first
        token of each left out;
      top_tokens: the source tokens whose image stands for other bytes, those with the most mass first:
        [{token, image (None: dropped), mass: mean probability given to it in a row}].
    """
    target_tok, source_tok = Tokenizer.of(target_tok), Tokenizer.of(source_tok)
    texts = [text] if isinstance(text, str) else list(text)
    documents = [source_rows] if isinstance(source_rows, Mapping) else list(source_rows)
    tokenized = [(Tokens.of(target_tok, one), Tokens.of(source_tok, one)) for one in texts]
    _check_rows(documents, [source for _, source in tokenized], source_tok)
    table = token_table(target_tok, source_tok, tokens, table_columns(source_tok, rows), tokenized)
    map_rows = row_mapper(target_tok, source_tok, rows)
    chain = GoldChain(source_tok) if gold_chain else None
    total = Quality()
    for one, (target, source), values in zip(texts, tokenized, documents, strict=True):
        data = one.encode()
        row_map_T2 = map_rows(data, target, source)
        kinds_T = row_kinds(target, source, row_map_T2)
        gold_T = chain(target.boundaries, row_map_T2, source.ids, source.boundaries, values) if chain else None
        empty_T = measure(total, target, source, row_map_T2, table, values, target_tok.vocab_size, gold_T)
        causes = fallback_causes(data, target, source, target_tok, source_tok, row_map_T2, rows)
        total.add_measured(kinds_T, causes, empty_T)
    return total.report() | {"top_tokens": top_tokens(total, table, target_tok, source_tok)}


def _check_rows(documents: list[Mapping[str, np.ndarray]], tokens: list[Tokens], source_tok: Tokenizer) -> None:
    """UserError unless there are rows for each document, one for each of its tokens, of the source's vocabulary."""
    if len(documents) != len(tokens):
        raise UserError(f"source_rows: rows of {len(documents)} documents, but there are {len(tokens)} texts")
    for i, (values, source) in enumerate(zip(documents, tokens, strict=True)):
        missing = [name for name in ("ids", "logprobs", "ce") if name not in values]
        if missing:
            raise UserError(f"source_rows, document {i}: has no `{missing[0]}`; needed are ids, logprobs and ce")
        ids, logprobs, ce = (np.asarray(values[name]) for name in ("ids", "logprobs", "ce"))
        n = len(source.ids)
        if ids.ndim != 2 or len(ids) != n or logprobs.shape != ids.shape or ce.shape != (n,):
            raise UserError(
                f"source_rows, document {i}: shapes ids {ids.shape}, logprobs {logprobs.shape}, ce {ce.shape} should "
                f"be ({n}, k), ({n}, k), ({n},): a row for each of the {n} tokens that {source_tok.name} gives"
            )
        wrong = ids[((ids < 0) | (ids >= source_tok.vocab_size)) & (logprobs > -np.inf)]
        if not np.issubdtype(ids.dtype, np.integer) or len(wrong):
            found = f"id {wrong[0]}" if len(wrong) else f"ids of {ids.dtype}"
            raise UserError(
                f"source_rows, document {i}: {found} should be a whole number from 0 to {source_tok.vocab_size - 1}"
            )


def measure(
    total: Quality,
    target: Tokens,
    source: Tokens,
    row_map_T2: np.ndarray,
    table: TokenTable,
    source_rows: Mapping[str, np.ndarray],
    vocab_size: int,
    gold_T: np.ndarray | None,
) -> np.ndarray:
    """Add what the source's rows say of one document to `total`; returns the rows of which nothing is left.

    gold_T: the gold chain's log-probabilities, None without.
    """
    labelled_T = (row_map_T2[:, 0] >= 0) & (np.arange(len(target.ids)) < len(target.ids) - 1)
    labelled_T &= row_map_T2[:, 0] < len(source.ids) - 1
    t_N = np.flatnonzero(labelled_T)
    if len(source.ids) > 1:
        nats = float(np.sum(source_rows["ce"][:-1], dtype=np.float64))
        total.source_ce_bytes = _plus(total.source_ce_bytes, nats, source.boundaries[-1] - source.boundaries[0])
    if not len(t_N):
        return t_N
    row_N, consumed_N = row_map_T2[t_N].astype(np.int64).T
    label_N, source_label_N = target.ids[t_N + 1], source.ids[row_N + 1]
    ids_NK = np.asarray(source_rows["ids"])[row_N].astype(np.int64)
    known_NK = (ids_NK >= 0) & (ids_NK < len(table.ids))
    ids_NK = np.where(known_NK, ids_NK, 0)
    images_NK = table.ids[ids_NK, consumed_N[:, None]]
    begun_N = table.prefix_hash[source_label_N, consumed_N]
    follows_NK = table.prefix_hash[ids_NK, consumed_N[:, None]] == begun_N[:, None]
    images_NK = np.where(known_NK & follows_NK, images_NK, -1)
    given_NK = np.where(known_NK, np.exp(np.asarray(source_rows["logprobs"])[row_N].astype(np.float64)), 0.0)
    probs_NK = np.where(images_NK >= 0, given_NK, 0.0)
    kept_N = probs_NK.sum(-1)
    usable_N = kept_N > 0
    share_N = _share_of_label(images_NK, probs_NK, label_N, table.ids[source_label_N, consumed_N], gold_T, t_N)
    ce_N = -np.log(0.98 * share_N[usable_N] + 0.02 / vocab_size)
    total.mapped_ce = _plus(total.mapped_ce, ce_N.sum(), len(ce_N))
    spans_N = target.boundaries[t_N + 1] - target.boundaries[t_N]
    total.mapped_ce_bytes = _plus(total.mapped_ce_bytes, ce_N.sum(), spans_N[usable_N].sum())
    _add_source_rows(total, source, np.unique(row_N[usable_N]), source_rows, len(table.ids), gold_T is not None)
    total.empty = _plus(total.empty, (~usable_N).sum(), len(usable_N))
    whole_N = consumed_N == 0
    _add_whole_rows(total, ids_NK[whole_N], images_NK[whole_N], given_NK[whole_N], len(table.ids))
    total.kept = _plus(total.kept, np.minimum(kept_N[whole_N & usable_N], 1.0).sum(), (whole_N & usable_N).sum())
    return t_N[~usable_N]


def _add_source_rows(
    total: Quality,
    source: Tokens,
    row_N: np.ndarray,
    source_rows: Mapping[str, np.ndarray],
    vocab_size: int,
    gold_chain: bool,
) -> None:
    """Cross-entropy of the source's rows `row_N` before any map, treated as mapped rows are."""
    ids_NK, label_N = np.asarray(source_rows["ids"])[row_N].astype(np.int64), source.ids[row_N + 1]
    given_NK = np.exp(np.asarray(source_rows["logprobs"])[row_N].astype(np.float64))
    given_NK[(ids_NK < 0) | (ids_NK >= vocab_size)] = 0.0
    gold_R = -np.asarray(source_rows["ce"]) if gold_chain else None
    share_N = _share_of_label(ids_NK, given_NK, label_N, label_N, gold_R, row_N)
    nats_N = -np.log(0.98 * share_N + 0.02 / vocab_size)
    spans_N = source.boundaries[row_N + 1] - source.boundaries[row_N]
    total.source_top_ce_bytes = _plus(total.source_top_ce_bytes, nats_N.sum(), spans_N.sum())


def _share_of_label(
    images_NK: np.ndarray,
    probs_NK: np.ndarray,
    label_N: np.ndarray,
    first_N: np.ndarray,
    gold_T: np.ndarray | None,
    t_N: np.ndarray,
) -> np.ndarray:
    """float64[N]: the label's probability in each mapped row, scaled to 1; 0 where the row is empty.

    first_N: image of the source's true next token, from which the gold chain takes.
    """
    p_N, all_N = np.where(images_NK == label_N[:, None], probs_NK, 0.0).sum(-1), probs_NK.sum(-1)
    if gold_T is not None:
        gold_N = np.exp(gold_T[t_N].astype(np.float64))
        at_first_N = np.where(images_NK == first_N[:, None], probs_NK, 0.0).sum(-1)
        moved_N = np.where(first_N == label_N, 0.0, np.minimum(gold_N, at_first_N))
        added_N = np.where(first_N == label_N, np.maximum(gold_N - at_first_N, 0.0), gold_N)
        p_N, all_N = p_N + added_N, all_N + added_N - moved_N
    return p_N / np.where(all_N > 0, all_N, 1.0)


def _add_whole_rows(
    total: Quality, ids_NK: np.ndarray, images_NK: np.ndarray, given_NK: np.ndarray, vocab_size: int
) -> None:
    """Collisions, and the mass that each source token gets, of rows that are not inside a token."""
    order_NK = np.argsort(images_NK, -1, kind="stable")  # of one image the likeliest stays first
    sorted_NK = np.take_along_axis(images_NK, order_NK, -1)
    meets_NK = (sorted_NK[:, 1:] == sorted_NK[:, :-1]) & (sorted_NK[:, 1:] >= 0)
    meeting = np.take_along_axis(given_NK, order_NK, -1)[:, 1:][meets_NK]
    total.collision_rows = _plus(total.collision_rows, meets_NK.any(-1).sum(), len(ids_NK))
    total.collision_mass = _plus(total.collision_mass, meeting.sum(), len(ids_NK))
    mass_V = np.bincount(ids_NK.ravel(), given_NK.ravel(), vocab_size)
    total.token_mass = mass_V if not len(total.token_mass) else total.token_mass + mass_V


def top_tokens(
    total: Quality, table: TokenTable, target_tok: Tokenizer, source_tok: Tokenizer, n: int = TOP_TOKENS
) -> list[dict[str, Any]]:
    """The `top_tokens` of `quality`."""
    rows = total.collision_mass[1]
    if not rows:
        return []
    found: list[dict[str, Any]] = []
    for v in np.argsort(-total.token_mass, kind="stable").tolist():
        if len(found) == n or total.token_mass[v] <= 0:
            break
        piece, image = source_tok.canonical_bytes[v], int(table.ids[v, 0])
        spelled = target_tok.canonical_bytes[image] if image >= 0 else None
        if image >= 0 and spelled == piece:
            continue
        found.append(
            {
                "token": source_tok.shown(v),
                "image": target_tok.shown(image) if image >= 0 else None,
                "mass": float(total.token_mass[v]) / rows,
            }
        )
    return found


def _plus(pair: tuple[float, int], amount: float, count: int) -> tuple[float, int]:
    return pair[0] + float(amount), pair[1] + int(count)


def _mean(pair: tuple[float, int]) -> float | None:
    return pair[0] / pair[1] if pair[1] else None
