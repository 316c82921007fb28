"""Canonical bytes and byte boundaries of every kind of tokenizer."""

import json
import socket

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_zoo import LOSSLESS, LOSSY, NAMES, TEXTS, byte_level, hf, tokenizer

from fusejax import config
from fusejax.errors import UserError
from fusejax.tokenizers import Tokenizer, for_config

AWKWARD = [
    "",
    " ",
    "\n",
    "\r\n\r\n\t x",
    "  two leading spaces and    runs        of them  ",
    "1234567890 3.14 x**2",
    "e\u0301 a\u0308 \u212b \ufb01 \uff21",
    "👩‍👩‍👧 👍🏽 🇩🇪🇫🇷",
    "שלום مرحبا ‏עברית",
    "中文字符。日本語のテキスト",
    "<|end|> Ġ Ċ",
    "</s><s> <unk> <0x0A> ▁",
    "\x00\x01\ufeff\u200b\u00a0\u3000",
]
unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.lists(
    st.sampled_from([*"aé \n中😀▁Ġ<s>1", "e\u0301", "\u200d", "\u00a0", "\uf900", "the ", "check", "point"])
).map("".join)


def check_boundaries(tok, text):
    ids, boundaries = tok.encode(text)
    assert ids.dtype == boundaries.dtype == np.int32
    assert len(ids) == len(boundaries)
    if len(ids):
        assert boundaries[0] >= 0
        assert (np.diff(boundaries) >= 0).all()
        assert boundaries[-1] == len(text.encode("utf-8"))
    return ids, boundaries


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(text=unicode_text)
def test_boundaries_increase_and_end_with_the_text(name, text):
    check_boundaries(tokenizer(name), text)


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("text", [text for text in [*AWKWARD, *TEXTS] if "▁" not in text])
def test_every_token_spells_the_bytes_between_its_boundaries(name, text):
    tok, data = tokenizer(name), text.encode("utf-8")
    ids, boundaries = check_boundaries(tok, text)
    for t, (token, start, end) in enumerate(zip(ids, [0, *boundaries], boundaries, strict=False)):
        piece = tok.canonical_bytes[token]
        if t == 0 and piece != data[:end]:
            piece = piece.removeprefix(b" ")  # the dummy prefix
        assert piece == data[start:end]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(text=unicode_text)
def test_boundaries_agree_with_the_backends_offsets(name, text):
    # The backend's offsets are in characters; a boundary may not lie beyond the characters before the next token, but
    # for white space that offsets leave out. Tokens that share a character with the next one may move on with it.
    tok, data = tokenizer(name), text.encode("utf-8")
    _, boundaries = tok.encode(text)
    offsets = tok._backend.encode(text, add_special_tokens=False).offsets
    ends = [len(text[:end].encode("utf-8")) for _, end in offsets]
    for t in range(len(ends) - 1):
        if offsets[t + 1][0] >= offsets[t][1]:
            most = max(*ends[: t + 1], len(text[: offsets[t + 1][0]].encode("utf-8")))
            assert not data[most : boundaries[t]].strip()


def test_a_normalizer_moves_only_what_it_changes():
    tok = tokenizer("byte-level NFC")
    text = "the cat e\u0301 sat"
    ids, boundaries = tok.encode(text)
    data, changed = text.encode("utf-8"), text.encode("utf-8").index(b"e\xcc\x81")
    spelled = [tok.canonical_bytes[i] for i in ids]
    assert b"".join(spelled) == "the cat é sat".encode()
    for piece, start, end in zip(spelled, [0, *boundaries[:-1]], boundaries, strict=True):
        if end <= changed or start >= changed + 3:
            assert piece == data[start:end]
    assert changed + 3 in boundaries


def test_unknown_characters_take_their_own_bytes():
    tok = tokenizer("unigram")
    ids, boundaries = tok.encode("cat 中 sat")
    unknown = ids.tolist().index(tok.roles["unk"])
    assert tok.canonical_bytes[ids[unknown]] is None
    assert boundaries[unknown] == len("cat 中".encode())
    assert boundaries[-1] == len("cat 中 sat".encode())


