"""Bits per UTF-8 byte on held-out documents: the one number that compares models with different tokenizers.

For a document of tokens 1 .. n that end at bytes b_1 ≤ … ≤ b_n, with p the model's probability of a token after all
before it:

    bits = −Σ_{i=2..n} log2 p(token i)        bytes = b_n − b_1

The first token is left out on both sides, because nothing stands before it that the model could predict it from. A
model that was trained with a BOS gets one in front, and predicts the first token too: then i runs from 1, and bytes =
b_n. EOS is no text and is not counted. Bits and bytes are summed over the documents of a domain; `average` is the mean
over domains.

A document that is longer than the model reads at once runs in windows: window w reads tokens w·stride onwards, and
counts what the windows before it have not. So every token is counted once, and is predicted from at least
max_length − stride tokens before it where there are as many. The BOS stands in front of the document, not of each
window.
"""

import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import asdict, dataclass
from itertools import islice, tee
from typing import Any

import numpy as np
from jax.sharding import Mesh

from fusejax import conversations, sharding
from fusejax.errors import UserError
from fusejax.progress import progress
from fusejax.scoring import Scorer, check_fits, inputs_and_labels
from fusejax.tokenizers import Tokenizer

_USUAL_TOKENS = 8192  # of a batch
_WINDOW = 1024  # documents that are sorted by length together


@dataclass
class DomainSums:
    """What was counted in one domain; sums in double precision."""

    nats: float = 0.0
    bytes: int = 0
    tokens: int = 0
    documents: int = 0

    @property
    def bits_per_byte(self) -> float:
        return self.nats / np.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        """exp of the mean cross-entropy per token; not comparable between tokenizers."""
        return float(np.exp(self.nats / self.tokens))

    def add(self, other: "DomainSums") -> None:
        """Count what another has counted as well."""
        self.nats += other.nats
        self.bytes += other.bytes
        self.tokens += other.tokens
        self.documents += other.documents


def measure(
    model: Any,
    tokenizer: Tokenizer,
    documents: Iterable[dict[str, Any]],
    tokens: Iterable[dict[str, Any]],
    *,
    max_length: int,
    stride: int | None = None,
    batch_tokens: int = _USUAL_TOKENS,
    mesh: Mesh | None = None,
    name: str = "model",
) -> dict[str, DomainSums]:
    """The sums of every domain, in the order of their first documents.

    model: a Decoder. documents: records with "id" and "domain"; tokens: records with "ids" int32 [n] and "boundaries"
    int32 [n] made by `tokenizer`, in the same order (two stores, lists, or iterators). max_length: tokens of a window,
    stride: by how many windows of longer documents advance, 1 .. max_length (default: max_length / 2).
    name: how messages call the model. Raises UserError where the tokenizer does not fit the model, where a value is not
    a number, and where a domain has nothing that can be predicted.
    """
    sums: dict[str, DomainSums] = {}
    total = len(documents) if isinstance(documents, Sized) else 0
    started, n_tokens = time.monotonic(), 0
    ours, theirs = tee(tokens)
    losses = token_losses(
        model,
        tokenizer,
        (text["ids"] for text in theirs),
        max_length=max_length,
        stride=stride,
        batch_tokens=batch_tokens,
        mesh=mesh,
        name=name,
    )
    with progress(f"evaluate {name}", total) as bar:
        for record, text, ce in zip(documents, ours, losses, strict=True):
            ce = spoken_losses(ce, text)
            nats = float(ce.sum(dtype=np.float64))
            require_number(nats, name, record)
            domain = sums.setdefault(record["domain"], DomainSums())
            first, end = scored_span(tokenizer, text["boundaries"])
            domain.add(DomainSums(nats, end - first, counted(ce, text), 1))
            n_tokens += len(ce)
            bar.advance(1, f"{n_tokens / (time.monotonic() - started):,.0f} tokens/s")
    require_bytes(sums, name)
    return sums


def spoken_losses(ce: np.ndarray, text: dict[str, Any]) -> np.ndarray:
    """`token_losses` of a document; of a conversation 0 for tokens that are not what the assistant says."""
    inside = conversations.text_tokens(text)
    return ce if inside is None else np.where(inside[len(inside) - len(ce) :], ce, 0).astype(ce.dtype)


def counted(ce: np.ndarray, text: dict[str, Any]) -> int:
    """Of how many tokens a document's losses are."""
    inside = conversations.text_tokens(text)
    return len(ce) if inside is None else int(inside.sum())


def scored_span(tokenizer: Tokenizer, boundaries: np.ndarray) -> tuple[int, int]:
    """(first byte, end) of what is predicted of a document: all of it after a BOS, else all but its first token."""
    if not len(boundaries):
        return 0, 0
    return 0 if tokenizer.adds_bos else int(boundaries[0]), int(boundaries[-1])


def require_number(nats: float, name: str, record: dict[str, Any]) -> None:
    """UserError where a model gave something else."""
    if not np.isfinite(nats):
        raise UserError(
            f"{name}: gives values that are not numbers on held-out document {record['id']}; its weights are damaged, "
            "or precision.compute should be float32"
        )


def require_bytes(sums: dict[str, DomainSums], name: str) -> None:
    """UserError where a domain has nothing to predict."""
    for domain, counted in sums.items():
        if not counted.bytes:
            raise UserError(f"held-out domain {domain!r}: none of its documents is longer than one token of {name}")


