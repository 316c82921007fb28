"""The gold chain: what the source gives the true next target token where that token is not one source token.

A row of a source names source tokens only. Where the true next target token spans several of them ('Ġcheckpoint' over
'Ġcheck' and 'point'), its probability is a product along the source's own true tokens: the cache holds their
cross-entropies.
"""

from collections.abc import Mapping

import numpy as np

from fusejax.alignment.rows import MAX_CONSUMED
from fusejax.alignment.tokens import prefix_hashes
from fusejax.tokenizers import Tokenizer


def pack_chain(gold_T: np.ndarray, row_map_T2: np.ndarray, ce_R: np.ndarray) -> dict[str, np.ndarray]:
    """`GoldChain`'s float32[T] as the entries that differ from the source's own CE: {rows int[N], values float32[N]}.

    Most target tokens lie in one source token, and there the chain is that token's log-probability, which the cache
    has (`ce_R`).
    """
    rows_N = np.flatnonzero(gold_T != _one_token(row_map_T2, ce_R))
    dtype = np.uint16 if len(gold_T) <= 1 << 16 else np.uint32
    return {"rows": rows_N.astype(dtype), "values": gold_T[rows_N]}


def unpack_chain(packed: Mapping[str, np.ndarray], row_map_T2: np.ndarray, ce_R: np.ndarray) -> np.ndarray:
    """float32[T]: what `pack_chain` was given."""
    gold_T = _one_token(row_map_T2, ce_R)
    gold_T[packed["rows"]] = packed["values"]
    return gold_T


def _one_token(row_map_T2: np.ndarray, ce_R: np.ndarray) -> np.ndarray:
    """float32[T]: the log-probability of the true token after each row, -inf where there is none."""
    gold_T = np.full(len(row_map_T2), -np.inf, np.float32)
    row_T = row_map_T2[:-1, 0]
    t_N = np.flatnonzero((row_T >= 0) & (row_T < len(ce_R) - 1))
    gold_T[t_N] = -ce_R[row_T[t_N]]
    return gold_T


class GoldChain:
    """Gold chains of one source; made once (it hashes the source's vocabulary), called for each document."""

    def __init__(self, source_tok: Tokenizer) -> None:
        self._tokenizer = source_tok
        longest = int(source_tok.lengths.max(initial=0))
        self._hash_VC = prefix_hashes(source_tok, 1 + min(longest, MAX_CONSUMED))

    def __call__(
        self,
        target_boundaries_T: np.ndarray,
        row_map_T2: np.ndarray,
        source_ids_R: np.ndarray,
        source_boundaries_R: np.ndarray,
        source_rows: Mapping[str, np.ndarray],
    ) -> np.ndarray:
        """float32[T]: for each target row the log-probability (nats) of the true next target token's bytes, else -inf.

        source_rows: ids int[R, k], logprobs float[R, k] (true log-probabilities), ce float[R] (of the source's true
        next token; NaN or the EOS's in the last row). The probability is given from the source's row on: where the row
        map has consumed bytes, it is that of these bytes and the target token together.

        It is the product of the source's probabilities of its true tokens that lie wholly in the span, times, where
        the span ends inside a source token after others, the top-k mass of that token's row that begins with the
        remaining bytes, the true token included. Where the span lies in one source token, it is that token's alone.
        """
        T, R = len(target_boundaries_T), len(source_ids_R)
        gold_T = np.full(T, -np.inf, np.float32)
        ends_R = source_boundaries_R
        row_T = row_map_T2[: max(T - 1, 0), 0]
        t_N = np.flatnonzero((row_T >= 0) & (row_T < R - 1))
        if not len(t_N):
            return gold_T
        stop_N = target_boundaries_T[t_N + 1]
        later_N = np.append(target_boundaries_T[2:], -1)[t_N]  # a token that ends where the next one ends is not whole
        first_N = row_map_T2[t_N, 0]
        last_N = np.searchsorted(ends_R, stop_N, side="right") - 1  # the last source token that ends by then
        ce_R = np.asarray(source_rows["ce"], np.float64)
        total_R = np.concatenate([[0.0], np.cumsum(ce_R[: R - 1])])
        rest_N = stop_N - ends_R[last_N]
        partial_N = (rest_N > 0) & (last_N + 1 < R)
        one_N = (last_N == first_N) | ((last_N == first_N + 1) & ~partial_N)
        logprob_N = -(total_R[last_N] - total_R[first_N])
        logprob_N[one_N] = -ce_R[first_N[one_N]]
        more_N = partial_N & ~one_N
        logprob_N[more_N] += self._mass(last_N[more_N], rest_N[more_N], source_ids_R, ends_R, source_rows)
        usable_N = (stop_N > target_boundaries_T[t_N]) & (later_N != stop_N) & np.isfinite(logprob_N)
        gold_T[t_N[usable_N]] = logprob_N[usable_N]
        return gold_T

    def _mass(
        self,
        row_N: np.ndarray,
        rest_N: np.ndarray,
        source_ids_R: np.ndarray,
        ends_R: np.ndarray,
        source_rows: Mapping[str, np.ndarray],
    ) -> np.ndarray:
        """float64[N]: log of the mass of each row's tokens that begin as its true token does, for `rest` bytes."""
        label_N = source_ids_R[row_N + 1]
        ids_NK = np.asarray(source_rows["ids"])[row_N].astype(np.int64)
        probs_NK = np.exp(np.asarray(source_rows["logprobs"])[row_N].astype(np.float64))
        column_N = np.minimum(rest_N, self._hash_VC.shape[1] - 1)
        # A token whose bytes are not the text's, or that is too long for the table, counts alone.
        clear_N = (rest_N == column_N) & (self._tokenizer.lengths[label_N] == ends_R[row_N + 1] - ends_R[row_N])
        known_NK = (ids_NK >= 0) & (ids_NK < len(self._hash_VC))
        hash_NK = self._hash_VC[np.where(known_NK, ids_NK, 0), column_N[:, None]]
        begins_NK = known_NK & clear_N[:, None] & (hash_NK == self._hash_VC[label_N, column_N][:, None])
        is_label_NK = ids_NK == label_N[:, None]
        mass_N = np.sum(np.where(begins_NK & ~is_label_NK, probs_NK, 0.0), -1)
        mass_N += np.exp(-np.asarray(source_rows["ce"], np.float64)[row_N])
        return np.log(np.minimum(mass_N, 1.0))
