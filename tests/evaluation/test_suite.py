"""`fusejax evaluate MODEL --suite fusellm`: what is run, what is not and why, and the published numbers beside it."""

import importlib.util
import json
import statistics

import pytest

from fusejax import cli
from fusejax.errors import UserError
from fusejax.evaluation import suite, suites

# Records in the schemas of the data sets; the texts are ours.
RECORDS = {
    "arc_easy": [
        {"question": "Where did the cat sit?", "choices": {"text": ["mat", "moon"], "label": ["A", "B"]},
         "answerKey": "A"},
        {"question": "What barks?", "choices": {"text": ["a log", "the dog"], "label": ["1", "2"]}, "answerKey": "2"},
    ],
    "boolq": [
        {"passage": "The cat sat on the mat.", "question": "was there a cat", "label": 1},
        {"passage": "The hills are far.", "question": "are the hills near", "label": 0},
    ],
    "hellaswag": [
        {"ind": 1, "activity_label": "Dogs", "ctx_a": "A dog runs to the log.", "ctx_b": "it", "label": "0",
         "ctx": "A dog runs to the log. it", "endings": ["sits on it.", "reads print.", "is a cat.", "adds a + b."]},
    ],
    "lambada_openai": [{"text": "The cat sat on the mat, and the dog sat on the log"}],
}  # fmt: skip


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(suite.reading, "is_cached", lambda name: False)


def test_published_averages_are_those_of_the_paper():
    """The averages that the paper's text gives follow from the numbers of its tasks."""
    by_name = {b.name: b for b in suites.FUSELLM}
    means = [statistics.fmean(by_name[n].published[i] for n in suites.COMMON_SENSE) for i in range(3)]
    assert f"{means[0]:.2f} {means[2]:.2f}" == "63.76 64.56"
    before, clm, fused = by_name["BBH"].published
    assert f"{100 * (fused / before - 1):.2f}" == "5.16"  # the relative gain of its section 4.2
    assert f"{100 * (clm / before - 1):.2f}" == "1.86"
    assert len(by_name["BBH"].members) == 27


def test_what_is_missing_is_one_line_each(tiny_models, offline, tmp_path, capsys):
    out = tmp_path / "numbers.json"
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", tiny_models["coarse"], "--suite", "fusellm", "--json", str(out)])
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.err == ("error: evaluate: no benchmark of fusellm could be run; give what the lines `not run` say\n")
    assert not out.exists()
    lines = shown.out.splitlines()
    missing = [line for line in lines if line.startswith("not run: ")]
    assert [line.split(":")[1].strip() for line in missing[:-1]] == [b.name for b in suites.FUSELLM]
    assert "--code PROBLEMS.jsonl" in missing[-1]
    if importlib.util.find_spec("lm_eval"):
        assert "the data set SaylorTwift/bbh" in missing[0]
        assert "bbh_cot_fewshot_boolean_expressions.jsonl and 26 more in --data" in missing[0]
    else:
        assert "pip install 'fusejax[lm-eval]'" in missing[0]
    text = " ".join(lines)
    for number in ("41.75", "64.56", "15.56", "github.com/fanqiwan/FuseLLM"):
        assert number in text


def test_local_data_is_measured_by_the_harness_definitions(tiny_models, offline, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite.console, "_width", 200)
    pytest.importorskip("lm_eval")
    for name, records in RECORDS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    out = tmp_path / "numbers.json"
    cli.main([
        "evaluate", tiny_models["coarse"], tiny_models["fine"], "--suite", "fusellm", "--data", str(tmp_path),
        "--json", str(out),
    ])  # fmt: skip
    found = json.loads(out.read_text())
    assert sorted(found["results"]) == ["coarse", "fine"]
    for values in found["results"].values():
        assert sorted(values) == ["ARC-easy", "BoolQ", "HellaSwag", "LAMBADA"]
        assert all(0 <= value <= 100 for value in values.values())
    assert sorted(found["not_run"]) == ["ARC-challenge", "BBH", "DROP", "OpenBookQA", "TriviaQA"]
    assert "common sense" in capsys.readouterr().out


def test_numbers_are_the_harness_own(tiny_models, offline, tmp_path):
    """The same task, asked of the harness with the same model, gives the same number."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from fusejax.evaluation.harness import FuseJaxLM

    records = tmp_path / "boolq.jsonl"
    texts = [("The cat sat.", f"did the cat sit {'on the mat ' * i}") for i in range(8)]
    lines = [{"passage": p, "question": q, "label": i % 2} for i, (p, q) in enumerate(texts)]
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "numbers.json"
    arguments = ["--data", str(tmp_path), "--benchmarks", "BoolQ", "--json", str(out)]
    cli.main(["evaluate", tiny_models["fine"], "--suite", "fusellm", *arguments])
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {records}}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{passage}}\n\n  Question: {{question}}?\n\n  Answer:'\n"
        "doc_to_target: label\ndoc_to_choice: ['no', 'yes']\nmetric_list: [{metric: acc}]\n"
    )
    wanted = lm_eval.simple_evaluate(
        model=FuseJaxLM(path=tiny_models["fine"]), tasks=["mine"], num_fewshot=0, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
    )  # fmt: skip
    assert json.loads(out.read_text())["results"]["fine"]["BoolQ"] == 100 * wanted["results"]["mine"]["acc,none"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--suite", "fusellm", "--corpus", "x"], "either --corpus or --suite"),
    (["--suite", "fusellm", "--stride", "3"], "evaluate --suite: has no use for --stride"),
    (["--suite", "fusellm", "--run-code"], "--suite without --code: has no use for --run-code"),
    (["--suite", "fusellm", "--data", "nowhere"], "--data: nowhere is no folder"),
    (["--suite", "fusellm", "--benchmarks", "ARC"], "--benchmarks: 'ARC' should be one of BBH, ARC-easy"),
    (["--suite", "fusellm", "--limit", "0"], "--limit: 0 should be at least 1"),
    (["--corpus", "x", "--benchmarks", "BBH"], "evaluate --corpus: has no use for --benchmarks"),
    (["--benchmarks", "BBH"], "evaluate without --suite: has no use for --benchmarks"),
])  # fmt: skip
def test_mistakes_end_with_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["evaluate", "model", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_model_named_twice_is_refused():
    with pytest.raises(UserError, match="named twice"):
        suite.run(["a", "a"], "fusellm")
