"""The models that ship with the quickstart: small, whole, what their script makes, and each strong in its own text."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

import fusejax
from fusejax import config, models, stdlib_corpus
from fusejax.evaluation import perplexity
from fusejax.tokenizers import Tokenizer

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "configs" / "quickstart"
EXPERTS = {"code": "llama-code", "docs": "mpt-docs", "unicode": "neox-unicode"}
NAMES = ["llama-generalist", *EXPERTS.values()]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("script", ROOT / "scripts" / "train_quickstart_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def heldout():
    """The beginnings of a few held-out documents of each domain."""
    texts = list(stdlib_corpus.documents("heldout"))
    chosen = []
    for domain in stdlib_corpus.DOMAINS:
        of_domain = [t.text for t in texts if t.domain == domain and len(t.text) > 300]
        chosen += [{"id": f"{domain} {i}", "domain": domain, "text": t[:300]} for i, t in enumerate(of_domain[:24])]
    return chosen


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_small_and_what_the_script_makes(name, script):
    folder = SHIPPED / name
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 3_000_000
    values, decoder = models.read_config(folder)
    recipe = script.RECIPES[name]
    assert values["dtype"] == "bfloat16"
    assert values["architectures"] == recipe.hf_config["architectures"]
    assert decoder == models.decoder_config({**recipe.hf_config, "vocab_size": values["vocab_size"]}, name)
    tokenizer = Tokenizer.load(str(folder))
    assert decoder.vocab_size - 64 < tokenizer.vocab_size <= decoder.vocab_size
    assert (tokenizer.eos_id, tokenizer.bos_id) == (values["eos_token_id"], values["bos_token_id"])
    assert tokenizer.pad_id == values["pad_token_id"]
    assert not tokenizer.adds_bos


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_loses_nothing(name):
    backend = Backend.from_file(str(SHIPPED / name / "tokenizer.json"))
    tokenizer = Tokenizer.load(str(SHIPPED / name))
    for text in (
        "def f(x):\n    return x  # 12\n",
        "naïve 😀 \u0301\t\n\n  two",
        "U+0915 क Lo DEVANAGARI LETTER KA\n",
        " a",
    ):
        ids, boundaries = tokenizer.encode(text)
        assert tokenizer.roles["unk"] not in ids
        assert boundaries[-1] == len(text.encode())
        assert backend.decode(ids.tolist(), skip_special_tokens=False) == text


def test_the_four_differ_in_tokenizers_and_families():
    tokenizers = {Tokenizer.load(str(SHIPPED / name)).fingerprint for name in NAMES}
    families = {json.loads((SHIPPED / name / "config.json").read_text())["model_type"] for name in NAMES}
    assert len(tokenizers) == 4
    assert families == {"llama", "mpt", "gpt_neox"}


def test_each_expert_is_the_best_in_its_own_text_and_the_generalist_is_on_average(heldout):
    bits = {}
    for name in NAMES:
        tokenizer = Tokenizer.load(str(SHIPPED / name))
        encoded = tokenizer.encode_batch([document["text"] for document in heldout])
        tokens = [{"ids": ids, "boundaries": boundaries} for ids, boundaries in encoded]
        model = fusejax.load(SHIPPED / name)
        longest = max(len(ids) for ids, _ in encoded)
        bits[name] = perplexity.bits_per_byte(model, tokenizer, heldout, tokens, max_length=longest + 2)
    for domain, expert in EXPERTS.items():
        best = bits[expert][domain]
        assert best < 0.9 * min(bits[name][domain] for name in NAMES if name != expert), domain
    average = {name: np.mean([bits[name][domain] for domain in EXPERTS]) for name in NAMES}
    assert min(average, key=average.get) == "llama-generalist"


def test_the_configuration_uses_these_models_on_text_that_they_have_not_seen(script, monkeypatch):
    monkeypatch.chdir(ROOT)
    job = config.load("configs/quickstart.yaml")
    assert [Path(source.model) for source in job.sources] == [SHIPPED.relative_to(ROOT) / name for name in NAMES]
    assert job.target.model == job.sources[0].model
    assert (job.corpus.path, job.corpus.split) == ("stdlib:", "fusion")
    assert (job.evaluation.corpus.path, job.evaluation.corpus.split) == ("stdlib:", "heldout")
    for name, recipe in script.RECIPES.items():
        pretraining = script.pretraining(recipe, SHIPPED / name, Path("build") / name)
        assert (pretraining.corpus.path, pretraining.corpus.split) == ("stdlib:", "train")
        assert pretraining.max_length == job.max_length


def test_the_script_writes_untrained_models(script, monkeypatch, tmp_path):
    texts = ["def f(x):\n    return x + 1\n", "The quick brown fox.", "U+0041 A Lu LATIN CAPITAL LETTER A\n"] * 20
    monkeypatch.setattr(script, "tokenizer_texts", lambda domains: iter(texts))
    for name, recipe in script.RECIPES.items():
        script.initialise(recipe, tmp_path / name / "untrained")
        model = fusejax.load(tmp_path / name / "untrained")
        tokenizer = Tokenizer.load(str(tmp_path / name / "untrained"))
        ids, _ = tokenizer.encode(texts[0])
        logits = np.asarray(model(ids[None]))
        assert np.isfinite(logits).all()
        assert logits.shape == (1, len(ids), model.config.vocab_size)
