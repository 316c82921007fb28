import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusejax import evaluation, models, scoring
from fusejax.errors import UserError
from fusejax.evaluation import bits_per_byte, measure
from fusejax.evaluation.perplexity import windows
from fusejax.store import Store
from fusejax.tokenizers import Tokenizer

# The longest text is 67 bytes, so that it fits with BOS and EOS even in single bytes.
OPTIONS = {"max_length": 80, "batch_tokens": 256}


def stores(job, folder):
    tokens = job.folder / "data/heldout/tokens" / Tokenizer.load(folder).fingerprint
    return Store(job.folder / "data/heldout/documents"), Store(tokens)


@pytest.mark.parametrize("name", ["coarse", "fine"])
def test_equals_a_torch_computation(make_job, tiny_models, name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tiny_models[name]
    documents, tokens = stores(make_job(), folder)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    hf = transformers.AutoTokenizer.from_pretrained(folder)
    n_bytes, nats, n_tokens = {}, {}, {}
    for record in documents:
        ids = hf(record["text"], return_tensors="pt").input_ids
        with torch.no_grad():
            logprobs = reference(ids).logits.log_softmax(-1)
        loss = -logprobs[0, :-1].gather(-1, ids[0, 1:, None]).sum().item()
        # Nothing for a BOS; else every character of a byte-level token stands for a byte.
        first = 0 if ids[0, 0] == hf.bos_token_id else len(hf.convert_ids_to_tokens(ids[0, 0].item()))
        domain = record["domain"]
        nats[domain] = nats.get(domain, 0) + loss
        n_bytes[domain] = n_bytes.get(domain, 0) + len(record["text"].encode()) - first
        n_tokens[domain] = n_tokens.get(domain, 0) + ids.shape[1] - 1
    bits = {domain: nats[domain] / np.log(2) / n_bytes[domain] for domain in nats}
    found = bits_per_byte(models.load(folder), Tokenizer.load(folder), documents, tokens, **OPTIONS)
    assert list(found) == ["prose", "code", "average"]
    for domain, value in bits.items():
        assert found[domain] == pytest.approx(value, abs=1e-4)
    assert found["average"] == pytest.approx(np.mean(list(bits.values())), abs=1e-4)
    sums = measure(models.load(folder), Tokenizer.load(folder), documents, tokens, **OPTIONS)
    for domain in nats:
        assert (sums[domain].bytes, sums[domain].tokens) == (n_bytes[domain], n_tokens[domain])
        assert sums[domain].perplexity == pytest.approx(np.exp(nats[domain] / n_tokens[domain]), rel=1e-4)


def test_does_not_depend_on_batches(make_job, tiny_models):
    folder = tiny_models["fine"]
    documents, tokens = stores(make_job(), folder)
    model, tokenizer = models.load(folder), Tokenizer.load(folder)
    small = bits_per_byte(model, tokenizer, documents, tokens, max_length=80, batch_tokens=1)
    large = bits_per_byte(model, tokenizer, documents, tokens, max_length=640, batch_tokens=4096)
    assert small == pytest.approx(large, abs=1e-5)


def test_batches_hold_no_more_rows_than_the_text_needs(make_job, tiny_models, monkeypatch):
    folder, sizes, plan = tiny_models["fine"], [], scoring.plan

    def watched(*arguments):
        batches = plan(*arguments)
        sizes.extend(batch.rows * batch.length for batch in batches)
        return batches

    monkeypatch.setattr(scoring, "plan", watched)
    documents, tokens = stores(make_job(), folder)
    bits_per_byte(models.load(folder), Tokenizer.load(folder), documents, tokens, max_length=80, batch_tokens=10**12)
    assert 0 < max(sizes) <= 8192


def test_a_domain_without_anything_to_predict_is_refused(tiny_models):
    folder = tiny_models["coarse"]
    tokenizer = Tokenizer.load(folder)
    ids, boundaries = tokenizer.encode("x")
    with pytest.raises(UserError, match="'tiny': none of its documents is longer than one token"):
        bits_per_byte(
            models.load(folder), tokenizer,
            [{"id": "d", "domain": "tiny"}], [{"ids": ids, "boundaries": boundaries}], **OPTIONS,
        )  # fmt: skip


def test_values_that_are_no_numbers_are_reported(make_job, tiny_models):
    folder = tiny_models["coarse"]
    model = models.load(folder)
    model.embedding[...] = model.embedding[...] * np.nan
    with pytest.raises(UserError, match="held-out document document0"):
        bits_per_byte(model, Tokenizer.load(folder), *stores(make_job(), folder), **OPTIONS)


def test_the_stage_writes_each_model_once(make_job, tiny_models, monkeypatch, capsys):
    job = make_job()
    real, loaded = models.load, []
    monkeypatch.setattr(models, "load", lambda path, **options: (loaded.append(path), real(path, **options))[1])
    evaluation.run(job)
    # The target is also a source, under the name of its folder: it runs once.
    assert loaded == [tiny_models["coarse"], tiny_models["fine"]]
    results = {p.stem: json.loads(p.read_text()) for p in (job.folder / "evaluation").iterdir()}
    assert sorted(results) == ["coarse", "fine", "target"]
    assert results["coarse"]["bits_per_byte"] == results["target"]["bits_per_byte"]
    assert set(results["fine"]["bits_per_byte"]) == {"prose", "code", "average"}
    evaluation.run(job)
    assert len(loaded) == 2
    assert capsys.readouterr().out.count("done before, skipped") == 3
    # What takes over an earlier run's result keeps its own name.
    (job.folder / "evaluation/coarse.json").unlink()
    evaluation.run(job)
    assert len(loaded) == 2
    assert json.loads((job.folder / "evaluation/coarse.json").read_text()) == results["coarse"]
    assert results["coarse"]["name"] == "coarse"


def test_a_changed_model_is_evaluated_again(make_job, tiny_models):
    job = make_job(sources=[])
    evaluation.run(job)
    path = job.folder / "evaluation/target.json"
    before = json.loads(path.read_text())
    evaluation.run(job.model_copy(update={"target": job.target.model_copy(update={"model": tiny_models["fine"]})}))
    after = json.loads(path.read_text())
    assert after["inputs"]["model"] != before["inputs"]["model"]
    assert after["bits_per_byte"] != before["bits_per_byte"]


def test_without_a_corpus_there_is_nothing_to_do(make_job, capsys):
    job = make_job(evaluation={"corpus": None})
    evaluation.run(job)
    assert "nothing to evaluate" in capsys.readouterr().out
    assert not (job.folder / "evaluation").exists()


@given(st.integers(0, 60), st.integers(1, 12), st.data())
def test_windows_count_every_label_once(n_inputs, max_length, data):
    stride = data.draw(st.integers(1, max_length))
    counted = []
    for start, first, end in windows(n_inputs, max_length, stride):
        assert 0 <= start <= first <= end <= n_inputs
        assert end - start <= max_length
        # Where there are so many tokens before it, a label sees max_length − stride of them and the one it follows.
        assert first - start >= min(first, max_length - stride)
        counted += range(first, end)
    assert counted == list(range(n_inputs))


@pytest.mark.parametrize(("name", "max_length", "stride"), [("coarse", 16, 16), ("fine", 16, 5)])
def test_windows_equal_a_torch_computation(make_job, tiny_models, name, max_length, stride):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tiny_models[name]
    documents, tokens = stores(make_job(), folder)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    bos = [0] if name == "fine" else []
    nats = {}
    for record, text in zip(documents, tokens, strict=True):
        line, total = [*bos, *text["ids"].tolist()], 0.0
        # Each label from the window in which it is first there, one at a time.
        for label in range(1, len(line)):
            start = 0
            while label - start > max_length:
                start += stride
            with torch.no_grad():
                logits = reference(torch.tensor([line[start:label]])).logits[0, -1]
            total -= logits.log_softmax(-1)[line[label]].item()
        nats[record["domain"]] = nats.get(record["domain"], 0) + total
    sums = measure(
        models.load(folder), Tokenizer.load(folder), documents, tokens, max_length=max_length, stride=stride,
        batch_tokens=64,
    )  # fmt: skip
    for domain, value in nats.items():
        assert sums[domain].nats / sums[domain].bytes == pytest.approx(value / sums[domain].bytes, abs=1e-4)


def test_a_stride_beyond_the_window_is_refused(make_job, tiny_models):
    folder = tiny_models["coarse"]
    with pytest.raises(UserError, match="stride: 17 should be between 1 and the 16"):
        measure(
            models.load(folder), Tokenizer.load(folder), *stores(make_job(), folder), max_length=16, stride=17
        )  # fmt: skip
