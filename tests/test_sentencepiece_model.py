"""Raw SentencePiece models, written here byte by byte, and against the sentencepiece package where it is installed."""

import json
import struct

import numpy as np
import pytest
from tokenizer_zoo import TEXTS, raw_sentencepiece, sentencepiece_bytes

from fusejax import sentencepiece_model
from fusejax.errors import UserError
from fusejax.tokenizers import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def message(pieces, kind=2, **normalizer):
    body = b""
    for text, score, piece_kind in pieces:
        body += field(1, field(1, text.encode()) + field(2, score) + field(3, piece_kind))
    body += field(2, field(3, kind) + field(43, (1 << 64) - 1))
    settings = {"dummy": 1, "squeeze": 0} | normalizer
    return body + field(3, field(1, b"identity") + field(3, settings["dummy"]) + field(4, settings["squeeze"]))


SPECIALS = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
BYTES = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
# As in Mistral's model: runs of spaces come early in the file and last in score.
PIECES = [
    *SPECIALS, *BYTES, ("▁▁", -1e9, NORMAL), ("▁▁▁▁", -1e9, NORMAL), ("▁t", -1.0, NORMAL), ("ab", -2.0, NORMAL),
    ("▁▁▁", -1e9, NORMAL), ("▁", -1e9, NORMAL), ("t", -9.0, NORMAL), ("a", -9.0, NORMAL), ("b", -9.0, NORMAL),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(message(PIECES))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "pad_token": "</s>"}))
    return tmp_path


def spelled(tok, text):
    return [tok.canonical_bytes[i] for i in tok.encode(text)[0]]


def test_merges_follow_scores_not_ids(folder):
    tok = Tokenizer.load(str(folder))
    assert spelled(tok, "a    t") == [b" ", b"a", b"   ", b" t"]
    assert spelled(tok, "ab\nt") == [b" ", b"ab", b"\n", b"t"]
    assert spelled(tok, "é") == [b" ", b"\xc3", b"\xa9"]


def test_roles_and_settings(folder):
    tok = Tokenizer.load(str(folder))
    assert tok.roles == {"unk": 0, "bos": 1, "eos": 2, "pad": 2}
    assert tok.adds_bos
    assert tok.vocab_size == len(PIECES)
    assert 1 not in tok.encode("<s> a")[0]
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    tok = Tokenizer.load(str(folder))
    assert not tok.adds_bos
    assert tok.pad_id is None
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer.load(str(folder)).eos_id == 2


def test_a_tokenizer_json_beside_it_comes_first(folder):
    from tokenizer_zoo import hf, tokenizer

    hf("sentencepiece").save_pretrained(folder)
    assert Tokenizer.load(str(folder)).fingerprint == tokenizer("sentencepiece").fingerprint


def test_unigram_user_defined_and_squeezed_spaces(tmp_path):
    pieces = [
        *SPECIALS, ("▁the", -1.0, NORMAL), ("▁", -3.0, NORMAL), ("<tag>", 0.0, USER_DEFINED),
        *((letter, -4.0, NORMAL) for letter in "the "),
    ]  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(message(pieces, kind=1, squeeze=1))
    tok = Tokenizer.load(str(tmp_path))
    assert [piece for piece in spelled(tok, "the<tag>the") if piece == b"<tag>"] == [b"<tag>"]
    ids, boundaries = tok.encode("the   the")
    assert [tok.canonical_bytes[i] for i in ids] == [b" the", b" the"]
    assert boundaries.tolist() == [3, 9]


