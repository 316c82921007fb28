"""`fusejax bench align`: row maps and token maps of a pair of tokenizers, and the reference's way beside ours.

The tokenizers are those of a configuration (its target against each source), those of `--target` and `--source`
(folders or hub names), or else of the shipped configs/quickstart.yaml. The text is the English and the code of the
running Python's library, unless `--text` names a file.

Row maps are timed without tokenization. Token maps are timed once and cold, because a job makes each but once, and
with the most memory that making it added to the process (0 where it fitted into what was free).
"""

import argparse
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fusejax import config, stdlib_corpus, tokenizers
from fusejax.alignment import mined, plain
from fusejax.alignment.rows import METHODS, Tokens, row_mapper
from fusejax.alignment.tokens import table_columns, token_table
from fusejax.bench import core, positive
from fusejax.errors import UserError
from fusejax.progress import progress, say
from fusejax.tokenizers import Tokenizer

DEFAULT = "configs/quickstart.yaml"
_CHARACTERS = 8000  # of one document of the row maps: about 2048 tokens
_DOCUMENTS = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which tokenizers, which text, how long the series of the dynamic programming are."""
    parser.add_argument("config", metavar="CONFIG.yaml", nargs="?", help=f"whose tokenizers (default {DEFAULT})")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="override a key of the configuration")
    parser.add_argument("--target", metavar="MODEL", help="a folder or hub name with the target's tokenizer")
    parser.add_argument("--source", metavar="MODEL", nargs="+", default=[], help="the same of one source or several")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to align (default: of Python's own library)")
    parser.add_argument(
        "--tokens",
        type=positive,
        nargs="+",
        default=[2048],
        metavar="N",
        help="target tokens of the texts on which `mined` and plain are compared (default 2048)",
    )
    parser.add_argument("--no-plain", action="store_true", help="leave the reference's slow way out")


def run(options: argparse.Namespace) -> list[core.Case]:
    """Row maps in target tokens/s, `mined` against the plain restatement, token maps in seconds, memory in bytes."""
    models = _models(options)
    documents = _documents(options.text)
    found: list[core.Case] = []
    for name, target, source in models:
        say(f"{name}: {source.vocab_size} source tokens, {target.vocab_size} target tokens")
        found += _token_maps(name, target, source)
        found += _row_maps(name, target, source, documents, options.repeats)
        found += _warping(name, target, source, documents, options)
    return found


def _models(options: argparse.Namespace) -> list[tuple[str, Tokenizer, Tokenizer]]:
    """(source's name, target's tokenizer, source's tokenizer)."""
    if bool(options.target) != bool(options.source):
        raise UserError("--target and --source go together: each names a folder or hub name with a tokenizer")
    if options.target:
        if options.config:
            raise UserError(f"either a configuration ({options.config}) or --target and --source, not both")
        target = Tokenizer.load(options.target)
        sources = [(Path(model).name, Tokenizer.load(model)) for model in options.source]
    else:
        path = options.config or DEFAULT
        if not options.config and not Path(path).exists():
            raise UserError(f"{path} is not here; name a configuration, or --target and --source")
        job = config.load(path, options.overrides)
        target = tokenizers.for_model(job.target)
        sources = [(source.label, tokenizers.for_model(source)) for source in job.sources]
    pairs = [(label, target, source) for label, source in sources if source.text_fingerprint != target.text_fingerprint]
    if not pairs:
        raise UserError("every source has the target's own tokenizer: there is nothing to align")
    return pairs


def _documents(file: str | None) -> list[str]:
    if file is None:
        parts = itertools.islice((item.text for item in stdlib_corpus.documents("fusion")), 400)
        text = "\n\n".join(parts)
    else:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {file}: cannot be read as UTF-8 text ({error})") from None
        if not text.strip():
            raise UserError(f"--text {file}: holds no text")
    starts = range(0, len(text), _CHARACTERS)
    step = max(1, len(starts) // _DOCUMENTS)
    return [text[start : start + _CHARACTERS] for start in starts[::step][:_DOCUMENTS]]


def _token_maps(name: str, target: Tokenizer, source: Tokenizer) -> Iterator[core.Case]:
    """Each made once, with nothing prepared but the tokenizers."""
    mined.token_images.cache_clear()
    columns = table_columns(source, "inside")
    functions: dict[str, Callable[[], Any]] = {
        f"{name}: token map prefix": partial(token_table, target, source, "prefix"),
        f"{name}: token map prefix for inside": partial(token_table, target, source, "prefix", columns),
        f"{name}: token map mined": partial(token_table, target, source, "mined"),
    }
    with progress(f"align {name}: token maps", len(functions)) as bar:
        for case, function in functions.items():
            seconds, peak = _once(function)
            bar.advance(1, case)
            yield core.Case(case, seconds, "s")
            if peak is not None:
                yield core.Case(f"{case}, memory", peak, "bytes")


def _once(function: Callable[[], Any]) -> tuple[float, int | None]:
    """(seconds, bytes that the process grew by at its peak, None where the system does not say) of one call."""
    gc.collect()
    start_bytes = core.resident_bytes(reset_peak=True)
    start = time.perf_counter()
    function()
    seconds = time.perf_counter() - start
    peak = core.peak_resident_bytes()
    return seconds, None if peak is None or start_bytes is None else max(0, peak - start_bytes)


def _row_maps(name: str, target: Tokenizer, source: Tokenizer, documents: list[str], repeats: int) -> list[core.Case]:
    tokenized = [(text.encode(), Tokens.of(target, text), Tokens.of(source, text)) for text in documents]

    def apply(mapper: Callable[[bytes, Tokens, Tokens], Any]) -> None:
        for data, target_tokens, source_tokens in tokenized:
            mapper(data, target_tokens, source_tokens)

    functions = {f"{name}: row map {method}": partial(apply, row_mapper(target, source, method)) for method in METHODS}
    seconds = core.measure(functions, repeats, title=f"align {name}: row maps")
    n_tokens = sum(len(target_tokens.ids) for _, target_tokens, _ in tokenized)
    return core.cases(seconds, unit="tokens/s", amounts=float(n_tokens))


def _warping(
    name: str, target: Tokenizer, source: Tokenizer, documents: list[str], options: argparse.Namespace
) -> list[core.Case]:
    """`mined` and the plain restatement on texts of N target tokens."""
    whole = "".join(documents).encode()
    ends_T = target.encode(whole.decode())[1]
    found: list[core.Case] = []
    for n in options.tokens:
        text = whole[: ends_T[min(n, len(ends_T)) - 1]].decode("utf-8", "ignore")
        found += _one_warping(name, target, source, text, options)
    return found


def _one_warping(
    name: str, target: Tokenizer, source: Tokenizer, text: str, options: argparse.Namespace
) -> list[core.Case]:
    target_tokens, source_tokens = Tokens.of(target, text), Tokens.of(source, text)
    size = f"{len(source_tokens.ids)} x {len(target_tokens.ids)}"
    spellings = mined.Spellings(source), mined.Spellings(target)
    ours = partial(mined.warp_tokens, source_tokens, target_tokens, *spellings)
    seconds = core.measure({f"{name}: mined {size}": ours}, options.repeats, title=f"align {name}: mined")
    found = core.cases(seconds)
    if options.no_plain:
        return found
    surfaces = (
        [source.surfaces[i] or "" for i in source_tokens.ids],
        [target.surfaces[i] or "" for i in target_tokens.ids],
    )
    plainly = f"{name}: plain restatement {size}"
    slow = core.measure({plainly: partial(plain.warp_spellings, *surfaces)}, 1, warmup=0, title=f"align {name}: plain")
    return core.cases(seconds | slow, {f"{name}: mined {size}": [plainly], plainly: [f"{name}: mined {size}"]})
