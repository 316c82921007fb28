"""Documents: read from a corpus, told apart by content, split to fit, and tokenized for every model.

The stage `prepare` writes data/train and, where there is an evaluation corpus, data/heldout: a store of documents and
one store of tokens for each distinct tokenizer, all in the same order.
"""

import io
import json
import os
import time
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from fusejax import conversations, paths, reading, settings, tokenizers
from fusejax.config import Config, CorpusConfig
from fusejax.errors import UserError
from fusejax.outputs import check_inputs, fingerprint, write_atomically
from fusejax.progress import progress, say
from fusejax.splitting import room, split_text
from fusejax.store import Store, StoreWriter, read_manifest
from fusejax.tokenizers import Tokenizer

_PARTS = "parts.npz"
_MADE_FROM = "corpus.json"
_SHARD_DOCUMENTS = 64
_SAY_EVERY_S = 5.0
_SMALL_BYTES = 32 << 20


@dataclass(frozen=True)
class Document:
    """id: the first 16 hex digits of the text's sha256, with `.p` for part p of a document that was split.

    conversation: the messages (`fusejax.conversations.dump`) where it is one; then `text` is what the assistant says.
    """

    id: str
    domain: str
    text: str
    conversation: str = ""


def read_documents(corpus: CorpusConfig, counts: Counter[str] | None = None) -> Iterator[Document]:
    """The documents of a corpus in order, whole: the chosen domains, each text once, up to the limits of each domain.

    counts gets `duplicates` (same text as an earlier document), `empty` and `over_limit`: documents left out. An empty
    text is a UserError in files that the user can put right; in data sets from a hub it is left out. Raises UserError
    for every fault of the input, and where no document is left.
    """
    counts = Counter() if counts is None else counts
    taken: Counter[str] = Counter()
    size: Counter[str] = Counter()
    seen: set[str] = set()
    domains: set[str] = set()
    from_hub = corpus.path.startswith(("tfds:", "huggingface:"))

    def full(domain: str) -> bool:
        wanted = corpus.domains is None or domain in corpus.domains
        return not wanted or (corpus.limit is not None and taken[domain] >= corpus.limit)

    for where, domain, text, conversation in reading.texts(corpus, full):
        domains.add(domain)
        if corpus.domains is not None and domain not in corpus.domains:
            continue
        if not text.strip():
            if not from_hub:
                raise UserError(f"{where}: the text is empty; remove this document")
            counts["empty"] += 1
            continue
        data = (conversation or text).encode("utf-8")
        name = sha256(data).hexdigest()[:16]
        if name in seen:
            counts["duplicates"] += 1
            continue
        too_much = corpus.limit_bytes is not None and size[domain] + len(data) > corpus.limit_bytes
        if too_much or full(domain):
            counts["over_limit"] += 1
            if corpus.domains is not None and all(map(full, corpus.domains)):
                break
            continue
        seen.add(name)
        taken[domain] += 1
        size[domain] += len(data)
        yield Document(name, domain, text, conversation)
    if not taken:
        raise UserError(f"{corpus.path.rstrip(':')}: {_none_left(corpus, domains, counts)}")


def _none_left(corpus: CorpusConfig, domains: set[str], counts: Counter[str]) -> str:
    if corpus.domains is not None and not domains.intersection(corpus.domains):
        there = ", ".join(sorted(domains)[:20]) or "none"
        return f"no documents of corpus.domains {', '.join(corpus.domains)}; domains there: {there}"
    if counts["over_limit"]:
        return f"every document is longer than corpus.limit_bytes {corpus.limit_bytes}"
    return "no documents"


def check(corpus: CorpusConfig) -> None:
    """UserError where the first text of a corpus on this machine cannot be read; one on a hub is left alone."""
    if corpus.path.startswith(("tfds:", "huggingface:")):
        return
    if next(reading.texts(corpus), None) is None:
        raise UserError(f"{corpus.path}: no documents")


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[dict[str, np.ndarray]]:
    """The tokens of documents: ids and boundaries int32 [n]; of conversations what `conversations.encode` gives."""
    chats = [document for document in documents if document.conversation]
    if not chats:
        encoded = tokenizer.encode_batch([document.text for document in documents])
        return [{"ids": ids, "boundaries": boundaries} for ids, boundaries in encoded]
    if tokenizer.template is None:
        raise UserError(f"{tokenizer.name}: reads conversations with `bos: template` only")
    return [
        conversations.encode(tokenizer, conversations.load(document.conversation), f"conversation {document.id}")
        for document in chats
    ]


