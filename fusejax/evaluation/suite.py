"""`fusejax evaluate MODEL ... --suite fusellm`: the paper's benchmarks, ours beside the published numbers.

Runs what can be run here: lm-evaluation-harness has to be installed, and a benchmark's data has to be in the Hugging
Face cache, on a hub that can be reached, or in a folder of JSON lines. The others say in one line what they need.
"""

import importlib.util
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from fusejax import hub, outputs, preflight, reading
from fusejax.config import ModelConfig
from fusejax.errors import UserError
from fusejax.evaluation import code
from fusejax.evaluation.standalone import labels_of, models_of
from fusejax.evaluation.suites import COMMON_SENSE, MULTIPL_E, PUBLISHED_MODELS, SOURCE, SUITES, Benchmark
from fusejax.progress import console, say

Results = dict[str, dict[str, float]]  # model → benchmark → percent


def run(
    models: Sequence[str],
    suite: str,
    *,
    data: str | None = None,
    include_path: str | None = None,
    limit: int | None = None,
    benchmarks: Sequence[str] | None = None,
    json_path: str | None = None,
    code_options: code.Options | None = None,
    **options: Any,
) -> None:
    """Measure every model, show the table and what could not be run, and write all numbers to `json_path`.

    data: a folder with TASK.jsonl for tasks of the harness (a group: for each of its members), records as the data set
    has them. include_path: a folder of the harness's own task files. limit: the first so many documents of a task.
    benchmarks: these only. options: of `FuseJaxLM`. Raises UserError for faults of models and folders, and after the
    table where no benchmark could be run.
    """
    chosen = _chosen(suite, benchmarks)
    given = models_of(models)
    labels = labels_of(given)
    _check(given, json_path, code_options)
    lacking = {b.name: need for b in chosen if (need := missing(b, data, include_path))}
    results: Results = {label: {} for label in labels}
    todo = [b for b in chosen if b.name not in lacking]
    for label, model in zip(labels, models, strict=True):
        if todo:
            lacking |= _measure(results[label], label, model, todo, data, include_path, limit, options)
        if code_options is not None:
            found = code.run(model, label, code_options)
            results[label] |= {} if found is None else {"HumanEval": 100 * found}
    show(chosen, results, lacking, coded=code_options is not None, limit=limit)
    if not any(results.values()) and code_options is None:
        raise UserError(f"evaluate: no benchmark of {suite} could be run; give what the lines `not run` say")
    if json_path is not None:
        outputs.write_atomically(
            json_path, json.dumps(as_json(chosen, results, lacking, limit), indent=2) + "\n", outputs.ANOTHER_PATH
        )
        say(f"evaluate: {json_path}")


def _check(models: Sequence[ModelConfig], json_path: str | None, code_options: code.Options | None) -> None:
    """UserError for what would fail later, as far as it can be seen now."""
    if json_path is not None:
        outputs.require_writable(json_path)
    if code_options is not None:
        code.problems_of(code_options)
        outputs.require_writable(Path(code_options.output) / "completions", "choose another --code-output")
    for model in models:
        preflight.check_model(model)


def _chosen(suite: str, names: Sequence[str] | None) -> list[Benchmark]:
    known = {b.name: b for b in SUITES[suite]}
    for name in names or ():
        if name not in known:
            raise UserError(f"--benchmarks: {name!r} should be one of {', '.join(known)}")
    return [b for b in known.values() if names is None or b.name in names]


def missing(benchmark: Benchmark, data: str | None, include_path: str | None) -> str:
    """What a benchmark needs that is not here, in one line; nothing: the empty string."""
    if importlib.util.find_spec("lm_eval") is None:
        return "needs lm-evaluation-harness: pip install 'fusejax[lm-eval]'"
    absent = [task for task in benchmark.tasks if not _is_given(task, data, include_path)]
    if not absent or reading.is_cached(benchmark.dataset):
        return ""
    try:
        hub.require_reachable(benchmark.dataset, "data set")
    except UserError:
        files = f"{absent[0]}.jsonl" + (f" and {len(absent) - 1} more" if len(absent) > 1 else "")
        return f"needs the data set {benchmark.dataset} (a hub that can be reached, or its cache), or {files} in --data"
    return ""


def _is_given(task: str, data: str | None, include_path: str | None) -> bool:
    if data is not None and (Path(data) / f"{task}.jsonl").is_file():
        return True
    return include_path is not None and any(
        _task_of(path) == task for path in sorted(Path(include_path).rglob("*.yaml"))
    )


def _task_of(path: Path) -> str | None:
    """The task that a file of the harness declares, read without its functions."""
    for line in path.read_text("utf-8", "replace").splitlines():
        key, _, value = line.partition(":")
        if key == "task":
            return value.strip().strip("'\"")
    return None


