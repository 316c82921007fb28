"""`fusejax inspect alignment`."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from tokenizer_zoo import TEXTS, hf, tokenizer

from fusejax import cli, config
from fusejax.alignment import row_map, token_table
from fusejax.alignment.inspection import lines
from fusejax.alignment.quality import KINDS
from fusejax.alignment.tokens import table_columns
from fusejax.corpus import prepare
from fusejax.source_cache import topk_record
from fusejax.store import Store, StoreWriter

TEXT = TEXTS[0] + "\n[bold]for i in range(1000)[/bold] 😀"
NAMES = ("sentencepiece", "byte-level coarse")


@pytest.fixture
def folders(tmp_path):
    for name in NAMES:
        hf(name).save_pretrained(tmp_path / name.split()[0])
    return {"target": str(tmp_path / "sentencepiece"), "source": str(tmp_path / "byte-level")}


@pytest.fixture
def job(folders, tmp_path):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, TEXT]))
    made = config.validate({
        "target": folders["target"], "sources": [{"model": folders["source"], "name": "other"}],
        "corpus": {"path": str(tmp_path / "x.jsonl")}, "max_length": 512, "output": str(tmp_path / "job"),
    })  # fmt: skip
    prepare(made)
    (tmp_path / "job.yaml").write_text(config.dump(made))
    return tmp_path / "job.yaml", made


def test_every_row_is_shown_as_it_is_mapped():
    target, source = map(tokenizer, NAMES)
    table = token_table(target, source, "prefix", table_columns(source, "inside"))
    found, rows_T2 = lines(TEXT, target, source, table, "inside"), row_map(TEXT, target, source)
    assert [line.row for line in found] == rows_T2[:, 0].tolist()
    assert [line.consumed for line in found] == rows_T2[:, 1].tolist()
    assert [line.follows for line in found[:-1]] == [line.token for line in found[1:]]
    assert {line.kind for line in found} >= {"same token", "inside a token"}
    assert " ".join(line.source_tokens for line in found).split() == [source.shown(i) for i in source.encode(TEXT)[0]]
    for line in found:
        assert (line.kind == KINDS[-1]) == (line.row < 0)
        for _, image, p in line.images:
            assert image
            assert p is None


def test_most_likely_tokens_go_on_as_the_text_does():
    target, source = map(tokenizer, NAMES)
    ids = source.encode(TEXT)[0]
    rng = np.random.default_rng(1)
    top = np.stack(
        [np.append(np.append(ids[1:], ids[0])[t], rng.choice(source.vocab_size, 9)) for t in range(len(ids))]
    )
    logprobs = np.log(np.array([0.5, *[0.05] * 9])) * np.ones((len(ids), 1))
    table = token_table(target, source, "prefix", table_columns(source, "inside"))
    found = lines(TEXT, target, source, table, "inside", {"ids": top, "logprobs": logprobs, "ce": np.ones(len(ids))})
    inside = [line for line in found[:-1] if line.consumed]
    assert inside
    for line in inside:
        assert line.images[0][2] == pytest.approx(0.5)
        # All go on with the bytes that are consumed already, as the true token does.
        assert len({token.replace("␣", " ").encode()[: line.consumed] for token, _, _ in line.images}) == 1


def test_a_text_in_two_folders(folders, capsys):
    cli.main(["inspect", "alignment", "--text", TEXT, "--target", folders["target"], "--source", folders["source"]])
    shown = capsys.readouterr().out
    assert "rows aligned" in shown
    assert "[" in shown  # markup in a text is text
    assert "\x1b" not in shown  # colours are for terminals
    assert "inside a" in shown


def test_a_text_by_another_method(folders, capsys):
    pair = ["--target", folders["target"], "--source", folders["source"]]
    shown = {}
    for rows in ("inside", "boundary"):
        for tokens in ("prefix", "exact", "stats"):
            overrides = [f"alignment.rows={rows}", f"alignment.tokens={tokens}"]
            cli.main(["inspect", "alignment", overrides[0], "--text", TEXT, *pair, overrides[1]])
            shown[rows, tokens] = capsys.readouterr().out
    assert "inside a" in shown["inside", "prefix"]
    assert "inside a" not in shown["boundary", "prefix"]
    assert len(set(shown.values())) >= 4


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_without_the_characters(folders, encoding):
    command = [sys.executable, "-m", "fusejax", "inspect", "alignment", "--text", TEXT]
    done = subprocess.run(
        [*command, "--target", folders["target"], "--source", folders["source"]],
        capture_output=True, timeout=120, env=os.environ | {"PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"rows aligned" in done.stdout
    assert b"| ?cat" in done.stdout


def test_the_source_is_the_first_that_is_not_the_target(job, capsys):
    path, made = job
    sources = f"sources=[{{model: {made.target.model}, name: itself}}, {made.sources[0].model}]"
    command = ["inspect", "alignment", str(path), sources, "--document", "3"]
    cli.main(command)
    assert "inside a" in capsys.readouterr().out
    cli.main([*command, "--source", "itself"])
    assert "inside a" not in capsys.readouterr().out


def test_overrides_after_options(job, capsys):
    path = str(job[0])
    cli.main(["inspect", "alignment", path, "alignment.rows=mined", "--document", "3", "--source", "other"])
    before = capsys.readouterr().out
    cli.main(["inspect", "alignment", path, "--document", "3", "--source", "other", "alignment.rows=mined"])
    assert capsys.readouterr().out == before
    cli.main(["inspect", "alignment", "--document", "3", path, "--source", "other", "alignment.rows=mined"])
    assert capsys.readouterr().out == before


def test_a_document_of_a_job(job, capsys):
    path, made = job
    documents = Store(made.folder / "data/train/documents")
    cli.main(["inspect", "alignment", str(path), "--document", documents[3]["id"]])
    by_id = capsys.readouterr().out
    cli.main(["inspect", "alignment", str(path), "--document", "3", "--source", "other"])
    assert capsys.readouterr().out == by_id
    assert "document 3" in by_id
    source = tokenizer(NAMES[1])
    tokens = Store(made.folder / "data/train/tokens" / source.fingerprint)
    writer = StoreWriter(made.folder / "sources/other", {"made": "up"}, len(tokens))
    records = []
    for record in tokens:
        n = len(record["ids"])
        top = np.stack([np.append(record["ids"][1:], 0), np.full(n, 5)], 1)
        records.append(topk_record(top, np.full((n, 2), np.log(0.37)), np.ones(n), source.vocab_size, "float16"))
    for shard, span in writer.missing():
        writer.write(shard, [records[i] for i in span])
    writer.finish({})
    cli.main(["inspect", "alignment", str(path), "--document", "3"])
    assert "0.37" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["alignment"], "needs a CONFIG.yaml"),
        (["alignment", "--text", "x", "--target", "y"], "needs --target MODEL and --source MODEL"),
        (["alignment", "{job}", "--document", "none"], "no such document"),
        (["alignment", "{job}", "--document", "4"], "a number below 4"),
        (["alignment", "{job}", "--source", "none"], "no such source; there is other"),
        (["some/store", "{job}"], "takes one store"),
        (["alignment", "{job}", "--target", "x", "--verify"], "has no use for --verify, --target"),
        (["alignment", "--text", "x", "--target", "y", "--source", "z", "--document", "3"], "no use for --document"),
        (["alignment", "--text", "x", "--target", "y", "--source", "z", "{job}"], "and no configuration"),
        (["alignment", "--text", "x", "--target", "y", "--source", "z", "seed=1"], "only alignment.rows and"),
        (["alignment", "--text", "x", "--target", "y", "--source", "z", "alignment.rows=x"], "alignment: rows: Input"),
        (["alignment", "--text", "a\udcff", "--target", "y", "--source", "z"], "error: --text: is not text in UTF-8"),
        (["some/store", "--document", "3"], "has no use for --document"),
        (["some/store", "--verify", "--row", "0"], "has no use for --row"),
    ],
)
def test_mistakes(job, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", *(argument.format(job=job[0]) for argument in arguments)])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
