"""Corpora as they come: jsonl, parquet, text files, TFDS and Hugging Face data sets → texts, one at a time.

Nothing here holds a whole corpus in memory. Every fault of the input is a UserError that names the file and the place.
"""

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

from fusejax import conversations, hub, paths
from fusejax.config import CorpusConfig
from fusejax.errors import UserError

_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")


class Text(NamedTuple):
    """One text of a corpus. where: its file and place, for messages.

    conversation: of corpus.messages_key, as JSON (see `fusejax.conversations`); its `text` is what the assistant says.
    """

    where: str
    domain: str
    text: str
    conversation: str = ""


def texts(corpus: CorpusConfig, full: Callable[[str], bool] = lambda domain: False) -> Iterator[Text]:
    """All texts of a corpus in order. full(domain): no more texts of this domain are wanted, files may be skipped."""
    for text in _texts(corpus, full):
        if text.domain == "average" and (corpus.domains is None or text.domain in corpus.domains):
            raise UserError(
                f"{text.where}: a domain cannot be called 'average', as the mean over domains is; rename it"
            )
        yield text


def _texts(corpus: CorpusConfig, full: Callable[[str], bool]) -> Iterator[Text]:
    kind, _, rest = corpus.path.partition(":")
    if kind == "stdlib":
        yield from _stdlib(corpus)
    elif kind == "tfds" and rest:
        yield from _records(corpus, *_tfds(corpus, rest))
    elif kind == "huggingface" and rest:
        yield from _records(corpus, *_huggingface(corpus, rest))
    elif _is_tfds_folder(located(corpus)):
        yield from _records(corpus, *_tfds_folder(corpus))
    else:
        found = files(corpus)
        if corpus.split != "train":
            raise UserError(
                f"{corpus.path}: split {corpus.split!r} means nothing there; only tfds:, huggingface:, stdlib: and "
                "TFDS folders have splits"
            )
        for path, domain in found:
            if corpus.domain_key is not None or not full(domain):
                yield from _READERS[_suffix(path)](path, corpus, domain)


def files(corpus: CorpusConfig) -> list[tuple[Path, str]]:
    """(file, its domain where no key names one) of a local corpus, sorted by path.

    A file's domain is its stem; the domain of a text file in a folder is the folder that it lies in.
    """
    path = located(corpus)
    if not path.exists():
        raise UserError(f"{corpus.path}: no such corpus file or folder")
    if path.is_file():
        if _suffix(path) is None:
            raise UserError(f"{corpus.path}: a corpus file should end in {', '.join(_SUFFIXES)}")
        return [(path, _stem(path))]
    found = [file for file in _below(path) if _suffix(file)]
    if not found:
        raise UserError(f"{corpus.path}: no documents: this folder holds no file that ends in {', '.join(_SUFFIXES)}")
    return [(file, file.parent.name if _suffix(file) == ".txt" else _stem(file)) for file in sorted(found)]


def located(corpus: CorpusConfig) -> Path:
    """Where a corpus lies; UserError where that is out of reach, or the system takes it for no path at all."""
    try:
        path = paths.at(corpus.path).expanduser()
        paths.check(path)
        path.exists()
    except (OSError, RuntimeError) as error:  # too long a name; the home of nobody
        raise UserError(f"{corpus.path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    return path


def _below(folder: Path) -> Iterator[Path]:
    """All files below a folder, at any depth; what is hidden aside. Links to folders are not followed."""
    for entry in folder.iterdir():
        if entry.name.startswith(".") or not entry.name:
            continue
        if not entry.is_dir():
            yield entry
        elif paths.is_remote(entry) or not entry.is_symlink():
            yield from _below(entry)


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in _SUFFIXES if path.name.lower().endswith(suffix)), None)


def _stem(path: Path) -> str:
    return path.name[: -len(_suffix(path) or "")]


