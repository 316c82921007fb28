"""`fusejax import`: next-token distributions that the FuseLLM code saved, taken over as a source's cache.

Such a data set (`datasets.save_to_disk`) has a row for each document: `input_ids` in the source's vocabulary (EOS at
the end, then padding), `attention_mask`, `per_step_logits` and `per_step_indices` (each position's k largest logits and
their tokens) and `metric_ce`, the document's mean cross-entropy. Documents are found by their tokens, in any order.

What such a data set does not hold stays unknown: its logits carry no normalizer, so the k probabilities are scaled to
1 (as that code reads them), and every row gets its document's cross-entropy. That serves `fusion.level: document`; the
gold chain and narrower levels need each token's own, and are refused.
"""

from pathlib import Path
from typing import Any

import numpy as np

from fusejax import models, tokenizers
from fusejax.config import Config
from fusejax.errors import UserError
from fusejax.progress import progress, say
from fusejax.scoring import Scores
from fusejax.sources import NOTE, Note, finish, inputs, shard_records
from fusejax.splitting import room
from fusejax.store import Store, StoreWriter
from fusejax.tokenizers import Tokenizer

COLUMNS = ("input_ids", "attention_mask", "per_step_logits", "per_step_indices", "metric_ce")


def run(dataset: str, config: Config, name: str) -> None:
    """Write the cache of the source called `name` from a data set's folder.

    Raises UserError where the folder is no such data set, the documents of the configuration are not all in it, or the
    configuration needs what it does not hold.
    """
    source = next((source for source in config.sources if source.label == name), None)
    if source is None:
        known = ", ".join(source.label for source in config.sources) or "none"
        raise UserError(f"--source {name}: the configuration has no source of this name; it has {known}")
    _refuse_what_is_unknown(config)
    rows = _open(dataset)
    tokenizer = tokenizers.for_model(source)
    tokens = Store(config.folder / "data/train/tokens" / tokenizer.fingerprint)
    found = _find(dataset, rows, tokens, tokenizer, config)
    made_from = inputs(config, source, tokenizer) | {"model": models.fingerprint(source.model, source.revision)}
    writer = StoreWriter(
        config.folder / "sources" / name, made_from, len(tokens), shard_records(tokens, config.max_length)
    )
    if writer.done:
        say(f"source {name}: done before, skipped")
        return
    if any("imported" not in note for note in writer.notes(NOTE)):
        raise UserError(f"{writer.folder}: holds a part of the source's own rows; remove that folder to import others")
    documents = Store(config.folder / "data/train/documents")
    k = source.top_k or config.cache.top_k
    with progress(f"import {name}", len(tokens)) as bar:
        for shard, span in writer.missing():
            note, records = Note(room(tokenizer, config.max_length)), []
            for i in span:
                scores = _scores(dataset, rows[found[i]], k, tokenizer.vocab_size, tokenizer)
                records.append(note.record(i, scores, tokenizer.vocab_size, config.cache.values))
                bar.advance()
            writer.write(shard, records, note.finish(documents, source) | {"imported": dataset})
    finish(source, tokens, writer, {"imported": dataset})


def _refuse_what_is_unknown(config: Config) -> None:
    if config.cache.kind != "topk":
        raise UserError(f"cache.kind: an imported data set holds the top k, not {config.cache.kind}; set it to topk")
    if config.alignment.gold_chain:
        raise UserError("alignment.gold_chain: needs each token's cross-entropy, which an import has not: set it false")
    if config.fusion.level == "token":
        raise UserError("fusion.level: token needs each token's cross-entropy, which an import has not: use document")


def _open(dataset: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError("fusejax import: needs the package datasets: pip install 'fusejax[hf]'") from None
    if not (Path(dataset) / "dataset_info.json").is_file() and not (Path(dataset) / "dataset_dict.json").is_file():
        raise UserError(f"{dataset}: is not a folder that datasets' save_to_disk wrote (no dataset_info.json)")
    found = datasets.load_from_disk(dataset)
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            raise UserError(f"{dataset}: has no split train; it has {', '.join(found)}")
        found = found["train"]
    missing = [column for column in COLUMNS if column not in found.column_names]
    if missing:
        raise UserError(f"{dataset}: lacks the column {missing[0]}; it has {', '.join(found.column_names)}")
    return found.with_format("numpy")


def _text_tokens(ids: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer) -> slice:
    """Where the tokens of the text stand: without padding, a BOS in front and an EOS at the end."""
    used = np.flatnonzero(mask)
    if not len(used):
        return slice(0, 0)
    first, last = int(used[0]), int(used[-1]) + 1
    first += int(ids[first] == tokenizer.bos_id)
    return slice(first, last - int(last > first and ids[last - 1] == tokenizer.eos_id))


def _find(dataset: str, rows: Any, tokens: Store, tokenizer: Tokenizer, config: Config) -> list[int]:
    """For each document the row of the data set that has its tokens."""
    known: dict[bytes, int] = {}
    with progress("import: documents", len(rows)) as bar:
        for i, row in enumerate(rows.select_columns(["input_ids", "attention_mask"])):
            ids = np.asarray(row["input_ids"], np.int32)
            known.setdefault(ids[_text_tokens(ids, row["attention_mask"], tokenizer)].tobytes(), i)
            bar.advance()
    found = [known.get(np.asarray(record["ids"], np.int32).tobytes(), -1) for record in tokens]
    if -1 in found:
        document = Store(config.folder / "data/train/documents")[found.index(-1)]["id"]
        raise UserError(
            f"{dataset}: {found.count(-1)} of {len(tokens)} documents are not in it by their tokens, the first being "
            f"{document}; corpus, max_length and tokenizer should be those that it was made with"
        )
    return found


def _scores(dataset: str, row: Any, k: int, vocab_size: int, tokenizer: Tokenizer) -> Scores:
    """The rows of the text's tokens; each predicts the token after it."""
    where = _text_tokens(np.asarray(row["input_ids"]), row["attention_mask"], tokenizer)
    ids, logits = np.asarray(row["per_step_indices"])[where], np.asarray(row["per_step_logits"], np.float32)[where]
    n = where.stop - where.start
    if not n:
        return Scores(np.zeros((0, k), np.int32), np.zeros((0, k), np.float32), np.zeros(0, np.float32))
    if ids.shape != logits.shape or ids.ndim != 2 or len(ids) != n or ids.shape[1] < k:
        raise UserError(
            f"{dataset}: per_step_indices has shape {ids.shape} and per_step_logits {logits.shape} for {n} tokens; "
            f"cache.top_k {k} needs as many rows as tokens, of at least {k} entries"
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise UserError(f"{dataset}: per_step_indices holds the id {ids.max()}, the tokenizer knows {vocab_size}")
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    ids, logits = np.take_along_axis(ids, order, -1), np.take_along_axis(logits, order, -1)
    logprobs = logits - np.log(np.exp(logits - logits[:, :1]).sum(-1, keepdims=True)) - logits[:, :1]
    return Scores(ids.astype(np.int32), logprobs, np.full(n, row["metric_ce"], np.float32))