def test_special_tokens_written_in_a_document_are_text():
    tok = tokenizer("sentencepiece")
    ids, _ = tok.encode("a </s> b")
    assert tok.eos_id not in ids
    assert b"".join(tok.canonical_bytes[i] for i in ids) == b" a </s> b"


def test_a_transformers_tokenizer_keeps_its_own_way_with_special_tokens():
    wrapped = Tokenizer.of(hf("sentencepiece"))
    assert wrapped is Tokenizer.of(hf("sentencepiece"))
    text = "a </s> b"
    ids, boundaries = check_boundaries(wrapped, text)
    assert ids.tolist() == hf("sentencepiece")(text, add_special_tokens=False).input_ids
    at = ids.tolist().index(wrapped.eos_id)
    assert boundaries[at] == len("a </s>")


def test_canonical_bytes_of_markers_byte_tokens_and_special_tokens():
    spm, bpe = tokenizer("sentencepiece"), tokenizer("byte-level coarse")
    vocab = hf("sentencepiece").get_vocab()
    assert spm.canonical_bytes[vocab["<0x0A>"]] == b"\n"
    assert spm.canonical_bytes[vocab["<0xE4>"]] == b"\xe4"
    assert spm.canonical_bytes[vocab["▁the"]] == b" the"
    assert [spm.canonical_bytes[vocab[special]] for special in ("<unk>", "<s>", "</s>")] == [None] * 3
    vocab = hf("byte-level coarse").get_vocab()
    assert bpe.canonical_bytes[vocab["Ċ"]] == b"\n"
    assert bpe.canonical_bytes[vocab["Ġthe"]] == b" the"
    assert bpe.canonical_bytes[vocab["    "]] == b"    "  # added, not special
    assert bpe.canonical_bytes[vocab["<|end|>"]] is None
    assert len(bpe.canonical_bytes) == bpe.vocab_size == max(vocab.values()) + 1


def test_roles_bos_and_fingerprint():
    spm, without_bos = tokenizer("sentencepiece"), tokenizer("sentencepiece coarse")
    assert spm.adds_bos
    assert not without_bos.adds_bos
    assert spm.roles == {"bos": 1, "eos": 2, "pad": 2, "unk": 0}
    assert (spm.bos_id, spm.eos_id, spm.pad_id) == (1, 2, 2)
    assert tokenizer("unigram").pad_id is None
    assert len({tokenizer(name).fingerprint for name in NAMES}) == len(NAMES)
    assert Tokenizer(hf("unigram")).fingerprint == tokenizer("unigram").fingerprint


def test_wrapping_leaves_the_transformers_tokenizer_alone():
    original = byte_level()
    before = original("a <|end|> b", add_special_tokens=False).input_ids
    Tokenizer(original)
    assert original("a <|end|> b", add_special_tokens=False).input_ids == before


@pytest.mark.parametrize("name", NAMES)
def test_first_token_in_the_middle_of_a_text(name):
    tok = tokenizer(name)
    pieces = [b" checkpoint", b"checkpoint", b"\n\n", b" 10", "é".encode(), b" the cat", b"\xff"]
    images = tok.map_bytes(pieces)
    for piece, image in zip(pieces, images.tolist(), strict=True):
        if image < 0:
            assert name in LOSSY
            continue
        start = tok.canonical_bytes[image]
        if name in LOSSY and piece not in (b" checkpoint", b"checkpoint", b" 10"):
            continue  # it folds accents or newlines into others
        if name == "wordpiece":  # knows spaces as word ends alone
            piece, start = piece.strip(), start.strip()
        assert piece.startswith(start)  # no dummy prefix, and a space that is there is kept
        if piece in tok.ids_of_bytes:
            assert start == piece