def _field(record: Any, key: str, where: str, setting: str) -> Any:
    """record[key]; `a.b` also reaches into a nested record."""
    value = record
    for part in [key] if isinstance(record, dict) and key in record else key.split("."):
        if not isinstance(value, dict) or part not in value:
            keys = ", ".join(map(str, record)) if isinstance(record, dict) else "none"
            raise UserError(f"{where}: no key {key!r} (corpus.{setting}); keys there: {keys}")
        value = value[part]
    return value


def _text(record: Any, corpus: CorpusConfig, where: str, domain: str) -> Text:
    """A record's text and domain, checked."""
    if corpus.messages_key is not None:
        messages = conversations.read(_field(record, corpus.messages_key, where, "messages_key"), where)
        conversation, text = _utf8(conversations.dump(messages), where), conversations.spoken(messages)
        return Text(where, _domain(record, corpus, where, domain), text, conversation)
    text = _field(record, corpus.text_key, where, "text_key")
    if isinstance(text, bytes):
        text = decode(text, where)
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        raise UserError(f"{where}: key {corpus.text_key!r} should hold a text, it holds a value of type {kind}")
    return Text(where, _domain(record, corpus, where, domain), _utf8(text, where))


def _domain(record: Any, corpus: CorpusConfig, where: str, default: str) -> str:
    if corpus.domain_key is None:
        return default
    domain = _field(record, corpus.domain_key, where, "domain_key")
    if isinstance(domain, bytes):
        return decode(domain, where)
    if isinstance(domain, bool) or not isinstance(domain, str | Integral):
        kind = "null" if domain is None else type(domain).__name__
        raise UserError(f"{where}: key {corpus.domain_key!r} should name a domain, it holds a value of type {kind}")
    return _utf8(str(domain), where, "the domain")


def _utf8(text: str, where: str, what: str = "the text") -> str:
    """The text; UserError where it cannot be written."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: {what} holds half a surrogate pair, which UTF-8 cannot hold") from None
    return text


def decode(data: bytes, where: str) -> str:
    """UTF-8 → text; UserError naming the first byte that is not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start}: 0x{data[error.start]:02x})") from None


def _jsonl(path: Path, corpus: CorpusConfig, domain: str) -> Iterator[Text]:
    number = 0
    try:
        with path.open("rb") as raw, gzip.open(raw) if _suffix(path) == ".jsonl.gz" else raw as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                content = decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, where).strip()
                if not content:
                    continue
                try:
                    record = json.loads(content)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where}: not valid JSON ({error})") from None
                if not isinstance(record, dict):
                    raise UserError(f"{where}: should be an object such as {{{json.dumps(corpus.text_key)}: ...}}")
                yield _text(record, corpus, where, domain)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, gzip.BadGzipFile) and number == 0:
            raise UserError(f"{path}: not a gzip file; remove .gz from its name, or compress it") from None
        after = f" after line {number}" if number else ""
        raise UserError(f"{path}: cannot be read{after} ({error})") from None


def _parquet(path: Path, corpus: CorpusConfig, domain: str) -> Iterator[Text]:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as raw, pyarrow.parquet.ParquetFile(raw) as file:
            names = file.schema_arrow.names
            wanted = {key: key if key in names else key.split(".")[0] for key in _keys(corpus)}
            for key, column in wanted.items():
                if column not in names:
                    raise UserError(f"{path}: no column {key!r}; columns there: {', '.join(names)}")
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=sorted(set(wanted.values()))):
                for record in batch.to_pylist():
                    yield _text(record, corpus, f"{path} row {row}", domain)
                    row += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a parquet file that can be read ({_one_line(error)})") from None


def _keys(corpus: CorpusConfig) -> list[str]:
    return [corpus.messages_key or corpus.text_key, *([corpus.domain_key] if corpus.domain_key else [])]


def _plain(path: Path, corpus: CorpusConfig, domain: str) -> Iterator[Text]:
    if corpus.messages_key is not None:
        raise UserError(f"{path}: corpus.messages_key {corpus.messages_key!r} means nothing for text files")
    if corpus.domain_key is not None:
        raise UserError(f"{path}: corpus.domain_key {corpus.domain_key!r} means nothing for text files")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    yield Text(str(path), domain, decode(data.removeprefix(b"\xef\xbb\xbf"), str(path)))


