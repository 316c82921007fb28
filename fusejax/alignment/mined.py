"""The papers' methods: rows by dynamic time warping, tokens by edit distance (FuseLLM) or by counts (FuseChat).

They work on the tokens' spellings (`Tokenizer.surfaces`) and know nothing of the text. They are kept for reproduction
and comparison; `inside` and `prefix` (see `rows`, `tokens`) align more rows, and to the right tokens.
"""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from fusejax.alignment.rows import NO_ROW, Tokens
from fusejax.canonical import SPACE_MARKER
from fusejax.tokenizers import Tokenizer

NO_TOKEN = -1
_CHUNK = 1 << 26  # entries of the distance matrix that are held at a time


class Spellings:
    """A tokenizer's spellings without marks of spaces, each but once: what the warping's costs are taken of.

    strings: list of str. code_V: int32[vocab_size], the string of each id.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        plain = [(surface or "").replace(SPACE_MARKER, "") for surface in tokenizer.surfaces]
        codes = {string: code for code, string in enumerate(dict.fromkeys(plain))}
        self.strings = list(codes)
        self.code_V = np.array([codes[string] for string in plain], np.int32)


def warp_tokens(
    source: Tokens, target: Tokens, source_spellings: Spellings, target_spellings: Spellings
) -> tuple[int, np.ndarray]:
    """(cost, path int32[P, 2] of (source position, target position)) of the cheapest alignment of two tokenizations.

    Dynamic time warping; the cost of a pair of tokens is the Levenshtein distance of their characters, marks of spaces
    left out. Of equally cheap steps into a pair of tokens, the one that advances both series counts first, then the one
    that advances the source, then the one that advances the target. Empty where either side is. Boundaries only say
    where the path is looked for first.
    """
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    from fusejax.alignment.warping import warp

    if not len(source.ids) or not len(target.ids):
        return 0, np.zeros((0, 2), np.int32)
    codes_U, a_N = np.unique(source_spellings.code_V[source.ids], return_inverse=True)
    codes_W, b_M = np.unique(target_spellings.code_V[target.ids], return_inverse=True)
    strings_U = [source_spellings.strings[c] for c in codes_U]
    strings_W = [target_spellings.strings[c] for c in codes_W]
    cost_UW = cdist(strings_U, strings_W, scorer=Levenshtein.distance, dtype=np.uint16)
    guess_N = np.minimum(np.searchsorted(target.boundaries, source.boundaries), len(b_M) - 1)
    return warp(cost_UW, a_N.astype(np.int32), b_M.astype(np.int32), guess_N)


class MinedRows:
    """Row maps `mined` of a pair of tokenizers; made once, called for each document.

    A target row takes the source row that the warping matches it to, if that is one row alone, and if the two tokens
    have the same spelling or the target's token is the image of the source's in the token map `mined`.
    """

    def __init__(self, target_tok: Tokenizer, source_tok: Tokenizer) -> None:
        from fusejax.alignment import cache  # which keeps what this module makes

        self._source, self._target = Spellings(source_tok), Spellings(target_tok)
        self._images_V = cache.token_table(target_tok, source_tok, "mined", 1).ids[:, 0]
        self._target_surfaces, self._source_surfaces = target_tok.surfaces, source_tok.surfaces
        target_ids = ids_of_surfaces(target_tok)
        self._code_T = _codes(target_tok.surfaces, target_ids)
        self._same_V = _codes(source_tok.surfaces, target_ids)
        self._source_marks_first = source_tok.writes_dummy_prefix
        self._source_ids = ids_of_surfaces(source_tok)

    def __call__(self, target: Tokens, source: Tokens) -> np.ndarray:
        """int32[n_target, 2], see `fusejax.alignment.row_map`; the second column is 0."""
        _, path_P2 = warp_tokens(source, target, self._source, self._target)
        n = len(target.ids)
        rows_T2 = np.full((n, 2), (NO_ROW, 0), np.int32)
        if not len(path_P2):
            return rows_T2
        matches_T = np.bincount(path_P2[:, 1], minlength=n)
        row_T = np.zeros(n, np.int32)
        row_T[path_P2[:, 1]] = path_P2[:, 0]
        equal_T = self._agree(target.ids, source.ids[row_T])
        equal_T[0] |= self._first_agrees(int(target.ids[0]), int(source.ids[row_T[0]]))
        rows_T2[:, 0] = np.where((matches_T == 1) & equal_T, row_T, NO_ROW)
        return rows_T2

    def _agree(self, target_ids_T: np.ndarray, source_ids_T: np.ndarray) -> np.ndarray:
        code_T, image_T = self._code_T[target_ids_T], self._images_V[source_ids_T]
        same_T = code_T == self._same_V[source_ids_T]
        return (code_T != NO_TOKEN) & (same_T | ((image_T >= 0) & (self._code_T[image_T] == code_T)))

    def _first_agrees(self, target_id: int, source_id: int) -> bool:
        """The first token of a text, where only the target marks it as one that follows a space ('▁The' and 'The')."""
        target, source = self._target_surfaces[target_id] or "", self._source_surfaces[source_id] or ""
        if self._source_marks_first or not target.startswith(SPACE_MARKER) or source.startswith(SPACE_MARKER):
            return False
        marked = SPACE_MARKER + source
        return target == marked or bool(
            marked in self._source_ids and self._agree(np.array([target_id]), np.array([self._source_ids[marked]]))[0]
        )


def ids_of_surfaces(tokenizer: Tokenizer) -> dict[str, int]:
    """Spelling → id, special tokens left out; of several ids with one spelling the lowest."""
    found: dict[str, int] = {}
    for i, (surface, piece) in enumerate(zip(tokenizer.surfaces, tokenizer.canonical_bytes, strict=True)):
        if surface is not None and piece is not None:
            found.setdefault(surface, i)
    return found


def _codes(surfaces: list[str | None], ids: dict[str, int]) -> np.ndarray:
    """int32[V]: the id in `ids` of each spelling, -1 where it is not there."""
    return np.array([ids.get(surface, NO_TOKEN) for surface in surfaces], np.int32)  # type: ignore[arg-type]


@lru_cache(maxsize=8)
def token_images(target_tok: Tokenizer, source_tok: Tokenizer) -> np.ndarray:
    """int32[V_source]: the token map `mined` (MinED), -1 for special tokens.

    A source token whose spelling the target's vocabulary has becomes that token; any other the target token at the
    least Levenshtein distance of the two spellings, of several the one with the lowest id.
    """
    known = ids_of_surfaces(target_tok)
    images_V = _codes(source_tok.surfaces, known)
    for v, piece in enumerate(source_tok.canonical_bytes):
        if piece is None:
            images_V[v] = NO_TOKEN
    missing = [v for v in np.flatnonzero(images_V < 0).tolist() if source_tok.canonical_bytes[v] is not None]
    if missing and known:
        strings = list(known)
        nearest, _ = nearest_strings([source_tok.surfaces[v] or "" for v in missing], strings)
        images_V[missing] = np.array(list(known.values()), np.int32)[nearest]
    return images_V


def nearest_strings(queries: list[str], choices: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(index into `choices` of the nearest, its distance), each int32[len(queries)]; of several the first.

    Levenshtein distance. The difference of two lengths is a lower bound of it, so for each length of query the choices
    are gone through from the same length outwards, for as long as they can still win; in chunks, so memory is bounded.
    """
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    best_Q = np.full(len(queries), np.iinfo(np.int32).max, np.int32)
    index_Q = np.full(len(queries), np.iinfo(np.int32).max, np.int32)
    query_length_Q, choice_length_C = np.array([*map(len, queries)]), np.array([*map(len, choices)])
    lengths_L = np.unique(choice_length_C)
    by_length = {n: np.flatnonzero(choice_length_C == n) for n in lengths_L.tolist()}
    for length in np.unique(query_length_Q).tolist():
        active_A = np.flatnonzero(query_length_Q == length)
        for other in lengths_L[np.argsort(np.abs(lengths_L - length))].tolist():
            active_A = active_A[best_Q[active_A] >= abs(other - length)]
            if not len(active_A):
                break
            choices_B = by_length[other]
            strings = [choices[c] for c in choices_B]
            step = max(1, _CHUNK // len(strings))
            for start in range(0, len(active_A), step):
                part_A = active_A[start : start + step]
                distance_AB = cdist(
                    [queries[q] for q in part_A], strings, scorer=Levenshtein.distance, dtype=np.uint16, workers=-1
                )
                first_A = distance_AB.argmin(1)
                distance_A, choice_A = distance_AB[np.arange(len(part_A)), first_A], choices_B[first_A]
                better_A = distance_A < best_Q[part_A]
                better_A |= (distance_A == best_Q[part_A]) & (choice_A < index_Q[part_A])
                best_Q[part_A[better_A]], index_Q[part_A[better_A]] = distance_A[better_A], choice_A[better_A]
    return index_Q, best_Q


def counted_images(target_tok: Tokenizer, source_tok: Tokenizer, pairs: Iterable[tuple[Tokens, Tokens]]) -> np.ndarray:
    """int32[V_source]: the token map `stats` from the two tokenizations (target's, source's) of a sample of texts.

    The candidates of a source token are the target tokens that the warping matches it to anywhere in the sample, and
    the one matched most often wins; of several the nearest in spelling, then the one with the lowest id. A token
    whose spelling the target has stays that token, and one that the sample lacks is mapped as in `mined`.
    """
    source, target = Spellings(source_tok), Spellings(target_tok)
    width = np.int64(target_tok.vocab_size)
    counts: dict[int, int] = {}
    for target_tokens, source_tokens in pairs:
        _, path_P2 = warp_tokens(source_tokens, target_tokens, source, target)
        keys_P = source_tokens.ids[path_P2[:, 0]].astype(np.int64) * width + target_tokens.ids[path_P2[:, 1]]
        for key, n in zip(*(part.tolist() for part in np.unique(keys_P, return_counts=True)), strict=True):
            counts[key] = counts.get(key, 0) + n
    images_V = token_images(target_tok, source_tok).copy()
    same_V = _codes(source_tok.surfaces, ids_of_surfaces(target_tok)) >= 0
    best: dict[int, tuple[int, int, int]] = {}
    for key, n in counts.items():
        v, t = divmod(key, int(width))
        if same_V[v] or source_tok.canonical_bytes[v] is None or target_tok.canonical_bytes[t] is None:
            continue
        rank = (-n, _distance(source_tok.surfaces[v], target_tok.surfaces[t]), t)
        if v not in best or rank < best[v]:
            best[v] = rank
    for v, (_, _, t) in best.items():
        images_V[v] = t
    return images_V


def _distance(a: str | None, b: str | None) -> int:
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.distance(a or "", b or "")
