"""Token maps: which token of the target each token of the source becomes.

A token map depends on the two tokenizers alone. For rows that stand inside a source token it is a table with a column
for each number of bytes of the token that the context already holds.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from fusejax.alignment import mined
from fusejax.alignment.mined import NO_TOKEN
from fusejax.alignment.rows import MAX_CONSUMED, Tokens
from fusejax.tokenizers import Tokenizer

METHODS = ("exact", "mined", "stats", "prefix")
# A token can have several roles ('<|endoftext|>' is BOS, EOS and unknown in one); the first that the target has counts.
_ROLE_ORDER = ("eos", "bos", "pad", "unk")


class TokenTable(NamedTuple):
    """What each source token becomes in the target's vocabulary after its first c bytes were consumed (host arrays).

    ids: int32[V_source, C], column c: the target's id for the token's bytes after the first c; -1: none.
    prefix_hash: uint32[V_source, C], column c > 0: a hash of the token's first c bytes, 0 where nothing follows them;
    column 0: one value for all.
    """

    ids: np.ndarray
    prefix_hash: np.ndarray


def token_map(
    target_tok: Any, source_tok: Any, method: str = "prefix", texts: Iterable[str] | None = None
) -> np.ndarray:
    """int32[V_source]: the target id that each source id becomes, -1 where none does.

    target_tok, source_tok: what `Tokenizer.of` takes. method: `exact` (the same
    canonical bytes), `prefix` (`exact`; any other token becomes the first token that the target's tokenizer gives for
    its bytes in the middle of a text, because that is what the target must predict next), `mined` (the paper's: the
    nearest spelling) or `stats` (FuseChat's: the token matched most often in the sample `texts`); of the last two see
    `fusejax.alignment.mined`. Special tokens map by role alone. Equal tokenizers give the identity.
    """
    if isinstance(texts, str | bytes):
        raise TypeError(f"texts: should be a list of texts, not one {type(texts).__name__}")
    target_tok, source_tok = Tokenizer.of(target_tok), Tokenizer.of(source_tok)
    sample = None
    if texts is not None:
        sample = ((Tokens.of(target_tok, text), Tokens.of(source_tok, text)) for text in texts)
    return token_table(target_tok, source_tok, method, sample=sample).ids[:, 0]


def token_table(
    target_tok: Any,
    source_tok: Any,
    method: str = "prefix",
    columns: int = 1,
    sample: Iterable[tuple[Tokens, Tokens]] | None = None,
) -> TokenTable:
    """The token map (column 0), and the maps of what is left of each token after 1 .. columns - 1 bytes of it.

    sample: (target's, source's) tokens of the texts that `stats` counts in. What is left of a token is no token, so
    `mined` and `stats` have nothing to say of it: there `exact` holds.
    """
    if method not in METHODS:
        raise ValueError(f"token map {method!r} is unknown; known: {', '.join(METHODS)}")
    if method == "stats" and sample is None:
        raise ValueError("token map 'stats' needs a sample of texts to count in")
    target_tok, source_tok = Tokenizer.of(target_tok), Tokenizer.of(source_tok)
    ids_VC = _map_rests(target_tok, source_tok, columns, first=method == "prefix")
    if target_tok.text_fingerprint == source_tok.text_fingerprint:
        ids_VC[:, 0] = np.arange(len(ids_VC), dtype=np.int32)
    elif method == "mined":
        ids_VC[:, 0] = mined.token_images(target_tok, source_tok)
    elif method == "stats" and sample is not None:
        ids_VC[:, 0] = mined.counted_images(target_tok, source_tok, sample)
    for v, image in _by_role(target_tok, source_tok).items():
        ids_VC[v, 0] = image
    hash_VC = prefix_hashes(source_tok, columns)
    hash_VC[:, 1:][source_tok.lengths[:, None] <= np.arange(1, columns)] = 0
    return TokenTable(ids_VC, hash_VC)


def _map_rests(target_tok: Tokenizer, source_tok: Tokenizer, columns: int, first: bool) -> np.ndarray:
    """int32[V_source, columns]: the target's token for what is left of each, or (`first`) the first of its tokens."""
    pieces = source_tok.canonical_bytes
    ids_VC = np.full((len(pieces), columns), NO_TOKEN, np.int32)
    rests = [(v, c, piece[c:]) for v, piece in enumerate(pieces) if piece for c in range(min(columns, len(piece)))]
    unique = {rest: k for k, rest in enumerate(dict.fromkeys(rest for _, _, rest in rests))}
    if first:
        images = target_tok.map_bytes(list(unique))
    else:
        known = target_tok.ids_of_bytes
        images = np.array([known.get(rest, NO_TOKEN) for rest in unique], np.int32)
    if rests:
        v_N, c_N = np.array([(v, c) for v, c, _ in rests], np.int32).T
        ids_VC[v_N, c_N] = images[np.array([unique[rest] for _, _, rest in rests])]
    return ids_VC


def table_columns(source_tok: Tokenizer, rows: str) -> int:
    """How many columns a token table needs for row maps of this method."""
    if rows != "inside":
        return 1
    return max(1, min(MAX_CONSUMED + 1, int(source_tok.lengths.max(initial=1))))


def prefix_hashes(tokenizer: Tokenizer, columns: int) -> np.ndarray:
    """uint32[V, columns], column c: a hash (FNV-1a) of the token's first c bytes, never 0; 0 where it has fewer.

    Column 0 is the same for all tokens, special ones included.
    """
    pieces = [piece or b"" for piece in tokenizer.canonical_bytes]
    width = columns - 1
    padded = b"".join(piece[:width].ljust(width, b"\0") for piece in pieces)
    bytes_VW = np.frombuffer(padded, np.uint8).reshape(len(pieces), width)
    hash_V = np.full(len(pieces), 2166136261, np.uint32)
    result_VC = np.zeros((len(pieces), columns), np.uint32)
    result_VC[:, 0] = hash_V
    for c in range(1, columns):
        hash_V = (hash_V ^ bytes_VW[:, c - 1]) * np.uint32(16777619)
        result_VC[:, c] = np.where(tokenizer.lengths >= c, np.maximum(hash_V, 1), 0)
    return result_VC


def _by_role(target_tok: Tokenizer, source_tok: Tokenizer) -> dict[int, int]:
    images: dict[int, int] = {}
    for role in _ROLE_ORDER:
        source_id, target_id = source_tok.roles.get(role), target_tok.roles.get(role)
        if source_id is not None and target_id is not None:
            images.setdefault(source_id, target_id)
    return images