@pytest.mark.parametrize("content", [b"", b"\xff\xff\xff", b"\x0a\x7fshort", message(SPECIALS, kind=3)])
def test_files_that_are_no_model(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.model: ") as caught:
        Tokenizer.load(str(tmp_path))
    assert "\n" not in str(caught.value)


HARD = [
    "", " ", "  ", "\n", "\n\n a\n", "\tx = 1  \n", "the  checkpoint", " x", "  the   cat  ", "1000 unknown: 語",
    " \u2603 b", "ﬁ ① \u212b e\u0301 \uff21", "👩\u200d👩\u200d👧 👍🏽 🇩🇪", "שלום مرحبا", "中文字符", "\x00\x01 a",
    "cat\u200bsat \ufeffx\u00a0y\u3000z",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("rule", ["identity", "nfkc", "nmt_nfkc"])
@pytest.mark.parametrize("byte_fallback", [False, True])
@pytest.mark.parametrize(("prefix", "squeeze"), [(True, True), (True, False), (False, True), (False, False)])
def test_the_same_ids_and_boundaries_as_sentencepiece(tmp_path, kind, rule, byte_fallback, prefix, squeeze):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece_bytes(
        model_type=kind,
        normalization_rule_name=rule,
        byte_fallback=byte_fallback,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=squeeze,
    )
    (tmp_path / "tokenizer.model").write_bytes(model)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    tok = Tokenizer(sentencepiece_model.load(tmp_path / "tokenizer.model", None))
    compared = 0
    for text in [*TEXTS, *HARD]:
        data, pieces = text.encode(), reference.encode(text, return_type="proto").pieces
        ids, boundaries = tok.encode(text)
        assert ids.tolist() == [piece.id for piece in pieces], repr(text)
        if not pieces:
            continue
        assert boundaries[-1] == len(data)
        assert (np.diff(boundaries) >= 0).all()
        for piece, boundary in zip(pieces[:-1], boundaries.tolist(), strict=False):
            if (tok.canonical_bytes[piece.id] or b"?") == data[piece.begin : piece.end]:
                assert boundary == piece.end, (text, piece)
                compared += 1
    assert compared > 80


def test_a_dummy_prefix_before_a_space_is_no_text(tmp_path):
    # '☃' is unknown, so that boundaries come from offsets, in which the prefix shares the space.
    tok = Tokenizer(raw_sentencepiece(
        model_type="unigram", normalization_rule_name="identity", remove_extra_whitespaces=False
    ))  # fmt: skip
    ids, boundaries = tok.encode(" \u2603 b")
    assert [tok.canonical_bytes[i] for i in ids[:4]] == [b" ", b" ", None, b" "]
    assert boundaries.tolist() == [0, 1, 4, 5, 6]


def test_a_tokenizer_json_is_taken_as_it_is_whatever_class_is_named(folder, tmp_path):
    """transformers makes a LlamaTokenizer anew from the file's vocabulary, with other ids; models were trained on
    the file's."""
    from transformers import AutoTokenizer

    right = Tokenizer.load(str(folder))
    saved = tmp_path / "saved"
    sentencepiece_model.load(folder / "tokenizer.model", None).save_pretrained(saved)
    settings = json.loads((saved / "tokenizer_config.json").read_text()) | {"tokenizer_class": "LlamaTokenizer"}
    (saved / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded, theirs = Tokenizer.load(str(saved)), AutoTokenizer.from_pretrained(saved)
    probes = [*sentencepiece_model.PROBES, "   t  ab"]
    assert [loaded.encode(probe)[0].tolist() for probe in probes] == [right.encode(p)[0].tolist() for p in probes]
    assert any(theirs.encode(p, add_special_tokens=False) != right.encode(p)[0].tolist() for p in probes)
    assert loaded.roles == {"unk": 0, "bos": 1, "eos": 2}
    assert loaded.adds_bos


def test_a_backend_that_does_otherwise_is_refused(folder, monkeypatch):
    """As the one that merges in the order of the ids: runs of spaces come out differently."""
    by_id = sentencepiece_model._merges

    def wrong(pieces):
        return sorted(by_id(pieces), key=lambda pair: [piece.text for piece in pieces].index("".join(pair)))

    monkeypatch.setattr(sentencepiece_model, "_merges", wrong)
    with pytest.raises(UserError, match=r"tokenizer.model: '.*' is not tokenized as SentencePiece does") as caught:
        Tokenizer.load(str(folder))
    assert "\n" not in str(caught.value)