def _measure(
    found: dict[str, float],
    label: str,
    model: str,
    todo: Sequence[Benchmark],
    data: str | None,
    include_path: str | None,
    limit: int | None,
    options: dict[str, Any],
) -> dict[str, str]:
    """Fill `found` with a model's percentages; what failed, with its reason."""
    import lm_eval

    from fusejax.evaluation.harness import FuseJaxLM

    lm = FuseJaxLM(path=model, **options)
    failed = {}
    with _manager(todo, data, include_path) as manager:
        for benchmark in todo:
            say(f"evaluate {label}: {benchmark.name}")
            try:
                result = lm_eval.simple_evaluate(
                    model=lm, tasks=[benchmark.task], task_manager=manager, num_fewshot=benchmark.shots, limit=limit,
                    bootstrap_iters=0, log_samples=False,
                )  # fmt: skip
            except (UserError, OSError) as error:  # a context too short for it, data that cannot be fetched
                failed[benchmark.name] = f"{label}: {' '.join(str(error).split())[:300]}"
                continue
            found[benchmark.name] = 100 * float(result["results"][benchmark.task][benchmark.metric])
    return failed


@contextmanager
def _manager(todo: Sequence[Benchmark], data: str | None, include_path: str | None) -> Iterator[Any]:
    """The harness's tasks, those with a file in `data` changed to read it."""
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    with tempfile.TemporaryDirectory() as folder:
        for task in (task for benchmark in todo for task in benchmark.tasks):
            records = Path(data or "") / f"{task}.jsonl"
            if data is None or not records.is_file():
                continue
            changed = {
                "include": str(_file_of(index, task)),
                "task": task,
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": {"test": str(records.resolve())}},
                "test_split": "test",
                "validation_split": None,
                "training_split": None,
            }
            (Path(folder) / f"{task}.yaml").write_text(yaml.safe_dump(changed, sort_keys=False), "utf-8")
        yield TaskManager(include_path=[folder, *([include_path] if include_path else [])])


def _file_of(index: Any, task: str) -> Path:
    if task not in index:
        raise UserError(f"{task}: this version of lm-evaluation-harness has no such task; 0.4.13 has")
    entry = index[task]
    return Path(entry["yaml_path"] if isinstance(entry, dict) else entry.yaml_path)


def as_json(chosen: Sequence[Benchmark], results: Results, lacking: dict[str, str], limit: int | None) -> Any:
    """All of it: the suite with shots, metrics and published numbers, ours, and what was not run."""
    return {
        "suite": [
            {"name": b.name, "task": b.task, "shots": b.shots, "metric": b.metric, "same_prompts": b.comparable,
             "published": dict(zip(PUBLISHED_MODELS, b.published, strict=True))}
            for b in chosen
        ],
        "published_in": SOURCE,
        "limit": limit,
        "results": results,
        "not_run": lacking,
    }  # fmt: skip


def show(
    chosen: Sequence[Benchmark], results: Results, lacking: dict[str, str], coded: bool, limit: int | None
) -> None:
    """The table in percent, ours first, and below it what could not be run, what is not alike, and the source."""
    table = Table("benchmark", "shots", "metric", *results, *PUBLISHED_MODELS, title="percent, higher is better")
    for column in table.columns[3:]:
        column.justify = "right"

    def row(name: str, shots: str, metric: str, published: Sequence[float], mark: str = "") -> None:
        ours = [f"{values[name]:.2f}" if name in values else "" for values in results.values()]
        table.add_row(name + mark, shots, metric, *ours, *(f"{value:.2f}" for value in published))

    for b in chosen:
        row(b.name, str(b.shots), b.shown_metric, b.published, "" if b.comparable else " *")
    parts = [b for b in chosen if b.name in COMMON_SENSE]
    if len(parts) == len(COMMON_SENSE):
        name = "common sense, average"
        means = {
            label: {name: statistics.fmean(values[n] for n in COMMON_SENSE)}
            for label, values in results.items()
            if all(n in values for n in COMMON_SENSE)
        }
        results = {label: values | means.get(label, {}) for label, values in results.items()}
        row(name, "", "", [statistics.fmean(b.published[i] for b in parts) for i in range(len(PUBLISHED_MODELS))])
    if any("HumanEval" in values for values in results.values()):
        row("HumanEval", "0", "pass@1", ())
    row("MultiPL-E", "0", "pass@1", MULTIPL_E)
    console.print(table)
    for name, need in lacking.items():
        say(f"not run: {name}: {need}")
    if not coded:
        say("not run: HumanEval, MultiPL-E: need --code PROBLEMS.jsonl, which writes completions in their format")
    if limit is not None:
        say(f"ours: the first {limit} documents of each task only")
    say("* the paper's numbers were made with another program, most with other prompts: near, not alike")
    say(f"published: {SOURCE}")
