"""The files that a tokenizer is made of: a local folder's or a hub name's, in any of the forms they are saved in."""

from pathlib import Path
from typing import Any

from fusejax import hub, sentencepiece_model
from fusejax.errors import UserError


def load(model: str, revision: str | None) -> Any:
    """transformers' tokenizer; UserError where there is none, it cannot be read, or the hub is out of reach."""
    hf = _load(model, revision)
    # transformers makes an empty tokenizer, without a word, where the files of one are missing.
    if not set(hf.get_vocab()).difference(hf.all_special_tokens):
        _refuse_missing(model)
    return hf


def _load(model: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    require_name(model)
    local = hub.is_local(model)
    if local and not Path(model).expanduser().is_dir():
        raise UserError(f"{model}: no such model folder")
    if local:
        hub.refuse_revision(model, revision)
    name = str(Path(model).expanduser()) if local else model
    raw = _raw_sentencepiece(name, revision)
    if raw is not None:
        return raw
    try:
        return _as_filed(AutoTokenizer.from_pretrained(name, revision=revision, local_files_only=True), name, revision)
    except Exception as error:  # `tokenizers` raises Exception itself for a file that it cannot read
        if local:
            _refuse_missing(model)
            _check_config(Path(name))
            reason = _blamed(Path(name), error)
            raise UserError(f"{model}: no tokenizer can be loaded from this folder ({reason})") from None
    hub.require_reachable(model, "model")
    try:
        hf = AutoTokenizer.from_pretrained(name, revision=revision)
        return _raw_sentencepiece(name, revision) or _as_filed(hf, name, revision)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"{model}: its tokenizer cannot be loaded from the hub ({_first_line(error)})") from None


def require_name(model: str) -> None:
    """UserError for what the system takes for no path at all: too long a name, the home of nobody."""
    try:
        Path(model).expanduser().exists()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{model}: should be a model folder or a hub name ({reason})") from None


def has_files(folder: Path) -> bool:
    """Whether a folder holds a vocabulary in any of the forms that tokenizers are saved in."""
    forms = ("tokenizer.json", "*.model", "vocab*", "merges.txt", "*.tiktoken", "*.bpe")
    return any(any(folder.glob(form)) for form in forms)


def _refuse_missing(model: str) -> None:
    """UserError where a local folder holds no tokenizer at all."""
    folder = Path(model).expanduser()
    if folder.is_dir() and not has_files(folder):
        if (folder / "export/config.json").is_file():
            raise UserError(f"{model}: this is the folder of a job; the model that it made is {model}/export")
        raise UserError(
            f"{model}: this folder holds no tokenizer; put the model's tokenizer.json (or tokenizer.model) there"
        )


def stamps(model: str) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of a local folder's small files: a changed tokenizer is loaded anew."""
    require_name(model)
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return ()
    found = [
        (file.name, file.stat()) for file in folder.iterdir() if file.suffix in (".json", ".model", ".txt", ".jinja")
    ]
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in found))


def _check_config(folder: Path) -> None:
    """UserError where a config.json is broken: transformers reads it for the tokenizer too, and blames that."""
    from fusejax.models import files

    if (folder / "config.json").exists():
        files.read_json(folder / "config.json")


def _blamed(folder: Path, error: BaseException) -> str:
    """What is wrong with a folder's tokenizer, and in which file, as far as that can be told."""
    from tokenizers import Tokenizer as Backend

    from fusejax.models import files

    there = [name for name in ("tokenizer.json", "tokenizer_config.json") if (folder / name).is_file()]
    try:
        for name in there:
            files.read_json(folder / name)
    except UserError as fault:
        return str(fault)
    if "tokenizer.json" in there:
        try:
            Backend.from_file(str(folder / "tokenizer.json"))
        except Exception as fault:  # see _load
            return f"tokenizer.json: {_first_line(fault)}"
    # The message of these alone is a key, or a word of somebody's program.
    kind = f"{type(error).__name__}: " if isinstance(error, KeyError | AttributeError | TypeError | IndexError) else ""
    return f"{' or '.join(there)}: {kind}{_first_line(error)}" if there else f"{kind}{_first_line(error)}"


def _find(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a folder, or of a hub name in the local cache."""
    from transformers.utils import cached_file

    found = cached_file(
        name,
        file,
        revision=revision,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return Path(found) if found else None


def _raw_sentencepiece(name: str, revision: str | None) -> Any:
    """The tokenizer of a folder or hub name that has only a SentencePiece model, else None."""
    path = _find(name, "tokenizer.model", revision)
    if path is None or _find(name, "tokenizer.json", revision) is not None:
        return None
    return sentencepiece_model.load(path, _find(name, "tokenizer_config.json", revision))


def _as_filed(hf: Any, name: str, revision: str | None) -> Any:
    """`hf`, or where it does otherwise than its tokenizer.json on some probe, that file's tokenizer.

    transformers makes the backend of some classes (LlamaTokenizer) anew from its vocabulary and merges, and then
    spaces at the beginning of a text become other tokens.
    """
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    path, made = _find(name, "tokenizer.json", revision), getattr(hf, "backend_tokenizer", None)
    if path is None or made is None:
        return hf
    filed = Backend.from_file(str(path))
    if all(
        filed.encode(probe, add_special_tokens=False).ids == made.encode(probe, add_special_tokens=False).ids
        for probe in sentencepiece_model.PROBES
    ):
        return hf
    return PreTrainedTokenizerFast.from_pretrained(name, revision=revision or "main", local_files_only=True)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).strip()
