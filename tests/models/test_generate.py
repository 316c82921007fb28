"""Generation: greedy as torch's `generate`, sampling by its definition, text as it streams."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from model_zoo import CASES, V, torch_model

import fusejax
from fusejax import models
from fusejax.errors import UserError
from fusejax.models import generate
from fusejax.models.generate import Generator, Sampling
from fusejax.models.texts import TextStream
from fusejax.tokenizers import Tokenizer

RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(0, V, n).tolist() for n in (7, 1, 4)]
NEW = 10  # beyond every window and, where rope is scaled, beyond the original context

# One case of each family, and those whose cache has something to get wrong.
QUICK = {CASES[name]["model_type"]: name for name in reversed(CASES)}.values()
HARD = [
    name for name in CASES if any(word in name for word in ("window", "dynamic", "yarn", "layer_types", "bias_max"))
]


def case(name):
    return pytest.param(name, marks=() if name in QUICK or name == "llama-dynamic" else pytest.mark.slow)


@pytest.mark.parametrize("name", [case(name) for name in dict.fromkeys([*QUICK, *HARD])])
def test_greedy_is_torch_generate(name, tmp_path):
    torch = pytest.importorskip("torch")
    reference = torch_model(CASES[name])
    reference.save_pretrained(tmp_path)
    reference.generation_config.eos_token_id = reference.generation_config.pad_token_id = None
    wanted = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        wanted.append(out[0, len(prompt) :].numpy())
    got = np.stack(list(generate.tokens(models.load(tmp_path), PROMPTS, NEW)), axis=1)
    np.testing.assert_array_equal(got, wanted)
    assert len(set(got.reshape(-1).tolist())) > 2


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("gemma3", "mpt") else pytest.mark.slow)
        for name in dict.fromkeys([*QUICK, *HARD])
        if "dynamic" not in name
    ],
)
def test_tokens_one_by_one_are_the_tokens_at_once(name):
    """Any tokens, not only greedy ones, which repeat; the first row has no padding, the second has."""
    config = dataclasses.replace(models.decoder_config(CASES[name]), initializer_std=0.4)
    model = models.init(config, 0)
    ids = RNG.integers(0, V, (2, 16))
    segments = np.ones((2, 16), np.int32)
    segments[1, :3] = 0
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0).astype(np.int32)
    graphdef, params = nnx.split(model)
    wanted = jax.jit(lambda p, *args: nnx.merge(graphdef, p).hidden(*args))(params, ids, segments, positions)
    hidden, cache = model.prefill(ids[:, :5], segments[:, :5], positions[:, :5], size=20)
    decode = jax.jit(lambda p, ids, cache: nnx.merge(graphdef, p).decode(ids, cache))
    got = [hidden]
    for at in range(5, 16):
        hidden, cache = decode(params, ids[:, at : at + 1], cache)
        got.append(hidden)
    got = np.concatenate(got, axis=1)
    real = segments == 1
    np.testing.assert_allclose(got[real], wanted[real], rtol=1e-4, atol=1e-4)


LLAMA = models.DecoderConfig(
    vocab_size=40, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, d_mlp=24, max_length=32, rotary_dim=4,
    initializer_std=0.3,
)  # fmt: skip


def sampled(prompts, n=12, **sampling):
    return np.stack(
        list(generate.tokens(models.init(LLAMA, 0), prompts, n, Sampling(**sampling), vocab_size=37)), axis=1
    )


def test_samples_depend_on_seed_and_row_alone():
    prompts = [[1, 2, 3], [4], [5, 6]]
    first = sampled(prompts, temperature=2.0, seed=1)
    np.testing.assert_array_equal(first, sampled(prompts, temperature=2.0, seed=1))
    np.testing.assert_array_equal(first[:2], sampled(prompts[:2], temperature=2.0, seed=1))
    assert (first != sampled(prompts, temperature=2.0, seed=2)).any()
    assert (sampled([[1], [1]], temperature=2.0)[0] != sampled([[1], [1]], temperature=2.0)[1]).any()
    assert first.max() < 37
    np.testing.assert_array_equal(sampled(prompts), sampled(prompts, temperature=2.0, top_k=1))
    np.testing.assert_array_equal(sampled(prompts), sampled(prompts, temperature=2.0, top_p=1e-6))
    np.testing.assert_array_equal(first, sampled(prompts, temperature=2.0, seed=1, top_k=10**12))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(-30, 30), min_size=2, max_size=12, unique=True),
    st.floats(0.2, 3.0), st.integers(0, 15), st.sampled_from([0.05, 0.3, 0.7, 0.95, 1.0]),
)  # fmt: skip
def test_kept_tokens(logits, temperature, top_k, top_p):
    """By the definition: temperature, the k largest, then the fewest that reach p."""
    logits = np.array(logits) / 10
    padded = np.pad(logits, (0, 12 - len(logits)), constant_values=-np.inf)[None].astype(np.float32)
    kept, ids = generate.keep(jnp.asarray(padded), jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))
    got = {int(i): float(x) for i, x in zip(ids[0], kept[0], strict=True) if x > -np.inf}
    scaled = logits / temperature
    order = [int(i) for i in np.argsort(-scaled)][: top_k or None]
    mass, wanted = np.exp(scaled[order]) / np.exp(scaled[order]).sum(), []
    for i, before in zip(order, np.cumsum(mass) - mass, strict=True):
        if wanted and before >= top_p < 1:
            break
        wanted.append(i)
    if abs(np.cumsum(mass) - top_p).min() > 1e-5 or top_p == 1:  # no draw by rounding
        assert sorted(got) == sorted(wanted)
    for i, value in got.items():
        np.testing.assert_allclose(value, scaled[i], rtol=1e-5, atol=1e-6)


def test_draws_follow_the_distribution():
    model, choice = models.init(LLAMA, 0), generate._Choice(jnp.float32(1.5), jnp.int32(5), jnp.float32(0.9), None)
    hidden = jax.random.normal(jax.random.key(0), (1, 16))
    keys = jax.random.split(jax.random.key(1), 4000)
    drawn = generate._choose(model, jnp.repeat(hidden, 4000, 0), jnp.int32(0), choice._replace(keys=keys), 40)
    kept, ids = generate.keep(model.logits(hidden), *choice[:3])
    wanted = np.zeros(40)
    wanted[np.asarray(ids[0])] = jax.nn.softmax(kept[0])
    got = np.bincount(drawn, minlength=40) / 4000
    assert 0 < np.count_nonzero(wanted) <= 5
    np.testing.assert_allclose(got, wanted, atol=0.04)
    assert not got[wanted == 0].any()


def test_few_programs():
    model, sizes = models.init(LLAMA, 1), (generate._start._cache_size, generate._next._cache_size)
    before = [size() for size in sizes]
    for length in range(1, 9):
        for temperature in (0.5, 0.7):
            sampling = Sampling(temperature=temperature, top_k=length, seed=length)
            list(generate.tokens(model, [[1] * length], 4, sampling))
    assert [size() for size in sizes] == [n + 1 for n in before]


@given(st.integers(1, 10**6))
def test_buckets(n):
    assert n <= generate._bucket(n) <= max(n * 1.25, n + 7)


BYTES = [bytes([i]) for i in range(256)] + [None, "né😀".encode(), b"stop", b"st"]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 259), st.sampled_from([256, 257, 258, 259, 115, 116, 111, 112])), max_size=30),
    st.lists(st.sampled_from(["stop", "op", "né", "�", "tops", "xx"]), max_size=3),
)
def test_streamed_text_is_the_text(ids, stop):
    stream = TextStream(BYTES, ends=(), stop=stop)
    shown = "".join([*(stream.push(i) for i in ids), stream.close()])
    text = b"".join(BYTES[i] or b"" for i in ids).decode("utf-8", "replace")
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    assert shown == stream.text == (text[: min(ends)[1]] if ends else text)


def test_stream_shows_whole_characters_and_holds_stops_back():
    stream = TextStream(BYTES, ends={256}, stop=["stop"])
    assert [stream.push(i) for i in (*"é".encode(), ord("s"), 115, 116, ord("x"), 256)] == [
        "",
        "é",
        "",
        "s",
        "",
        "stx",
        "",
    ]
    assert stream.done
    assert stream.push(65) == stream.close() == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=-1.0), "temperature: -1.0 should be a number from 0 on"),
        (dict(top_p=0.0), "top_p: 0.0 should be above 0"),
        (dict(top_k=-1), "top_k: -1 should be"),
        (dict(seed=-1), "seed: -1 should be"),
        (dict(max_tokens=0), "max_tokens: 0 should be"),
        (dict(stop=[""]), "stop: an empty string"),
    ],
)
def test_values_that_make_no_sense(tiny_models, options, message):
    for model in (tiny_models["coarse"], "/nowhere"):  # before any is loaded
        with pytest.raises(UserError, match=message):
            fusejax.generate(model, "x", **options)


def test_beyond_the_context_it_warns(capsys):
    next(generate.tokens(models.init(LLAMA, 0), [[1, 2, 3], [4]], 29))
    assert capsys.readouterr().err == ""
    next(generate.tokens(models.init(LLAMA, 0), [[1, 2, 3], [4]], 30))
    assert "a prompt of 3 tokens and 30 more go beyond the 32 that the model was made for" in capsys.readouterr().err


def test_empty_prompt(tiny_models):
    with pytest.raises(UserError, match="no BOS"):
        fusejax.generate(tiny_models["coarse"], "")
    assert fusejax.generate(tiny_models["fine"], "", max_tokens=3)  # begins with BOS


def test_generate_from_a_folder(tiny_models, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    folder = tiny_models["fine"]
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = ["The cat", "def add(a, b):\n    return"]
    wanted = []
    for prompt in prompts:
        encoded = tokenizer(prompt, return_tensors="pt")
        ids = reference.generate(
            encoded.input_ids,
            attention_mask=encoded.attention_mask,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=-1,
        )[0, encoded.input_ids.shape[1] :]
        wanted.append(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    generator = generate.Generator.load(folder)
    generator.ends = frozenset()
    assert fusejax.generate(generator, prompts, max_tokens=12) == wanted
    assert fusejax.generate(generator, prompts[1], max_tokens=12) == wanted[1]
    stop = wanted[0][2:4]
    assert fusejax.generate(generator, prompts, max_tokens=12, stop=[stop]) == [w.split(stop)[0] for w in wanted]
    pieces = {0: "", 1: ""}
    generator(prompts, 12, show=lambda row, text: pieces.__setitem__(row, pieces[row] + text))
    assert list(pieces.values()) == wanted


def test_which_tokens_end(tmp_path, capsys):
    tokenizer = type("T", (), {"eos_id": 7, "vocab_size": 9})()
    assert generate.eos_ids(tmp_path, tokenizer, rows=12) == {7}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert generate.eos_ids(tmp_path, tokenizer, rows=12) == {5}
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 3]}))
    assert generate.eos_ids(tmp_path, tokenizer, rows=12) == {2, 3}
    assert capsys.readouterr().err == ""
    path.write_text(json.dumps({"eos_token_id": [2, 10]}))
    assert 2 in generate.eos_ids(tmp_path, tokenizer, rows=12)
    wanted = f"warning: {path}: eos_token_id: 10 is none of the model's 9 tokens; no text ends with it\n"
    assert capsys.readouterr().err == wanted
    path.write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(UserError, match="eos_token_id: '</s>' should be a token id, or a list of them"):
        generate.eos_ids(tmp_path, tokenizer, rows=12)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1, 40]], "^prompt: token id 40 is none of the model's: 0 to 39"),
        ([[1], [-1, 2]], "^prompt 2: token id -1 is"),
    ],
)
def test_ids_that_the_model_does_not_know(prompts, message):
    with pytest.raises(UserError, match=message):
        next(generate.tokens(models.init(LLAMA, 0), prompts, 3))
    with pytest.raises(UserError, match=r"^ids: token id"):
        models.init(LLAMA, 0)(np.array(prompts[-1:]))


def test_a_local_folder_has_no_revision(tiny_models):
    for load in (Generator.load, models.load, models.read_config, Tokenizer.load):
        with pytest.raises(UserError, match="revision 'v1': a local folder has none; leave revision out"):
            load(tiny_models["coarse"], revision="v1")


def test_prompts_that_are_no_text(tiny_models, monkeypatch, capsys):
    from fusejax import cli

    with pytest.raises(UserError, match=r"^prompt 2: not UTF-8 \(character 1: half a surrogate pair\)"):
        fusejax.generate(tiny_models["fine"], ["a", "b\ud83d"])
    with pytest.raises(SystemExit):
        cli.main(["generate", "/nowhere", "caf\udce9"])  # as a command line gives bytes that are not UTF-8
    assert capsys.readouterr().err == "error: prompt: not UTF-8 (character 3: 0xe9)\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    with pytest.raises(SystemExit):
        cli.main(["generate", "/nowhere", "-"])
    assert capsys.readouterr().err == "error: prompt: standard input is not UTF-8 (byte 3: 0xe9)\n"
    with pytest.raises(UserError, match=r"xxx: should be a model folder or a hub name \(File name too long\)"):
        Generator.load("x" * 300)


def test_special_tokens_in_prompts(tiny_models):
    tokenizer = Tokenizer.load(tiny_models["coarse"], split_special=False)
    assert tokenizer.encode("a</s>")[0][-1] == tokenizer.eos_id


def test_command(tiny_models, capsys, monkeypatch):
    from fusejax import cli

    monkeypatch.setattr("fusejax.models.loading._SHOW_PROGRESS_ABOVE", 0)
    wanted = fusejax.generate(tiny_models["fine"], "The cat", max_tokens=9, temperature=0.7, top_k=5, seed=3)
    capsys.readouterr()
    arguments = ["--max-tokens", "9", "--temperature", "0.7", "--top-k", "5", "--seed", "3"]
    cli.main(["generate", tiny_models["fine"], "The cat", *arguments])
    shown = capsys.readouterr()
    assert shown.out == wanted + "\n"
    assert "load" in shown.err
    for option, value, wanted in (
        ("--top-p", "2", "2.0 should be above 0 and at most 1"),
        ("--max-tokens", "-1", "-1 should be a whole number above 0"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["generate", tiny_models["fine"], "The cat", option, value])
        assert stopped.value.code == 2
        assert capsys.readouterr().err == f"error: {option}: {wanted}\n"


def test_values_that_are_no_numbers_are_said(tiny_models):
    generator = Generator.load(tiny_models["coarse"])
    generator.model.embedding[...] = generator.model.embedding[...] * np.nan
    with pytest.raises(UserError, match="gives values that are not numbers"):
        generator(["the cat"], max_tokens=3)


def test_more_tokens_than_any_cache_holds(tiny_models):
    with pytest.raises(UserError, match="max_tokens: 100000000 is more than"):
        Generator.load(tiny_models["coarse"])(["the cat"], max_tokens=100_000_000)