def token_losses(
    model: Any,
    tokenizer: Tokenizer,
    ids: Iterable[np.ndarray],
    *,
    max_length: int,
    stride: int | None = None,
    batch_tokens: int = _USUAL_TOKENS,
    mesh: Mesh | None = None,
    name: str = "model",
) -> Iterator[np.ndarray]:
    """For each document its tokens' cross-entropies, float32 nats; all tokens after a BOS, else all but the first.

    ids: int32 [n] of each document, without special tokens. The other arguments are those of `measure`.
    """
    check_fits(tokenizer, model.config.vocab_size, name)
    stride = resolve_stride(stride, max_length)
    scorer = Scorer(
        model,
        k=0,
        max_length=max_length,
        batch_tokens=batch_tokens,
        mesh=sharding.make_mesh() if mesh is None else mesh,
    )
    for together in batched(ids, _WINDOW):
        yield from _cross_entropies(
            scorer, tokenizer, together, max_length=max_length, stride=stride, batch_tokens=batch_tokens
        )


def resolve_stride(stride: int | None, max_length: int, key: str = "stride") -> int:
    """The stride, by default half a window; UserError where it does not fit the window. key: how the user gives it."""
    stride = max(max_length // 2, 1) if stride is None else stride
    if not 0 < stride <= max_length:
        raise UserError(f"{key}: {stride} should be between 1 and the {max_length} tokens of a window")
    return stride


def needed_tokens(inputs: Sequence[np.ndarray], max_length: int, batch_tokens: int) -> int:
    """`batch_tokens`, or what these inputs fill where that is less: rows beyond them would be padding.

    Up to the usual size of a batch it stays, so that the last few documents need no programs of their own.
    """
    filled = sum(max(2 * len(line), max_length // 8 + 8) for line in inputs)  # padded as `scoring.plan` does, at most
    return min(batch_tokens, max(filled, _USUAL_TOKENS))


def batched(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` values, the last one shorter."""
    rest = iter(values)
    while together := list(islice(rest, size)):
        yield together


def bits_per_byte(
    model: Any,
    tokenizer: Tokenizer,
    documents: Iterable[dict[str, Any]],
    tokens: Iterable[dict[str, Any]],
    **options: Any,
) -> dict[str, float]:
    """{domain: bits per byte, ..., "average": mean over domains}; arguments and errors of `measure`."""
    sums = measure(model, tokenizer, documents, tokens, **options)
    return numbers(sums)["bits_per_byte"]


def with_average(values: dict[str, float]) -> dict[str, float]:
    """`values` and, under "average", their mean: every domain counts alike, however much text it has."""
    return {**values, "average": float(np.mean(list(values.values())))}


def numbers(sums: dict[str, DomainSums]) -> dict[str, dict[str, Any]]:
    """What JSON files keep of a result: bits per byte and perplexity by domain, with their averages, and the counts."""
    return {
        "bits_per_byte": with_average({domain: s.bits_per_byte for domain, s in sums.items()}),
        "perplexity": with_average({domain: s.perplexity for domain, s in sums.items()}),
        "counts": {domain: asdict(s) for domain, s in sums.items()},
    }


def windows(n_inputs: int, max_length: int, stride: int) -> list[tuple[int, int, int]]:
    """(first input, first label that counts, end) of each window over inputs 0 .. n_inputs − 1; input i has label i."""
    found = [(0, 0, min(max_length, n_inputs))]
    while found[-1][2] < n_inputs:
        counted = found[-1][2]
        start = len(found) * stride
        found.append((start, counted, min(start + max_length, n_inputs)))
    return found


def windowed(
    documents: Sequence[np.ndarray], tokenizer: Tokenizer, max_length: int, stride: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[tuple[int, int]]]:
    """(inputs, labels, (document, first label that counts)) of every window of every document."""
    inputs: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    owners: list[tuple[int, int]] = []
    for document, ids in enumerate(documents):
        line, following = inputs_and_labels(ids, tokenizer)
        line, following = line[:-1], following[:-1]  # the last label is EOS
        for start, counted, end in windows(len(line), max_length, stride):
            inputs.append(line[start:end])
            labels.append(following[start:end])
            owners.append((document, counted - start))
    return inputs, labels, owners


def _cross_entropies(
    scorer: Scorer,
    tokenizer: Tokenizer,
    documents: Sequence[np.ndarray],
    *,
    max_length: int,
    stride: int,
    batch_tokens: int,
) -> Iterator[np.ndarray]:
    """`token_losses` of a few documents.

    Sums are rounded, so they are taken in an order that does not depend on how documents shared batches.
    """
    inputs, labels, owners = windowed(documents, tokenizer, max_length, stride)
    scorer.batch_tokens = needed_tokens(inputs, max_length, batch_tokens)
    found: list[np.ndarray] = [np.zeros(0, np.float32)] * len(inputs)
    for places, scores in scorer(inputs, labels):
        for place, part in zip(places, scores, strict=True):
            found[place] = part.ce[owners[place][1] :]
    parts: list[list[np.ndarray]] = [[] for _ in documents]
    for (document, _), ce in zip(owners, found, strict=True):
        parts[document].append(ce)
    yield from (np.concatenate(ces) for ces in parts)
