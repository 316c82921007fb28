"""The options of `fusejax inspect`: of a store, and of an alignment (of a job's document, or of any text)."""

import argparse
from typing import Any

from fusejax import config, settings
from fusejax.errors import UserError
from fusejax.options import refuse


def add(commands: "argparse._SubParsersAction[Any]") -> None:
    """The command and its arguments."""
    help_text = "what a store (documents, tokens, source cache, row maps) holds, or how a document is aligned"
    parser = commands.add_parser(
        "inspect",
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        usage="%(prog)s STORE [--record N] [--row R] | [--verify]\n"
        "       %(prog)s alignment CONFIG.yaml [key=value ...] [--document ID|N] [--source NAME]\n"
        "       %(prog)s alignment --text TEXT --target MODEL --source MODEL [alignment.rows=R] [alignment.tokens=T]",
    )
    parser.add_argument("path", metavar="STORE", help="for example runs/quickstart/sources/NAME; or: alignment")
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="alignment: the job whose document is shown")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="alignment: keys of the configuration; with --text alignment.rows and alignment.tokens",
    )
    parser.add_argument("--record", type=int, metavar="N", help="the record to show (default 0)")
    parser.add_argument("--row", type=int, metavar="R", help="the row of a source's cache (default: the middle one)")
    parser.add_argument("--verify", action="store_true", help="read everything: checksums, counts, order, mass")
    parser.add_argument("--document", metavar="ID|N", help="alignment: the document (default 0)")
    parser.add_argument(
        "--source",
        metavar="NAME",
        help="alignment: the source (default: the first that is not the target), or with --text a model",
    )
    parser.add_argument("--text", help="alignment: show this text in the tokenizers of --target and --source")
    parser.add_argument("--target", metavar="MODEL", help="alignment, with --text: a model's folder or hub name")


def run(options: argparse.Namespace) -> None:
    """Show what is asked for. Raises UserError where the options do not belong together."""
    if options.path != "alignment":
        from fusejax import inspection, verification

        if options.config is not None or options.text is not None:
            raise UserError(f"inspect {options.path}: takes one store; `inspect alignment` takes a configuration")
        if options.verify:
            refuse(options, "STORE --verify", "record", "row", "document", "source", "target")
            verification.verify(options.path)
        else:
            refuse(options, "STORE", "document", "source", "target")
            inspection.show(options.path, options.record or 0, options.row)
        return
    from fusejax.alignment import inspection as alignments

    if options.text is not None:
        refuse(options, "alignment --text", "record", "row", "verify", "document")
        overrides = [options.config, *options.overrides] if options.config is not None else []
        if not (options.target and options.source) or any("=" not in override for override in overrides):
            raise UserError("inspect alignment --text: needs --target MODEL and --source MODEL, and no configuration")
        try:
            options.text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"--text: is not text in UTF-8 (from its character {error.start} on)") from None
        methods = _methods(overrides)
        alignments.show_text(options.text, options.target, options.source, methods.rows, methods.tokens)
    elif options.config is None:
        raise UserError("inspect alignment: needs a CONFIG.yaml, or --text TEXT --target MODEL --source MODEL")
    else:
        refuse(options, "alignment CONFIG.yaml", "record", "row", "verify", "target")
        job = config.load(options.config, options.overrides)
        alignments.show_document(job, options.document or "0", options.source)


def _methods(overrides: list[str]) -> config.AlignmentConfig:
    """`alignment.rows=...` and `alignment.tokens=...`, without a configuration."""
    values = {}
    for override in overrides:
        key, _, method = override.partition("=")
        if key not in ("alignment.rows", "alignment.tokens"):
            raise UserError(f"{override!r}: with --text only alignment.rows and alignment.tokens can be set")
        values[key.removeprefix("alignment.")] = method
    return settings.check(values, config.AlignmentConfig, "alignment")
