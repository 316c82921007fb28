"""Code benchmarks by export: completions of HumanEval's and MultiPL-E's problems, in the formats of their evaluators.

Problems are the published files: HumanEval's JSON lines (task_id, prompt, entry_point, test), MultiPL-E's (name,
language, prompt, tests, stop_tokens). HumanEval's completions become one file of {task_id, completion}, as its
`evaluate_functional_correctness` reads it; MultiPL-E's one NAME.json.gz a problem, as its evaluation container does.

Generated code is a program by nobody. It is run only where that is asked for, HumanEval's alone (MultiPL-E needs the
languages' own tools), each program in a process of its own, in an empty folder, without this process' environment, with
bounds on time, memory and what it writes. That is no sandbox: it keeps accidents small. The network and the files that
the user may read stay within its reach; a container without a network is the place for programs that are not trusted.
"""

import contextlib
import gzip
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusejax import outputs
from fusejax.errors import UserError
from fusejax.progress import progress, say, warn

_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # what ends a function's body; HumanEval's, as in the harness
_SECONDS = 10  # of a program, by the clock and of the processor
_MEMORY = 2 << 30
_WRITTEN = 1 << 20
_TOGETHER = 8  # prompts that are continued together


@dataclass(frozen=True)
class Options:
    """problems: the published file. output: the folder for completions. run: also run HumanEval's programs."""

    problems: str
    output: str
    run: bool = False
    limit: int | None = None
    max_tokens: int = 512
    dtype: str = "float32"


def run(model: str, label: str, options: Options) -> float | None:
    """Write a model's completions; pass@1 of HumanEval where its programs are to be run, else None."""
    problems = problems_of(options)
    completions = complete(model, label, problems, options)
    folder = outputs.make_folder(Path(options.output))
    if "task_id" not in problems[0]:
        _write_multipl_e(folder / label, problems, completions, options)
        return None
    path = folder / f"{label}.humaneval.jsonl"
    lines = [{"task_id": p["task_id"], "completion": c} for p, c in zip(problems, completions, strict=True)]
    outputs.write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
    say(f"evaluate {label}: {len(lines)} completions in {path}")
    return pass_at_1(problems, completions, label) if options.run else None


def problems_of(options: Options) -> list[dict[str, Any]]:
    """The problems that are asked for; UserError as `read`, and where they are not those that can be run here."""
    problems = read(options.problems)[: options.limit]
    if options.run and "task_id" not in problems[0]:
        raise UserError("--run-code: runs HumanEval's programs only; give MultiPL-E's completions to its own evaluator")
    return problems


def read(path: str) -> list[dict[str, Any]]:
    """The problems of a file of either kind; UserError naming the line and the field that it lacks."""
    opener = gzip.open if path.endswith(".gz") else open
    problems = []
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    problems.append(_problem(line, f"{path}:{number}"))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not problems:
        raise UserError(f"{path}: no problems")
    return problems


def _problem(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        raise UserError(f"{where}: not valid JSON") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: should be an object {{...}}, a problem of HumanEval or of MultiPL-E")
    fields = ("prompt", "test", "entry_point") if "task_id" in record else ("name", "language", "prompt", "tests")
    for field in fields:
        if not isinstance(record.get(field), str):
            raise UserError(f"{where}: no text {field!r}; a problem of HumanEval or of MultiPL-E has one")
    return record


def complete(model: str, label: str, problems: Sequence[dict[str, Any]], options: Options) -> list[str]:
    """The most probable continuation of each prompt, up to a string that ends the function."""
    from fusejax.models.generate import Generator

    generator = Generator.load(model, dtype=options.dtype, compute_dtype=options.dtype)
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, problem in enumerate(problems):
        groups.setdefault(tuple(problem.get("stop_tokens") or _STOP), []).append(i)
    found = [""] * len(problems)
    with progress(f"code {label}", len(problems)) as bar:
        for stop, members in groups.items():
            for at in range(0, len(members), _TOGETHER):
                together = members[at : at + _TOGETHER]
                prompts = [problems[i]["prompt"] for i in together]
                for i, text in zip(together, generator(prompts, options.max_tokens, stop=stop), strict=True):
                    found[i] = text
                bar.advance(len(together))
    return found


def _write_multipl_e(
    folder: Path, problems: Sequence[dict[str, Any]], completions: Sequence[str], options: Options
) -> None:
    outputs.make_folder(folder)
    for problem, completion in zip(problems, completions, strict=True):
        values = {key: problem[key] for key in ("name", "language", "prompt", "tests")}
        values |= {"stop_tokens": list(problem.get("stop_tokens") or _STOP), "completions": [completion]}
        values |= {"temperature": 0.0, "top_p": 1.0, "max_tokens": options.max_tokens}
        data = gzip.compress(json.dumps(values).encode(), mtime=0)
        outputs.write_atomically(folder / f"{problem['name'].replace('/', '_')}.json.gz", data)
    say(f"evaluate: {len(problems)} problems' completions in {folder}")


def pass_at_1(problems: Sequence[dict[str, Any]], completions: Sequence[str], label: str) -> float:
    """The share of the problems whose program passes its tests; runs every one."""
    warn("running generated programs: bounded in time, memory and files, but not cut off from network or disk")
    passed = []
    with progress(f"run code {label}", len(problems)) as bar:
        for problem, completion in zip(problems, completions, strict=True):
            test = f"{problem['test']}\ncheck({problem['entry_point']})\n"
            passed.append(passes(problem["prompt"] + completion + "\n" + test))
            bar.advance(1, f"{sum(passed)} passed")
    return statistics.fmean(passed)


def passes(program: str) -> bool:
    """Whether a Python program runs to its end in time; one that leaves early by itself does not."""
    mark = secrets.token_hex(16)  # shows that the last line was reached
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "program.py", Path(folder) / "out"
        path.write_text(f"{program}\nimport sys as _sys\n_sys.__stdout__.write('\\n{mark}')\n", "utf-8", "replace")
        with out.open("wb") as shown:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", _launcher(), str(path)],
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder},
                stdin=subprocess.DEVNULL,
                stdout=shown,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                status = process.wait(_SECONDS)
            except subprocess.TimeoutExpired:
                status = -1
            finally:
                _end(process)
        return status == 0 and out.read_bytes().endswith(mark.encode())


def _launcher() -> str:
    """A program that limits its own process and becomes the one named.

    A fork of this process, with JAX's threads in it, could not do that safely.
    """
    limits = {"CPU": _SECONDS, "AS": _MEMORY, "FSIZE": _WRITTEN, "CORE": 0}
    set_each = "; ".join(
        f"resource.setrlimit(resource.RLIMIT_{what}, ({most}, {most}))" for what, most in limits.items()
    )
    return f"import os, resource, sys; {set_each}; os.execv(sys.executable, [sys.executable, '-I', sys.argv[1]])"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the program and what it started in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