def test_of_equal_tokens_the_one_in_use_is_chosen():
    tok = tokenizer("byte-level coarse")
    for n in range(2, 9):
        assert tok.ids_of_bytes[b" " * n] == hf("byte-level coarse").convert_tokens_to_ids(" " * n)
    spm = tokenizer("sentencepiece")  # 'e' and '<0x65>'
    assert spm.ids_of_bytes[b"e"] == hf("sentencepiece").convert_tokens_to_ids("e")
    assert spm.ids_of_bytes[b"\xff"] == hf("sentencepiece").convert_tokens_to_ids("<0xFF>")


def test_batches_give_the_same_as_single_texts():
    tok, texts = tokenizer("byte-level NFC"), [*AWKWARD, *TEXTS]
    for text, (ids, boundaries) in zip(texts, tok.encode_batch(texts), strict=True):
        assert (ids == tok.encode(text)[0]).all()
        assert (boundaries == tok.encode(text)[1]).all()


def test_half_a_surrogate_pair_is_a_users_mistake():
    with pytest.raises(UserError, match="surrogate"):
        tokenizer("sentencepiece").encode("a \ud83d b")


def test_load_from_a_folder_and_again_after_a_change(tmp_path):
    hf("sentencepiece").save_pretrained(tmp_path)
    tok = Tokenizer.load(str(tmp_path))
    assert tok.fingerprint == tokenizer("sentencepiece").fingerprint
    assert Tokenizer.load(str(tmp_path)) is tok
    hf("unigram").save_pretrained(tmp_path)
    assert Tokenizer.load(str(tmp_path)).fingerprint == tokenizer("unigram").fingerprint


def test_models_with_equal_tokenizers_share_one(tmp_path):
    for name in ("a", "b"):
        hf("byte-level").save_pretrained(tmp_path / name)
    hf("unigram").save_pretrained(tmp_path / "c")
    job = config.validate({
        "target": str(tmp_path / "a"), "sources": [str(tmp_path / "b"), str(tmp_path / "c")], "corpus": {"path": "x"},
    })  # fmt: skip
    known = for_config(job)
    assert known[str(tmp_path / "a")] is known[str(tmp_path / "b")]
    assert known[str(tmp_path / "a")] is not known[str(tmp_path / "c")]


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no such model folder"):
        Tokenizer.load(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="holds no tokenizer") as caught:
        Tokenizer.load(str(tmp_path))
    assert "\n" not in str(caught.value)
    hf("byte-level").save_pretrained(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text()
    for text, settings_text, message in (
        ('{"model": ', "{}", "tokenizer.json: not valid JSON"),
        ("[]", "{}", "tokenizer.json: should hold a JSON object"),
        (json.dumps(json.loads(whole) | {"model": {}}), "{}", "tokenizer.json: data did not match"),
        (whole, "[]", "tokenizer_config.json: should hold a JSON object"),
        (whole, '{"tokenizer_class": 3}', "tokenizer.json or tokenizer_config.json: AttributeError: 'int' object"),
        ('{"model": {}}', "{}", "tokenizer.json: "),
    ):
        (tmp_path / "tokenizer.json").write_text(text)
        (tmp_path / "tokenizer_config.json").write_text(settings_text)
        with pytest.raises(UserError, match="no tokenizer can be loaded from this folder") as caught:
            Tokenizer.load(str(tmp_path))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"xxx: should be a model folder or a hub name \(File name too long\)"):
        Tokenizer.load("x" * 300)


def test_a_hub_out_of_reach_is_said_in_one_line_at_once(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    with pytest.raises(UserError, match="cannot be reached") as caught:
        Tokenizer.load("no-such-owner/no-such-model")
    assert "\n" not in str(caught.value)
    assert "no-such-owner/no-such-model" in str(caught.value)


def test_random_merges_are_refused():
    dropping = byte_level()
    spec = json.loads(dropping.backend_tokenizer.to_str())
    spec["model"]["dropout"] = 0.5
    dropping._tokenizer = type(dropping.backend_tokenizer).from_str(json.dumps(spec))
    with pytest.raises(UserError, match="dropout"):
        Tokenizer(dropping)
