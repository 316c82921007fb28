"""The report's section on alignment."""

import copy

import numpy as np
import pytest
from tokenizer_zoo import TEXTS, tokenizer

from fusejax import alignment_report
from fusejax.alignment import quality


@pytest.fixture(scope="module")
def report():
    source, rng = tokenizer("byte-level coarse"), np.random.default_rng(0)
    rows = []
    for text in TEXTS:
        ids = source.encode(text)[0]
        top = np.stack([rng.choice(source.vocab_size, 5, replace=False) for _ in ids])
        top[:-1, 0] = ids[1:]
        logprobs = np.log([0.6, 0.1, 0.05, 0.01, 0.01]) * np.ones((len(ids), 1))
        rows.append({"ids": top, "logprobs": logprobs, "ce": -logprobs[:, 0]})
    measured = quality(rows, TEXTS, tokenizer("sentencepiece"), source)
    unmeasured = copy.deepcopy(measured) | {"mapped_ce": None, "mapped_ce_per_byte": None, "top_tokens": []}
    return {
        "alignment": {"with <angle> & more": measured, "no cache": unmeasured},
        "training": {"fused": {"rows_won": {"no cache": 0.25}}},
    }


def test_every_number_is_in_the_table(report):
    header, rows = alignment_report.table(report)
    assert header[0] == "source"
    assert [len(row) for row in rows] == [len(header)] * 2
    first = dict(zip(header, rows[0], strict=True))
    measured = report["alignment"]["with <angle> & more"]
    assert first["rows aligned"] == f"{100 * measured['share']:.1f}%"
    assert first["rows with collisions"] == f"{100 * measured['collisions']['rows']:.1f}%"
    assert first["CE (nats per byte)"] == f"{measured['mapped_ce_per_byte']:.3f}"
    assert first["the same, unmapped"] == f"{measured['source_top_ce_per_byte']:.3f}"
    assert first["rows won"] == ""
    second = dict(zip(header, rows[1], strict=True))
    assert second["CE (nats per byte)"] == ""
    assert second["rows won"] == "25.0%"


def test_rows_won_only_after_training(report):
    untrained = {"alignment": report["alignment"], "training": {}}
    assert "rows won" in alignment_report.section(report)
    assert "75.0% of the rows were won by none" in alignment_report.section(report)
    page = alignment_report.section(untrained)
    assert "rows won" not in page
    assert "won by none" not in page
    assert "mapped to the target" in page
    header, rows = alignment_report.table(untrained)
    assert [len(row) for row in rows] == [len(header)] * 2


def test_the_section_is_escaped_and_the_same_each_time(report):
    page = alignment_report.section(report)
    assert page == alignment_report.section(report)
    assert "with &lt;angle&gt; &amp; more" in page
    assert "<angle>" not in page
    assert page.count("<svg") == 1
    assert page.count("<details>") == 1
    assert f"more {len(TEXTS)}, no cache {len(TEXTS)}." in page
    for kind in ("same token", "inside a token", "mapped to the target", "the same rows, unmapped"):
        assert kind in page
    assert alignment_report.section({"alignment": {}, "training": {}}) == ""


def test_wins_by_domain_count_documents():
    alignment = {
        "a": {"text_ce": [["law", 0.5], ["law", 0.7], ["law", None], ["code", None], ["law", 0.9]]},
        "b": {"text_ce": [["law", 0.5], ["law", 0.6], ["law", 0.8], ["code", None], ["law", 0.1]]},
    }
    # Equal ones go to the first; a document without any number counts for none.
    assert alignment_report.source_wins(alignment) == {"law": {"a": 0.25, "b": 0.75}}
    page = alignment_report.wins_section(alignment_report.source_wins(alignment))
    assert page == alignment_report.wins_section(alignment_report.source_wins(alignment))
    assert "law" in page
    assert alignment_report.source_wins({"a": alignment["a"]}) == {}
    assert alignment_report.source_wins({"a": {}, "b": {}}) == {}
    assert alignment_report.wins_section({}) == ""


def test_rows_won_of_pairs_are_those_of_their_own_copies():
    training = {"pair/a": {"rows_won": {"target": 0.7, "a": 0.2}}, "pair/b": {"rows_won": {"target": 0.5, "b": 0.4}}}
    report = {"alignment": {"target": {}, "a": {}, "b": {}}, "training": training}
    assert alignment_report.rows_won(report) == {"a": 0.2, "b": 0.4}
