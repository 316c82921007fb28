"""The options of `fusejax evaluate`: of a job, of models on any text (--corpus), of models on benchmarks (--suite)."""

import argparse
from pathlib import Path

from fusejax import config, settings
from fusejax.errors import UserError
from fusejax.options import flag, given, refuse

# What belongs to --corpus alone, to --suite alone, and to both.
_TEXT = ("split", "text_key", "domain_key", "max_length", "stride", "ensemble", "weights")
_SUITE = ("data", "include_path", "benchmarks", "code", "code_output", "run_code")
_BOTH = ("limit", "batch_tokens", "compute", "json")
_MOST_TOKENS = 1 << 24  # of a batch: no device holds the activations of more


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments: a job's configuration, or models and --corpus or --suite."""
    parser.add_argument(
        "config", metavar="CONFIG.yaml|MODEL", help="a job's configuration; or, with --corpus or --suite, a model"
    )
    parser.add_argument("overrides", metavar="key=value|MODEL", nargs="*", default=[],
                        help="override a key; or, with --corpus or --suite, more models")  # fmt: skip
    both = parser.add_argument_group("models without a job", "Hugging Face folders or hub names")
    both.add_argument("--limit", type=int, help="at most so many documents of each domain or task")
    both.add_argument("--batch-tokens", type=int, help="tokens of one forward pass (default 8192)")
    both.add_argument("--compute", choices=("float32", "bfloat16"), help="(default float32)")
    both.add_argument("--json", metavar="FILE", help="write all numbers there")
    _add_text(parser.add_argument_group("bits per byte on any text"))
    _add_suite(parser.add_argument_group("benchmarks", "the paper's, beside what it published; docs/evaluation.md"))


def _add_text(text: "argparse._ArgumentGroup") -> None:
    text.add_argument("--corpus", metavar="PATH", help="text of any length: a file, a folder, tfds:, huggingface:")
    text.add_argument("--split", help="of a data set (default train)")
    text.add_argument("--text-key", help="the column that holds the text (default text)")
    text.add_argument("--domain-key", help="the column that names each document's domain")
    text.add_argument("--max-length", type=int, help="tokens of a window (default: the model's context)")
    text.add_argument("--stride", type=int, help="tokens by which windows advance (default: half a window)")
    text.add_argument(
        "--ensemble", choices=("probability", "log_probability"), help="what is averaged; adds the models' ensemble"
    )
    text.add_argument("--weights", type=float, nargs="+", metavar="W", help="of the ensemble (default: equal)")


def _add_suite(suite: "argparse._ArgumentGroup") -> None:
    suite.add_argument("--suite", choices=("fusellm",), help="run these benchmarks (needs lm-evaluation-harness)")
    suite.add_argument("--data", metavar="FOLDER", help="TASK.jsonl for tasks whose data set is not to be fetched")
    suite.add_argument("--include-path", metavar="FOLDER", help="the harness's own task files, instead of its own")
    suite.add_argument("--benchmarks", nargs="+", metavar="NAME", help="these of the suite only, for example BoolQ")
    suite.add_argument("--code", metavar="FILE", help="problems of HumanEval or MultiPL-E to write completions of")
    suite.add_argument("--code-output", metavar="FOLDER", help="for the completions (default: completions)")
    suite.add_argument("--run-code", action="store_true", help="run what was written for HumanEval, for pass@1")


def without_job(options: argparse.Namespace) -> bool:
    """Evaluate models on a text or on benchmarks; False where the options are those of a job."""
    if options.corpus is None and options.suite is None:
        refuse(options, "without --corpus", *_TEXT, *_BOTH)
        refuse(options, "without --suite", *_SUITE)
        if Path(options.config).is_dir():
            raise UserError(f"evaluate {options.config}: a model needs --corpus PATH or --suite NAME")
        return False
    if options.corpus is not None and options.suite is not None:
        raise UserError("evaluate: give either --corpus or --suite")
    for name in ("max_length", "stride", "batch_tokens", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"{flag(name)}: {value} should be at least 1")
    if (options.batch_tokens or 0) > _MOST_TOKENS:
        raise UserError(f"--batch-tokens: {options.batch_tokens} should be at most {_MOST_TOKENS}")
    if options.corpus is not None:
        refuse(options, "--corpus", *_SUITE)
        _on_text(options)
    else:
        refuse(options, "--suite", *_TEXT)
        _on_benchmarks(options)
    return True


def _on_text(options: argparse.Namespace) -> None:
    from fusejax.evaluation import standalone

    if options.ensemble is None:
        refuse(options, "without --ensemble", "weights")
    corpus = {"path": options.corpus, **given(options, "split", "text_key", "domain_key", "limit")}
    standalone.run(
        [options.config, *options.overrides],
        settings.check(corpus, config.CorpusConfig, "--corpus"),
        json_path=options.json,
        kind=options.ensemble,
        weights=options.weights,
        **given(options, "max_length", "stride", "batch_tokens", "compute"),
    )


def _on_benchmarks(options: argparse.Namespace) -> None:
    from fusejax.evaluation import code, suite

    if options.code is None:
        refuse(options, "--suite without --code", "code_output", "run_code")
    for name in ("data", "include_path"):
        folder = getattr(options, name)
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"{flag(name)}: {folder} is no folder")
    dtype = options.compute or "float32"
    coding = None
    if options.code is not None:
        output = options.code_output or "completions"
        coding = code.Options(options.code, output, options.run_code, options.limit, dtype=dtype)
    suite.run(
        [options.config, *options.overrides],
        options.suite,
        json_path=options.json,
        code_options=coding,
        dtype=dtype,
        **given(options, "data", "include_path", "limit", "benchmarks", "batch_tokens"),
    )
