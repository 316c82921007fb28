"""scripts/alignment_table.py on made-up rows."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizer_zoo import TEXTS, hf

from fusejax.alignment import quality
from fusejax.errors import UserError
from fusejax.tokenizers import Tokenizer

SCRIPT = Path(__file__).parents[1] / "scripts/alignment_table.py"
TOP_K = 4


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("alignment_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    for name in ("sentencepiece", "byte-level"):
        hf(name).save_pretrained(tmp_path / name)
    source, rng = Tokenizer.load(str(tmp_path / "byte-level")), np.random.default_rng(0)
    ids = [source.encode(text)[0] for text in TEXTS]
    n = sum(map(len, ids))
    top_ids = np.stack([rng.choice(source.vocab_size, TOP_K, replace=False) for _ in range(n)])
    top_ids[:-1, 1] = np.concatenate(ids)[1:]
    logprobs = np.log(np.sort(rng.dirichlet(np.ones(TOP_K + 1), n)[:, :TOP_K])[:, ::-1])
    np.savez(
        tmp_path / "rows.npz", offsets=np.cumsum([0, *map(len, ids)]), ids=np.concatenate(ids),
        top_ids=top_ids, top_logprobs=logprobs, ce=-logprobs[:, 1],
    )  # fmt: skip
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return tmp_path


def test_the_table_is_what_quality_says(script, folder, capsys):
    script.main([str(folder), "--source", str(folder / "byte-level"), "--target", str(folder / "sentencepiece")])
    title, blank, *table, last_blank, common = capsys.readouterr().out.strip().splitlines()
    assert (title, blank, last_blank) == ("### byte-level to sentencepiece", "", "")
    assert {line.count("|") for line in table} == {8}  # a Markdown table and nothing in between
    assert common.startswith("Common rows: ")
    lines = [line.split(" | ") for line in table[2:]]
    assert len(lines) == 16
    target, source = (Tokenizer.load(str(folder / name)) for name in ("sentencepiece", "byte-level"))
    texts, rows = script.load(folder, source)
    for r, t, share, off, _spans, on, _common in lines:
        without = quality(rows, texts, target, source, r.strip("| "), t, gold_chain=False)
        chained = quality(rows, texts, target, source, r.strip("| "), t)
        assert share == f"{without['share']:.1%}"
        assert off == f"{without['mapped_ce']:.2f}"
        assert on == f"{chained['mapped_ce']:.2f}"


def test_rows_of_another_tokenizer_are_refused(script, folder):
    with pytest.raises(UserError, match="are not those"):
        script.load(folder, Tokenizer.load(str(folder / "sentencepiece")))
    np.savez(folder / "rows.npz", offsets=np.zeros(2, int))
    with pytest.raises(UserError, match=r"should hold texts\.jsonl .* \(KeyError\('ids "):
        script.load(folder, Tokenizer.load(str(folder / "byte-level")))
    with pytest.raises(UserError, match=r"should hold texts\.jsonl"):
        script.load(folder / "byte-level", Tokenizer.load(str(folder / "byte-level")))