_READERS: dict[str | None, Callable[[Path, CorpusConfig, str], Iterator[Text]]] = {
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".parquet": _parquet,
    ".txt": _plain,
}


def _stdlib(corpus: CorpusConfig) -> Iterator[Text]:
    if corpus.messages_key is not None:
        raise UserError("corpus.messages_key: `stdlib:` holds no conversations")
    from fusejax import stdlib_corpus

    for item in stdlib_corpus.documents(corpus.split):
        yield Text(f"stdlib: {item.domain} {item.name}", item.domain, item.text)


def _records(corpus: CorpusConfig, records: Any, name: str) -> Iterator[Text]:
    """Rows of a random-access data set."""
    domain = name.replace("/", "_")
    for i in range(len(records)):
        try:
            record = records[i]
        except Exception as error:  # whatever the data set's library raises, the data set is what is wrong
            raise UserError(f"{corpus.path}: record {i} cannot be read ({_one_line(error)})") from None
        yield _text(dict(record), corpus, f"{corpus.path} {corpus.split}[{i}]", domain)


def _import_tfds(path: str) -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import tensorflow_datasets

        return tensorflow_datasets
    except ImportError as error:
        raise UserError(
            f"{path}: needs tensorflow-datasets ({_one_line(error)}): "
            "pip install tensorflow-datasets importlib_resources"
        ) from None


def _is_tfds_folder(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() and (path / "features.json").is_file()


def _tfds_folder(corpus: CorpusConfig) -> tuple[Any, str]:
    tfds = _import_tfds(corpus.path)
    try:
        builder = tfds.builder_from_directory(str(paths.at(corpus.path).expanduser()))
        return _source(corpus, builder), builder.name
    except UserError:
        raise
    except Exception as error:  # see _records
        raise UserError(f"{corpus.path}: not a TFDS folder that can be read ({_one_line(error)})") from None


def _tfds(corpus: CorpusConfig, rest: str) -> tuple[Any, str]:
    tfds = _import_tfds(corpus.path)
    name, _, variant = rest.partition(":")
    try:
        builder = tfds.builder(f"{name}/{variant}" if variant else name, file_format="array_record")
        builder.download_and_prepare(file_format="array_record")
        return _source(corpus, builder), name
    except UserError:
        raise
    except tfds.core.DatasetNotFoundError:  # its message lists every data set that there is
        raise UserError(
            f"{corpus.path}: this data set is neither on this machine nor can it be reached; check the name and the "
            "connection, or prepare it elsewhere and give its folder"
        ) from None
    except Exception as error:  # see _records
        raise UserError(
            f"{corpus.path}: tensorflow-datasets cannot give it ({_one_line(error)}); check the name and the "
            "connection, or prepare it elsewhere and give its folder"
        ) from None


def _source(corpus: CorpusConfig, builder: Any) -> Any:
    splits = sorted(builder.info.splits)
    if corpus.split not in splits:
        raise UserError(f"{corpus.path}: no split {corpus.split!r}; it has {', '.join(splits)}")
    return builder.as_data_source(split=corpus.split)


def _huggingface(corpus: CorpusConfig, rest: str) -> tuple[Any, str]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{corpus.path}: needs datasets ({_one_line(error)}): pip install datasets") from None
    name, _, variant = rest.partition(":")
    local, cached = hub.is_local(name), is_cached(name)
    if not local and not cached:
        hub.require_reachable(name, "data set")
    try:
        return datasets.load_dataset(name, variant or None, split=corpus.split), name.rstrip("/").rsplit("/", 1)[-1]
    except Exception as error:  # see _records
        raise UserError(f"{corpus.path}: datasets cannot give it ({_one_line(error)})") from None


def is_cached(name: str) -> bool:
    """Whether a data set of a hub is in the cache of `datasets`."""
    from datasets import config

    return (Path(config.HF_DATASETS_CACHE) / name.replace("/", "___")).exists()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
