"""The harness's model `fusejax` against its model `hf`, on the same weights and on tasks of the usual shapes.

Runs where lm_eval, torch and accelerate (for `hf`) are installed: pip install 'fusejax[lm-eval]' torch accelerate.
"""

import json

import pytest
import yaml

pytest.importorskip("lm_eval")
pytest.importorskip("torch")
pytest.importorskip("accelerate")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from fusejax import cli
from fusejax.errors import UserError
from fusejax.evaluation.harness import FuseJaxLM

SMALL = {"dataset_path": "json", "test_split": "test"}
CHOICES = {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
GENERATE = {"until": ["\n\n", "Q:"], "max_gen_toks": 12, "do_sample": False}
EXACT = [{"metric": "exact_match"}]

# Tasks in the schemas of the data sets that they are named after; the texts are ours.
TASKS = {
    "arc": ({
        "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "{{choices.text}}",
        "doc_to_target": "{{choices.label.index(answerKey)}}", **CHOICES,
    }, [
        {"question": "Where did the cat sit?", "choices": {"text": ["mat", "moon", "sea"], "label": ["A", "B", "C"]},
         "answerKey": "A"},
        {"question": "What barks?", "choices": {"text": ["a log", "the dog"], "label": ["A", "B"]}, "answerKey": "B"},
    ]),
    "hellaswag": ({
        "doc_to_text": "{{ctx}}", "doc_to_choice": "{{endings}}", "doc_to_target": "{{label}}", **CHOICES,
    }, [
        {"ctx": "A dog runs to the log. It", "endings": ["sits on it.", "reads print.", "returns a + b."], "label": 0},
        {"ctx": "She opens the door and", "endings": ["imports os.", "goes in."], "label": 1},
    ]),
    "boolq": ({
        "doc_to_text": "{{passage}}\nQuestion: {{question}}?\nAnswer:", "doc_to_choice": ["no", "yes"],
        "doc_to_target": "label", **CHOICES,
    }, [
        {"passage": "The cat sat on the mat.", "question": "was there a cat", "label": 1},
        {"passage": "The hills are far.", "question": "are the hills near", "label": 0},
    ]),
    "lambada": ({
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}", "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "output_type": "loglikelihood", "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }, [{"text": "The cat sat on the mat, and the dog sat on the log"}, {"text": "over the hills and far away"}]),
    "bbh": ({
        "doc_to_text": "Q: {{input}}\nA: Let us think step by step.", "doc_to_target": "{{target}}",
        "output_type": "generate_until", "generation_kwargs": GENERATE, "metric_list": EXACT,
    }, [{"input": "not ( True ) and True is", "target": "False"}, {"input": "not not True is", "target": "True"}]),
    "gsm8k": ({
        "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_target": "{{answer.split('####')[-1]}}",
        "output_type": "generate_until", "generation_kwargs": GENERATE, "metric_list": EXACT,
    }, [
        {"question": "A cat has 2 mats and finds 3. How many?", "answer": "2 + 3 = 5\n#### 5"},
        {"question": "Of 4 logs a dog takes 1. How many stay?", "answer": "4 - 1 = 3\n#### 3"},
    ]),
}  # fmt: skip


@pytest.fixture(scope="module", params=["coarse", "fine"])
def pair(request, tiny_models):
    folder = tiny_models[request.param]
    ours = FuseJaxLM(path=folder, batch_size=2, batch_tokens=128)
    return ours, HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=2)


def instances(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def test_loglikelihood(pair):
    long = "The cat sat on the mat. " * 20
    arguments = [
        ("The cat sat on", " the mat"), ("", "The dog"), ("A space ", "ends"), (long, " and the dog"),
    ]  # fmt: skip
    ours, theirs = (lm.loglikelihood(instances("loglikelihood", arguments)) for lm in pair)
    for (a, a_greedy), (b, b_greedy) in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=1e-3, rel=1e-4)
        assert a_greedy == b_greedy


def test_a_greedy_continuation_is_known(pair):
    """Of some prompts the continuation is not text that the tokenizer would write so; of others it has to be."""
    text = "The cat sat on the mat, and the dog ran over the log: def sit(self, mat): return mat"
    prompts = [text[:n] for n in range(3, len(text), 2)]
    arguments = [(prompt, {"until": [], "max_gen_toks": 1}) for prompt in prompts]
    continued = pair[0].generate_until(instances("generate_until", arguments))
    written = [
        (prompt, more)
        for prompt, more in zip(prompts, continued, strict=True)
        if more and pair[0].tok_encode(prompt + more)[:-1] == pair[0].tok_encode(prompt)
    ]
    ours, theirs = ([greedy for _, greedy in lm.loglikelihood(instances("loglikelihood", written))] for lm in pair)
    assert ours == theirs
    assert any(ours)


def test_loglikelihood_rolling(pair):
    # Not periodic: `hf` takes windows that read the same tokens for one, though they count different ones.
    texts = [("The cat sat.",), (" ".join(f"Ünïcödé {i} and 😀." for i in range(10)),)]
    ours, theirs = (lm.loglikelihood_rolling(instances("loglikelihood_rolling", texts)) for lm in pair)
    assert ours == pytest.approx(theirs, abs=1e-3, rel=1e-4)


def test_generate_until(pair):
    options = {"until": ["e", "\n"], "max_gen_toks": 10, "do_sample": False}
    free = {"until": [], "max_gen_toks": 7, "do_sample": False}
    prompts = [("The cat", options), ("def add(a, b):\n    return", free), ("A", options), ("Over " * 60, free)]
    ours, theirs = (lm.generate_until(instances("generate_until", prompts)) for lm in pair)
    assert ours == theirs
    assert any(ours)


def test_tasks_of_the_usual_shapes(pair, tmp_path):
    for name, (task, records) in TASKS.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        values = {"task": f"local_{name}", **SMALL, "dataset_kwargs": {"data_files": {"test": str(data)}}, **task}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    names = [f"local_{name}" for name in TASKS]
    found = [
        lm_eval.simple_evaluate(model=lm, tasks=names, task_manager=manager, bootstrap_iters=0, num_fewshot=0)
        for lm in pair
    ]
    ours, theirs = (result["results"] for result in found)
    assert sorted(ours) == sorted(names)
    for name in names:
        for metric, value in theirs[name].items():
            if isinstance(value, float):
                assert ours[name][metric] == pytest.approx(value, rel=1e-3), (name, metric)
        for a, b in zip(*(result["samples"][name] for result in found), strict=True):
            if "generate" in str(TASKS[name.removeprefix("local_")][0]["output_type"]):
                assert a["resps"] == b["resps"]


def test_mistakes_are_named(tiny_models, capsys):
    with pytest.raises(UserError, match="unknown parallelize; known: path"):
        FuseJaxLM(path=tiny_models["coarse"], parallelize=True)
    with pytest.raises(SystemExit):
        cli.main(["lm-eval", "--help"])
    assert "usage" in capsys.readouterr().out
