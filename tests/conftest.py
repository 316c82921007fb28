"""Two tiny models with different tokenizers, and jobs over a few documents, for the tests of all stages."""

import functools
import os

import jax
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fusejax import config, export
from fusejax import models as fuse_models
from fusejax.store import StoreWriter
from fusejax.tokenizers import Tokenizer

MAX_LENGTH = 64
if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") and jax.__version_info__ < (0, 11):
    # `make test` spends its time on compilation, not on programs; later versions have no such option.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
TEXTS = {
    "prose": [
        "The cat sat on the mat, and the dog sat on the log.",
        "Ünïcödé and 😀 take more than one byte each; naïve tools cut them.",
        "A sentence.\n\nAnother one, after an empty line.",
        "x",
        "Over the hills and far away the other cat sat, and sat.",
        "The log of the dog, the mat of the cat.",
    ],
    "code": [
        "def add(a, b):\n    return a + b\n",
        "for i in range(10):\n\tprint(i, i * i)\n",
        "import os\nimport sys\n\nprint(sys.argv)\n",
        "return",
        "class Cat:\n    def sit(self, mat):\n        return mat\n",
    ],
}


def _tokenizer(folder, vocab_size, bos):
    """A byte-level BPE, saved with transformers; with `bos` it puts BOS before a text."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text for texts in TEXTS.values() for text in texts] * 3, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    wrapped.save_pretrained(folder)


def _model(folder, model_type, rows, seed, **changes):
    values = {
        "vocab_size": rows, "d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "head_dim": 8, "d_mlp": 32,
        "max_length": MAX_LENGTH, "rotary_dim": 8, "initializer_std": 0.5,
    } | changes  # fmt: skip
    decoder_config = fuse_models.DecoderConfig(**values)
    hf_config = fuse_models.hf_config(decoder_config, model_type)
    export.save(fuse_models.init(decoder_config, seed), hf_config, folder, tokenizer_from=folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Token tables that tests make stay in a folder of the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def compiled_as_a_job():
    """For bounds that hold only for optimised programs: those of the test are, under `make test` too."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Folders of two models: `coarse` (Llama, larger vocabulary, padded rows) and `fine` (GPT-NeoX, BOS in front)."""
    folder = tmp_path_factory.mktemp("models")
    _tokenizer(folder / "coarse", 330, bos=False)
    _model(folder / "coarse", "llama", rows=352, seed=1)
    _tokenizer(folder / "fine", 280, bos=True)
    _model(
        folder / "fine", "gpt_neox", rows=280, seed=2,
        norm="layer", norm_bias=True, norm_eps=1e-5, activation="gelu", gated_mlp=False, qkv_bias=True, out_bias=True,
        mlp_bias=True, parallel_residual=True,
    )  # fmt: skip
    return {"coarse": str(folder / "coarse"), "fine": str(folder / "fine")}


@pytest.fixture
def make_job(tiny_models, tmp_path):
    """A function: key=value changes → a Config whose documents and tokens are there, as `prepare` leaves them."""

    def make(output="job", texts=TEXTS, **changes):
        values = {
            "target": tiny_models["coarse"],
            "sources": [
                {"model": tiny_models["coarse"], "name": "coarse"},
                {"model": tiny_models["fine"], "name": "fine"},
            ],
            "corpus": {"path": "unused.jsonl"},
            "max_length": MAX_LENGTH,
            "cache": {"top_k": 5, "batch_tokens": 256},
            "batch": {"sequences": 2, "epochs": 2},
            "precision": {"compute": "float32"},
            "evaluation": {"corpus": {"path": "unused.jsonl"}},
            "output": str(tmp_path / output),
        } | changes
        job = config.validate(values)
        for split in ("train", "heldout"):
            write_documents(job.folder / "data" / split, texts, [Tokenizer.load(m) for m in tiny_models.values()])
        return job

    return make


def write_documents(folder, texts, tokenizers):
    """The stores of documents and tokens."""
    pairs = [(domain, text) for domain, group in texts.items() for text in group]
    inputs = {"text": str(hash(tuple(pairs)))}

    def write(store, records):
        writer = StoreWriter(store, inputs, len(records), shard_records=4)
        for shard, span in writer.missing():
            writer.write(shard, [records[i] for i in span])
        writer.finish({})

    write(
        folder / "documents",
        [{"id": f"document{i}", "domain": domain, "text": text} for i, (domain, text) in enumerate(pairs)],
    )
    for tokenizer in tokenizers:
        encoded = [tokenizer.encode(text) for _, text in pairs]
        write(folder / "tokens" / tokenizer.fingerprint, [{"ids": ids, "boundaries": ends} for ids, ends in encoded])


@pytest.fixture(scope="session")
def devices():
    """A function: a topology's name → its devices.

    Skips where its compiler is not installed, unless FUSEJAX_REQUIRE_AOT is set, as by `make test-aot`.
    """
    from fusejax import aot

    def get(name):
        try:
            return aot.topology(name)
        except aot.NotInstalledError as error:
            if os.environ.get("FUSEJAX_REQUIRE_AOT"):
                raise
            pytest.skip(str(error))

    return functools.cache(get)
