import csv
import json
import statistics

import pytest

from fusejax import cli, comparison


def write(folder, name, seed, scores, text="t", **settings):
    folder.mkdir()
    report = {
        "name": name, "config": {"seed": seed, "output": str(folder), **settings},
        "corpus": {"heldout": {"text": text}}, "evaluation": {"bits_per_byte": scores},
        "training": {"fused": {"rows_won": {"s": 0.25}}}, "alignment": {"s": {"share": 0.75}},
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))
    lines = [{"step": i, "tokens": 10.0, "clm_loss": 3.0 - i / 10} for i in range(5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def scores(law, prose):
    return {"law": law, "prose": prose, "average": (law + prose) / 2}


@pytest.fixture
def runs(tmp_path):
    first = {"target": scores(2.0, 3.0), "fused": scores(1.0, 2.0)}
    second = {"target": scores(2.0, 3.0), "fused": scores(1.5, 1.9)}
    other = {"target": {"code": 4.0, "average": 4.0}, "fused": {"code": 4.5, "average": 4.5}}
    return [
        write(tmp_path / "a", "mine", 0, first, max_length=8),
        write(tmp_path / "b", "mine", 1, second, max_length=8),
        write(tmp_path / "c", "the <other>", 0, other, text="u", max_length=16),
    ]


def test_seeds_share_a_row_with_their_spread(runs, tmp_path, capsys):
    files = {kind: tmp_path / f"table.{kind}" for kind in ("csv", "markdown", "html")}
    arguments = ["report", *runs]
    for kind, path in files.items():
        arguments += [f"--{kind}", str(path)]
    cli.main(arguments)
    out = capsys.readouterr().out
    assert "mine (seeds" in out
    rows = list(csv.DictReader(files["csv"].open()))
    assert [(row["run"], row["model"]) for row in rows] == [
        ("mine (seeds 0, 1)", "target"), ("mine (seeds 0, 1)", "fused"),
        ("the <other>", "target"), ("the <other>", "fused"),
    ]  # fmt: skip
    fused = rows[1]
    assert float(fused["law"]) == 1.25
    assert float(fused["average"]) == pytest.approx(1.6)
    assert float(fused["standard deviation of average"]) == pytest.approx(statistics.stdev([1.5, 1.7]))
    assert fused["code"] == ""
    assert rows[2]["code"] == "4.0"
    assert rows[2]["standard deviation of average"] == ""
    text = files["markdown"].read_text()
    assert "| mine (seeds 0, 1) | fused | **1.2500** | **1.9500** |  | **1.6000 ± 0.1414** |" in text
    assert "| the <other> | target (before) |  |  | **4.0000** | **4.0000** |" in text
    note = "so compare a row with those of its own run alone: mine (seeds 0, 1); the <other>"
    assert note in " ".join(out.split())
    assert text.endswith(f"{note}\n")
    page = files["html"].read_text()
    assert "mine (seeds 0, 1); the &lt;other&gt;</p>" in page
    assert page.count("<svg") == 4
    assert "the &lt;other&gt;" in page
    assert "<other>" not in page
    assert "75.0%" in page
    again = tmp_path / "again.html"
    cli.main(["report", *runs, "--html", str(again)])
    assert again.read_text() == page


def test_runs_of_one_text_can_be_compared(runs, tmp_path, capsys):
    same = write(tmp_path / "d", "third", 0, {"target": scores(2.0, 4.0)}, max_length=32)
    cli.main(["report", runs[0], same])
    assert "different held-out texts" not in capsys.readouterr().out


def test_columns_are_in_the_order_of_the_runs(runs):
    columns, _ = comparison.table(comparison.groups([comparison.read(run) for run in (runs[2], runs[0])]))
    assert columns == ["code", "law", "prose", "average"]


@pytest.mark.parametrize(("content", "message"), [
    (None, "no report there"),
    ("{", "report.json: cannot be read (Expecting"),
    ("{}", "report.json: is damaged, it has no config; run"),
    ("[]", "is damaged, it has no config"),
    ("null", "is damaged, it has no config"),
    ({"evaluation": {"bits_per_byte": 3}}, "evaluation.bits_per_byte: Input should be an object; run"),
    ({"evaluation": {"bits_per_byte": {"a": 1}}}, "evaluation.bits_per_byte.a: Input should be an object"),
    ({"evaluation": {"bits_per_byte": {"a": {"law": 1.0}}}}, "evaluation.bits_per_byte.a: has no average"),
    ({"evaluation": {"bits_per_byte": {"a": {"average": "x"}}}}, "a.average: Input should be a valid number"),
    ({"training": {"fused": 3}}, "is damaged, training.fused: Input should be"),
    ({"alignment": {"x": {}}}, "is damaged, alignment.x.share: Field required"),
    ({"alignment": {"x": {"share": 1, "kinds": 5}}}, "is damaged, alignment.x.kinds: Input should be"),
    ({"config": {"seed": {"a": 1}}}, "is damaged, config.seed: Input should be"),
    ({"corpus": {"heldout": "x"}}, "is damaged, corpus.heldout: Input should be"),
    ({"source_wins": {"code": 5}}, "is damaged, source_wins.code: Input should be"),
    ({"name": 7}, "is damaged, name: Input should be"),
])  # fmt: skip
def test_a_folder_without_a_report_is_named(tmp_path, capsys, content, message):
    if isinstance(content, dict):
        whole = {"evaluation": {"bits_per_byte": {}}, "config": {}, "training": {}, "alignment": {}}
        content = json.dumps(whole | content)
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(tmp_path)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    with pytest.raises(SystemExit):
        cli.main(["report", __file__])
    assert "is a file; give the output folder of a finished job" in capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path / "report.json") in error


def test_files_of_a_table_are_refused_for_a_job(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", "job.yaml", "--csv", str(tmp_path / "table.csv")])
    assert ended.value.code == 2
    assert capsys.readouterr().err == ("error: report CONFIG.yaml: has no use for --csv (see fusejax report --help)\n")


def test_a_run_counts_once_and_a_second_of_its_seed_stands_alone(runs, tmp_path, capsys, monkeypatch):
    copy = write(tmp_path / "copy", "mine", 0, {"target": scores(2.0, 3.0), "fused": scores(1.0, 2.0)}, max_length=8)
    monkeypatch.chdir(tmp_path)
    cli.main(["report", "a", runs[0], "./a/", runs[1], copy, "--csv", "table.csv"])
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [row["run"] for row in rows] == ["mine (seeds 0, 1)"] * 2 + ["mine"] * 2
    assert rows[3]["standard deviation of average"] == ""


def test_two_tables_in_one_file(runs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["report", runs[0], "--csv", str(tmp_path / "x"), "--html", str(tmp_path / "x")])
    assert "x: is named for two tables" in capsys.readouterr().err


def test_numbers_are_not_cut_where_names_are_long(tmp_path, capsys):
    domains = {f"a domain of no short name {i}": 123.4567 for i in range(8)} | {"average": 123.4567}
    run = write(
        tmp_path / "x", "a run whose name is long, too", 0, {"a/model/of/some/folder": domains, "[/red]": domains}
    )
    cli.main(["report", run])
    out = capsys.readouterr().out
    assert out.count("123.4567") == 18
    assert "…" not in out
    assert "[/red]" in out