def split_document(document: Document, tokenizers: Sequence[Tokenizer], max_tokens: int) -> list[Document]:
    """The document in parts of at most `max_tokens` tokens in every tokenizer, EOS and BOS included.

    Joined, the parts' texts are the document's. Parts end at white space where there is any near, never inside a
    character. See `fusejax.splitting`.
    """
    return _parts(document, split_text(document.text, tokenizers, max_tokens))


def _parts(document: Document, texts: Sequence[str]) -> list[Document]:
    if len(texts) == 1:
        return [replace(document, text=texts[0])]
    return [Document(f"{document.id}.{p}", document.domain, text) for p, text in enumerate(texts)]


def local_size(corpus: CorpusConfig) -> int | None:
    """Bytes of text of a corpus on this machine (of large files estimated), None for one that must be fetched."""
    if corpus.path.startswith(("tfds:", "huggingface:")) or (reading.located(corpus) / "dataset_info.json").exists():
        return None
    if not corpus.path.startswith("stdlib:"):
        on_disk = [(path, paths.size(path)) for path, _ in reading.files(corpus)]
        if sum(size for _, size in on_disk) > _SMALL_BYTES:
            return sum(size * (3 if path.suffix in (".gz", ".parquet") else 1) for path, size in on_disk)
    return sum(len((document.conversation or document.text).encode("utf-8")) for document in read_documents(corpus))


def prepare(config: Config) -> None:
    """The stage `prepare`: the documents and tokens of data/train and data/heldout that are not there yet.

    Documents too long for `max_length` in any tokenizer are split. A document of the evaluation corpus that also
    stands in the training corpus is left out of training. Raises UserError where the folders were made from other text.
    """
    known = list({tokenizer.fingerprint: tokenizer for tokenizer in tokenizers.for_config(config).values()}.values())
    heldout: Collection[str] = ()
    if config.evaluation.corpus is not None:
        heldout = _Preparation(config, "heldout", config.evaluation.corpus, known).run()
    _Preparation(config, "train", config.corpus, known, heldout).run()


def documents(config: Config, split: str = "train") -> Store:
    """The documents of data/`split`; UserError where `prepare` made them of another corpus, or for other lengths."""
    folder = config.folder / "data" / split
    store = Store(folder / "documents")
    made_from = {"max_length": store.inputs.get("max_length", config.max_length)}
    wanted: dict[str, str | int] = {"max_length": config.max_length}
    corpus = config.corpus if split == "train" else config.evaluation.corpus
    recorded = _recorded(folder)
    if corpus is not None and recorded is not None:
        made_from |= recorded
        wanted |= _settings(corpus, split)
    remedy = "run the stage `prepare` with this configuration first, or choose another `output`"
    check_inputs(folder, made_from, wanted, remedy, settings.defaults(Config))
    return store


