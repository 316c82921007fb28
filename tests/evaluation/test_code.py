"""Completions of HumanEval and MultiPL-E in their formats, and running them within limits."""

import gzip
import json
import time

import pytest

from fusejax import cli, generate
from fusejax.errors import UserError
from fusejax.evaluation import code

PROBLEMS = [
    {"task_id": "HumanEval/0", "prompt": "def add(a, b):\n    return", "entry_point": "add", "canonical_solution": "",
     "test": "def check(f):\n    assert f(1, 2) == 3\n"},
    {"task_id": "HumanEval/1", "prompt": "def cat():\n", "entry_point": "cat", "canonical_solution": "",
     "test": "def check(f):\n    assert f() == 'mat'\n"},
]  # fmt: skip


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_completions_of_human_eval(tiny_models, tmp_path, capsys):
    problems = write(tmp_path / "problems.jsonl", PROBLEMS)
    options = code.Options(problems, str(tmp_path / "out"), max_tokens=6)
    assert code.run(tiny_models["coarse"], "coarse", options) is None
    lines = [json.loads(line) for line in (tmp_path / "out/coarse.humaneval.jsonl").read_text().splitlines()]
    assert [line["task_id"] for line in lines] == ["HumanEval/0", "HumanEval/1"]
    wanted = generate(tiny_models["coarse"], [p["prompt"] for p in PROBLEMS], max_tokens=6, stop=code._STOP)
    assert [line["completion"] for line in lines] == wanted


def test_completions_of_multipl_e(tiny_models, tmp_path):
    problems = [
        {"name": f"HumanEval_{i}_add", "language": "lua", "prompt": prompt, "tests": "lu.run()", "stop_tokens": stop}
        for i, (prompt, stop) in enumerate([("local function add(a)\n", ["\nend"]), ("-- cat\n", ["e"])])
    ]
    options = code.Options(write(tmp_path / "p.jsonl", problems), str(tmp_path / "out"), max_tokens=5)
    assert code.run(tiny_models["coarse"], "coarse", options) is None
    for problem in problems:
        found = json.loads(gzip.decompress((tmp_path / f"out/coarse/{problem['name']}.json.gz").read_bytes()))
        assert {key: found[key] for key in problem} == problem
        wanted = generate(tiny_models["coarse"], problem["prompt"], max_tokens=5, stop=problem["stop_tokens"])
        assert found["completions"] == [wanted]
    with pytest.raises(UserError, match="runs HumanEval's programs only"):
        code.run(tiny_models["coarse"], "coarse", code.Options(str(tmp_path / "p.jsonl"), "out", run=True))


def test_pass_at_1_runs_the_tests(capsys):
    assert code.pass_at_1(PROBLEMS, [" a + b", "    return 'mat'"], "x") == 1.0
    assert code.pass_at_1(PROBLEMS, [" a - b", "    return 'mat'"], "x") == 0.5
    assert "not cut off from network" in capsys.readouterr().err


@pytest.mark.parametrize("program", [
    "assert 1 == 2",
    "import sys; sys.exit(0)",  # leaves before its tests
    "import os; os._exit(0)",
    "x = bytearray(4 << 30)",  # more memory than there may be
    "open('file', 'wb').write(b'x' * (2 << 20))",
    "print('x' * (2 << 20))",
    "1 +",
    "import os; assert 'SECRET' in os.environ",
])  # fmt: skip
def test_programs_that_do_not_pass(program, monkeypatch):
    monkeypatch.setenv("SECRET", "s")
    assert not code.passes(program)


def test_programs_that_pass():
    assert code.passes("print('shown'); x = sum(range(10)); assert x == 45")


def test_a_program_without_an_end_is_ended(monkeypatch):
    monkeypatch.setattr(code, "_SECONDS", 1)
    started = time.monotonic()
    assert not code.passes("while True: pass")
    assert not code.passes("import time; time.sleep(60)")
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(("content", "message"), [
    ("", "no problems"),
    ("{", "problems.jsonl:1: not valid JSON"),
    (json.dumps({"task_id": "x", "prompt": "y"}), "problems.jsonl:1: no text 'test'"),
    (json.dumps({"name": "x", "prompt": "y"}), "problems.jsonl:1: no text 'language'"),
])  # fmt: skip
def test_mistakes_are_one_clear_line(tmp_path, content, message):
    path = tmp_path / "problems.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        code.read(str(path))


def test_the_command_runs_code_only_where_asked(tiny_models, tmp_path, monkeypatch, capsys):
    problems = write(tmp_path / "problems.jsonl", PROBLEMS)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(code, "complete", lambda *_: [" a + b", "    return 1"])
    ran = []
    monkeypatch.setattr(code, "passes", lambda program: ran.append(program) or len(ran) == 1)
    command = ["evaluate", tiny_models["coarse"], "--suite", "fusellm", "--benchmarks", "BoolQ", "--code", problems]
    command += ["--code-output", str(tmp_path / "out"), "--json", str(tmp_path / "numbers.json")]
    cli.main(command)
    assert not ran
    cli.main([*command, "--run-code"])
    assert ran[0].startswith("def add(a, b):\n    return a + b\n")
    assert ran[0].endswith("check(add)\n")
    assert json.loads((tmp_path / "numbers.json").read_text())["results"]["coarse"]["HumanEval"] == 50
    assert "HumanEval" in capsys.readouterr().out
