"""The `fusejax` command: each stage of the job by itself, and what looks into its results."""

import argparse
import errno
import importlib.util
import io
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fusejax import __version__, bench, config, evaluate_options, inspect_options, plan_command
from fusejax.errors import Resumable, UserError
from fusejax.options import refuse

# What the stages do, in the order in which `train.py` runs them.
STAGES = {
    "prepare": "read the corpus, split long documents, tokenize for every model",
    "sources": "run every source over the documents and store its top-k distributions",
    "align": "map every source's rows and tokens to the target's",
    "train": "train the target on the fused distributions, and on CLM alone for comparison",
    "export": "write the trained model as a Hugging Face folder",
    "baselines": "make what fusion is compared with: the models that evaluation.baselines names",
    "evaluate": "bits per byte of every model on held-out documents",
    "report": "write report.json and report.html",
}


ALONE = ("prepare", "evaluate", "report")  # in a job of several processes, the first one does these


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `fusejax`."""
    run(_command, arguments)


def run(command: Callable[[Sequence[str] | None], None], arguments: Sequence[str] | None = None) -> None:
    """Run a command; a user's mistake ends with one line on standard error and exit status 2."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a character shows a question mark
            stream.reconfigure(errors="replace")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _interrupted)
    try:
        command(arguments)
    except UserError as error:
        _end(f"error: {error}", 2)
    except Resumable as error:
        _end(f"stopped: {error}", error.STATUS)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        kinds = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
        if error.errno not in kinds:
            raise
        _end(f"error: {error.filename or 'output'}: {error.strerror}", 2)
    except Exception as error:
        processes = sys.modules.get("fusejax.distributed")
        if processes is None or not processes.several():
            raise
        found = processes.find_lost(error)
        if found is None:
            traceback.print_exc()
        _end(f"error: {found or error}", Resumable.STATUS if found else 1)


def _end(line: str, status: int) -> NoReturn:
    """Say why and leave; one of several processes does not wait for the others, which would wait for it."""
    print(line, file=sys.stderr)
    processes = sys.modules.get("fusejax.distributed")
    if processes is not None and processes.several():
        processes.leave(status)
    sys.exit(status)


def _interrupted(*_: object) -> None:
    """Ctrl-C: leave at once. What is on disk is whole at any moment; unwinding compiled code is not safe."""
    cursor = "\x1b[?25h" if sys.stdout.isatty() else ""
    os.write(2, f"{cursor}\ninterrupted; the same command goes on from here\n".encode())
    os._exit(130)


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints in the form of all others, and with overrides before, between and after options."""

    _intermixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._intermixing or not any(action.dest == "overrides" for action in self._actions):
            return super().parse_known_args(args, namespace)
        self._intermixing = True  # argparse's own way comes back here for each of its two passes
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixing = False

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message} (see {self.prog} --help)")


def add_config(parser: argparse.ArgumentParser, example: str = "configs/quickstart.yaml") -> None:
    """The two arguments that every job takes."""
    parser.add_argument("config", metavar="CONFIG.yaml", help=f"the configuration, for example {example}")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="override a key, for example batch.sequences=16"
    )


def add_report(parser: argparse.ArgumentParser) -> None:
    """`report` takes a job's configuration, or output folders of finished jobs."""
    parser.add_argument("config", metavar="CONFIG.yaml|RUN", help="a job's configuration; or a finished job's folder")
    parser.add_argument(
        "overrides", metavar="key=value|RUN", nargs="*", default=[], help="override a key; or more folders"
    )
    runs = parser.add_argument_group("a table over finished jobs", "jobs that differ in their seed alone share a row")
    runs.add_argument("--csv", metavar="FILE", help="write it as CSV")
    runs.add_argument("--markdown", metavar="FILE", help="write it as Markdown")
    runs.add_argument("--html", metavar="FILE", help="write it as a page with plots")