def _recorded(folder: Path) -> dict[str, str | int] | None:
    """The corpus that `prepare` last found a split's text in; None where nothing is known of it."""
    try:
        found = json.loads((folder / _MADE_FROM).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _settings(corpus: CorpusConfig, split: str) -> dict[str, str | int]:
    """The configuration's keys of a split's corpus, flat."""
    prefix = "corpus" if split == "train" else "evaluation.corpus"
    values = corpus.model_dump(mode="json", exclude={"expected_tokens"})
    return {f"{prefix}.{key}": value for key, value in values.items()}


class _Preparation:
    """One split: an index pass (ids), a pass that decides on parts, then documents and tokens, shard by shard."""

    def __init__(
        self,
        config: Config,
        split: str,
        corpus: CorpusConfig,
        known: Sequence[Tokenizer],
        left_out: Collection[str] = (),
    ) -> None:
        self._title, self._split_of, self._path = f"prepare {split}", split, corpus.path.rstrip(":")  # of `stdlib:`
        self._folder = config.folder / "data" / split
        self._corpus, self._tokenizers, self._max_length = corpus, known, config.max_length
        self._left_out = frozenset(left_out)
        self._n_documents = 0

    def run(self) -> set[str]:
        """Make what is missing; the ids of all whole documents."""
        ids, text = self._index()
        inputs: dict[str, str | int] = {"text": text, "max_length": self._max_length}
        folder = self._folder / "documents"
        made = read_manifest(folder)
        if made is not None:
            remedy = f"remove {self._folder} to make it anew, or choose another `output`"
            check_inputs(folder, {key: made["inputs"].get(key) for key in inputs}, inputs, remedy)
        done = made is not None and made["complete"]
        if not done:
            self._write_documents(folder, inputs)
        documents = Store(folder)
        todo = [tokenizer for tokenizer in self._tokenizers if self._write_tokens(documents, tokenizer)]
        # Not an input: the same text may come from elsewhere. The stages after this one go by it, see `documents`.
        made_from = _settings(self._corpus, self._split_of)
        if _recorded(self._folder) != made_from:
            write_atomically(self._folder / _MADE_FROM, json.dumps(made_from, indent=1))
        if done and not todo:
            say(f"{self._title}: done before, skipped ({len(documents)} documents)")
        return ids

    def _read(self, counts: Counter[str] | None = None) -> Iterator[Document]:
        for document in read_documents(self._corpus, counts):
            if document.id not in self._left_out:
                yield document
            elif counts is not None:
                counts["heldout"] += 1

    def _index(self) -> tuple[set[str], str]:
        """(ids of all documents, fingerprint of the text), and a line on what was left out."""
        counts: Counter[str] = Counter()
        ids, digest, size, last = set(), sha256(), 0, time.monotonic()
        for document in self._read(counts):
            ids.add(document.id)
            digest.update(f"{document.id} {document.domain}\n".encode())
            size += len(document.text)
            if time.monotonic() - last > _SAY_EVERY_S:
                last = time.monotonic()
                say(f"{self._title}: reading {self._path}: {len(ids)} documents so far")
        if not ids:
            raise UserError(f"{self._path}: every document is also held out for evaluation; none is left")
        names = {
            "duplicates": "that repeat another",
            "empty": "without text",
            "heldout": "that are held out for evaluation",
        }
        left_out = ", ".join(f"{counts[key]} {what}" for key, what in names.items() if counts[key])
        left_out = f"; left out: {left_out}" if left_out else ""
        say(f"{self._title}: {len(ids)} documents, {size:,} characters{left_out}")
        self._n_documents = len(ids)
        return ids, digest.hexdigest()[:16]

    def _write_documents(self, folder: Path, inputs: dict[str, str | int]) -> None:
        ends, counts = self._ends(folder, inputs)
        writer = StoreWriter(
            folder, inputs | {"parts": fingerprint(ends.tobytes())}, int(counts.sum()), _SHARD_DOCUMENTS
        )
        missing = dict(writer.missing())
        with progress(self._title, sum(map(len, missing.values()))) as bar:
            waiting: list[dict[str, str]] = []
            for n, part in enumerate(self._cut(ends, counts), 1):
                waiting.append(_record(part))
                if len(waiting) == _SHARD_DOCUMENTS or n == counts.sum():
                    shard = (n - 1) // _SHARD_DOCUMENTS
                    if shard in missing:
                        writer.write(shard, waiting)
                        bar.advance(len(waiting))
                    waiting = []
        split = int((counts > 1).sum())
        writer.finish({"documents": int((counts > 0).sum()), "parts": int(counts.sum()), "split": split})
        if split:
            say(
                f"{self._title}: {split} documents longer than {self._max_length} tokens became "
                f"{counts[counts > 1].sum()}"
            )

    def _cut(self, ends: np.ndarray, counts: np.ndarray) -> Iterator[Document]:
        """The parts of all documents, from where each ends (in characters of its document)."""
        stops = np.cumsum(counts)
        for d, document in enumerate(self._read()):
            edges = [0, *ends[stops[d] - counts[d] : stops[d]].tolist()]
            if counts[d]:
                yield from _parts(document, [document.text[a:b] for a, b in pairwise(edges)])

    def _ends(self, folder: Path, inputs: dict[str, str | int]) -> tuple[np.ndarray, np.ndarray]:
        """(where each part ends, parts of each document), kept beside the documents: they need every tokenizer."""
        path = folder / _PARTS
        key = fingerprint(inputs)
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as saved:
                if str(saved["key"]) == key:
                    return saved["ends"], saved["counts"]
        except (OSError, ValueError, KeyError, BadZipFile):
            pass  # missing or damaged: made again, the same
        ends, counts = array("q"), array("q")
        with progress(f"{self._title}: lengths", self._n_documents) as bar:
            for batch in _batches(self._read(), _SHARD_DOCUMENTS):
                for lengths in self._split(batch):
                    counts.append(len(lengths))
                    ends.extend(np.cumsum(lengths, dtype=np.int64).tolist())
                bar.advance(len(batch))
        result = np.array(ends, np.int64), np.array(counts, np.int64)
        if not result[1].any():
            raise UserError(f"{self._path}: no document has a token in every tokenizer")
        buffer = io.BytesIO()
        np.savez(buffer, key=np.array(key), ends=result[0], counts=result[1])
        write_atomically(path, buffer.getvalue())
        return result

    def _split(self, batch: Sequence[Document]) -> Iterator[list[int]]:
        """For each document the lengths of its parts (in characters); none where a tokenizer has no token for one."""
        if self._corpus.messages_key is not None:
            for document in batch:
                yield self._opening(document)
            return
        texts = [document.text for document in batch]
        tokens = np.array([[len(ids) for ids, _ in t.encode_batch(texts)] for t in self._tokenizers])
        most = np.array([room(t, self._max_length) for t in self._tokenizers])
        for d, text in enumerate(texts):
            parts, enough = [text], bool((tokens[:, d] > 0).all())
            if (tokens[:, d] > most).any():
                parts = split_text(text, self._tokenizers, self._max_length)
                enough = all(len(t.encode(part)[0]) for part in parts for t in self._tokenizers)
            if enough:
                yield [len(part) for part in parts]
            else:
                say(f"{self._title}: document {batch[d].id} is left out: a tokenizer has no token for part of it")
                yield []

    def _opening(self, document: Document) -> list[int]:
        """The length of a conversation's text up to the last turn of the assistant that fits; none where none does."""
        for messages in conversations.openings(conversations.load(document.conversation)):
            where = f"conversation {document.id}"
            encoded = [conversations.encode(t, messages, where)["ids"] for t in self._tokenizers]
            if all(len(ids) <= room(t, self._max_length) for ids, t in zip(encoded, self._tokenizers, strict=True)):
                return [len(conversations.spoken(messages))]
        say(
            f"{self._title}: conversation {document.id} is left out: its first turn is beyond {self._max_length} tokens"
        )
        return []

    def _write_tokens(self, documents: Store, tokenizer: Tokenizer) -> bool:
        """Whether there was anything left to write."""
        inputs = {"text": fingerprint(documents.inputs), "tokenizer": tokenizer.fingerprint}
        folder = self._folder / "tokens" / tokenizer.fingerprint
        writer = StoreWriter(folder, inputs, len(documents), _SHARD_DOCUMENTS)
        if writer.done:
            return False
        missing = writer.missing()
        most, total = room(tokenizer, self._max_length), 0
        title = f"{self._title}: tokens of {os.path.basename(tokenizer.name.rstrip('/'))}"
        with progress(title, sum(len(span) for _, span in missing)) as bar:
            for shard, span in missing:
                records = [documents[i] for i in span]
                encoded = encode(tokenizer, [Document(**record) for record in records])
                for record, ids in zip(records, (tokens["ids"] for tokens in encoded), strict=True):
                    if not 0 < len(ids) <= most:
                        raise UserError(
                            f"{self._folder}: its documents were split for other tokenizers than that of "
                            f"{tokenizer.name}, in which document {record['id']} has {len(ids)} tokens, not 1 to "
                            f"{most}; remove that folder to split them anew, or choose another `output`"
                        )
                    total += len(ids)
                writer.write(shard, encoded)
                bar.advance(len(span))
        writer.finish({"tokenizer": tokenizer.name})
        return True


def _record(part: Document) -> dict[str, str]:
    record = {"id": part.id, "domain": part.domain, "text": part.text}
    kept = part.conversation and conversations.opening(part.conversation, part.text)
    return record | ({"conversation": kept} if kept else {})


def _batches(documents: Iterator[Document], size: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