_TABLES = ("csv", "markdown", "html")  # what belongs to `report` of finished jobs alone


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = Parser(prog="fusejax", description="Knowledge fusion of causal language models, in JAX.")
    parser.add_argument("--version", action="version", version=f"fusejax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, help_text in STAGES.items():
        command = commands.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
        {"evaluate": evaluate_options.add, "report": add_report}.get(name, add_config)(command)
    add_config(plan_command.add_parser(commands))
    help_text = "merge the weights of models of one architecture into one (linear, SLERP, TIES, DARE, SCE, ...)"
    merge = commands.add_parser("merge", help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
    add_config(merge, "configs/merge-ties.yaml")
    help_text = "take over next-token distributions that the FuseLLM code saved, as a source's cache"
    imports = commands.add_parser("import", help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
    imports.add_argument("dataset", metavar="DATASET", help="a folder that datasets' save_to_disk wrote")
    add_config(imports)
    imports.add_argument("--source", required=True, metavar="NAME", help="the source of the configuration it is from")
    inspect_options.add(commands)
    help_text = "measure what a part costs on this machine"
    benches = commands.add_parser("bench", help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
    bench.add_parser(benches, arguments)
    _add_generate(commands)
    commands.add_parser("lm-eval", add_help=False, help="lm-evaluation-harness, with the model `fusejax` in it")
    return parser


def _add_generate(commands: "argparse._SubParsersAction[Parser]") -> None:
    help_text = "continue a text with a model, and show it as it comes"
    parser = commands.add_parser("generate", help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
    parser.add_argument("model", metavar="MODEL", help="a model folder or a hub name")
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads standard input")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="most tokens to add (default 128)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default): always the most probable token"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K most probable tokens only")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the most probable tokens that together reach P"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="equal seeds draw equal tokens (default 0)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    parser.add_argument("--revision", metavar="REV", help="revision of a hub name")
    parser.add_argument(
        "--attention", choices=("auto", "xla", "cudnn", "splash"), default="auto", help="implementation for the prompt"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of weights and computation (default: float32 on CPUs)"
    )


def _command(arguments: Sequence[str] | None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments[:1]) == ["lm-eval"]:  # what follows is the harness's to read
        if {"-h", "--help"} & set(arguments) and importlib.util.find_spec("lm_eval") is None:
            print("usage: fusejax lm-eval --model fusejax --model_args path=FOLDER --tasks TASK[,TASK]\n")
            print("The command line of lm-evaluation-harness, which is not installed: pip install 'fusejax[lm-eval]'")
            return
        from fusejax.evaluation import harness

        harness.main(arguments[1:])
        return
    options = _parser(arguments).parse_args(arguments)
    if options.command == "bench":
        bench.run(options)
        return
    if options.command == "inspect":
        inspect_options.run(options)
        return
    if options.command == "generate":
        from fusejax.models import generate

        generate.show(options)
        return
    if options.command == "evaluate" and evaluate_options.without_job(options):
        return
    if options.command == "report" and not options.config.endswith((".yaml", ".yml")):
        from fusejax import comparison

        comparison.run([options.config, *options.overrides], options.csv, options.markdown, options.html)
        return
    if options.command == "report":
        refuse(options, "CONFIG.yaml", *_TABLES)
    if options.command == "merge":
        from fusejax import merging

        merging.merge(merging.load(options.config, options.overrides))
        return
    job = config.load(options.config, options.overrides)
    if options.command == "plan":
        plan_command.run(options, job)
        return
    from fusejax import distributed

    distributed.start(job)
    if options.command in ("sources", "train", "baselines"):
        from fusejax import preflight

        preflight.check_devices(job, training=options.command != "sources")
    with distributed.locked(job.folder):
        if options.command == "import":
            from fusejax import importing

            importing.run(options.dataset, job, options.source)
            return
        chosen = stage(options.command)
        if options.command in ALONE:
            distributed.alone(options.command, lambda: chosen(job))
        else:
            chosen(job)


def stage(name: str) -> Callable[[config.Config], None]:
    """The function that runs a stage. Imported when needed, so that `--help` stays instant."""
    if name == "prepare":
        from fusejax.corpus import prepare as chosen
    elif name == "sources":
        from fusejax.sources import run as chosen
    elif name == "align":
        from fusejax.alignment import run as chosen
    elif name == "train":
        from fusejax.training import run as chosen
    elif name == "export":
        from fusejax.training import export as chosen
    elif name == "baselines":
        from fusejax.evaluation.baselines import run as chosen
    elif name == "evaluate":
        from fusejax.evaluation import run as chosen
    else:
        from fusejax.report import run as chosen
    return chosen
