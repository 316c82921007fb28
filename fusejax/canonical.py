"""Canonical bytes: the text bytes that each token of a tokenizer stands for.

Everything is read from the tokenizer's own description (the JSON of its backend: model, decoder, pre-tokenizer,
normalizer, added tokens), never from the name of its class, so that any tokenizer in Hugging Face form is understood.
"""

import re
from collections.abc import Callable, Collection
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE_MARKER = "▁"


def byte_level_alphabet() -> dict[str, int]:
    """Character → byte of byte-level BPE: printable Latin-1 characters are themselves, the rest follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = byte_level_alphabet()
CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}


def steps(description: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder as the flat list of its steps."""
    if not description:
        return []
    for key in ("normalizers", "pretokenizers", "decoders"):
        if key in description:
            return [step for part in description[key] for step in steps(part)]
    return [description]


def model_vocabulary(spec: dict[str, Any]) -> dict[str, int]:
    """Piece → id of the model itself, added tokens left out."""
    vocab = spec["model"]["vocab"]
    if isinstance(vocab, dict):
        return vocab
    return {piece: i for i, (piece, _score) in enumerate(vocab)}


def is_byte_level(spec: dict[str, Any]) -> bool:
    """Whether pieces are spelled in the byte-level alphabet."""
    decoder = steps(spec["decoder"]) or steps(spec["pre_tokenizer"])
    return any(step["type"] == "ByteLevel" for step in decoder)


def byte_tokens(spec: dict[str, Any]) -> dict[int, int]:
    """Id → byte of the tokens that stand for a single byte ('<0x0A>'), where the tokenizer has byte fallback."""
    by_decoder = any(step["type"] == "ByteFallback" for step in steps(spec["decoder"]))
    if not by_decoder and not spec["model"].get("byte_fallback"):
        return {}
    found = ((i, _BYTE_TOKEN.fullmatch(piece)) for piece, i in model_vocabulary(spec).items())
    return {i: int(match[1], 16) for i, match in found if match}


def special_ids(spec: dict[str, Any], roles: Collection[int] = ()) -> set[int]:
    """Ids of tokens without bytes: added tokens marked special, those with a role, and the unknown token."""
    ids = {token["id"] for token in spec["added_tokens"] if token["special"]} | set(roles)
    unknown = spec["model"].get("unk_id")
    if unknown is None:
        unknown = model_vocabulary(spec).get(spec["model"].get("unk_token") or "")
    return ids if unknown is None else ids | {unknown}


def canonical_bytes(spec: dict[str, Any], specials: Collection[int]) -> list[bytes | None]:
    """Per token id the bytes of text that it stands for; None for special tokens and ids that no token has.

    spec: the backend's description, `json.loads(tokenizer.to_str())`.
    """
    vocab, single_bytes = model_vocabulary(spec), byte_tokens(spec)
    to_bytes = _piece_decoder(spec)
    size = 1 + max([*vocab.values(), *(token["id"] for token in spec["added_tokens"])], default=-1)
    result: list[bytes | None] = [None] * size
    # An added token that is no piece of the model is matched in the raw text, so it is spelled as in the text.
    for token in spec["added_tokens"]:
        result[token["id"]] = token["content"].encode("utf-8")
    for piece, i in vocab.items():
        result[i] = bytes([single_bytes[i]]) if i in single_bytes else to_bytes(piece)
    for i in specials:
        if 0 <= i < size:
            result[i] = None
    return result


def surfaces(spec: dict[str, Any]) -> list[str | None]:
    """Per token id its spelling in the vocabulary, the tokenizer's own mark of a space written '▁'; None: unused id.

    This is what edit distances are taken of: bytes of a byte-level vocabulary stay characters of its alphabet, byte
    tokens stay '<0x0A>', and added tokens, which hold spaces as they are, stay so.
    """
    vocab = model_vocabulary(spec)
    to_text = (lambda piece: piece.replace(CHARACTER_OF_BYTE[0x20], " ")) if is_byte_level(spec) else _speller(spec)
    size = 1 + max([*vocab.values(), *(token["id"] for token in spec["added_tokens"])], default=-1)
    result: list[str | None] = [None] * size
    for token in spec["added_tokens"]:
        result[token["id"]] = token["content"]
    for piece, i in vocab.items():
        result[i] = to_text(piece).replace(" ", SPACE_MARKER)
    return result


def _piece_decoder(spec: dict[str, Any]) -> Callable[[str], bytes]:
    """What the tokenizer's decoder makes of one piece in the middle of a text."""
    if is_byte_level(spec):
        return _byte_level
    to_text = _speller(spec)
    return lambda piece: to_text(piece).encode("utf-8", "replace")


def _speller(spec: dict[str, Any]) -> Callable[[str], str]:
    """A piece of a tokenizer that is not byte-level as text, byte tokens aside."""
    replacements: list[tuple[str, str]] = []
    prefix = None
    decoder = steps(spec["decoder"])
    for step in decoder or [*steps(spec["pre_tokenizer"]), *steps(spec["normalizer"])]:
        if step["type"] == "Metaspace":
            replacements.append((step["replacement"], " "))
        elif step["type"] == "BPEDecoder":
            replacements.append((step["suffix"], " "))
        elif step["type"] == "WordPiece":
            prefix = step["prefix"]
        elif step["type"] == "Replace" and "String" in step["pattern"]:
            pattern, content = step["pattern"]["String"], step["content"]
            if decoder:
                replacements.append((pattern, content))
            elif pattern == " ":  # a normalizer that writes spaces as markers, read backwards
                replacements.append((content, " "))

    def to_text(piece: str) -> str:
        for old, new in replacements:
            piece = piece.replace(old, new)
        if prefix is not None:
            piece = piece.removeprefix(prefix) if piece.startswith(prefix) else " " + piece
        return piece

    return to_text


def _byte_level(piece: str) -> bytes:
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in piece])
    except KeyError:
        return piece.encode("utf-8", "replace")


def _strips(step: dict[str, Any]) -> bool:
    """Whether a step of a normalizer takes something away at a text's ends alone."""
    if step["type"] != "Replace" or step["content"]:
        return step["type"] == "Strip"
    pattern = step["pattern"].get("Regex", "")
    return pattern.startswith(("^", r"\A")) or pattern.endswith(("$", r"\z", r"\Z"))


def mid_text(spec: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer as it works in the middle of a text: no dummy prefix, no stripping, nothing added."""
    changed = dict(spec, truncation=None, padding=None, post_processor=None)
    kept = [step for step in steps(spec["normalizer"]) if step["type"] != "Prepend" and not _strips(step)]
    changed["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    pre = []
    for step in steps(spec["pre_tokenizer"]):
        if step["type"] == "Metaspace":
            step = dict(step, prepend_scheme="never")
        elif step["type"] == "ByteLevel":
            step = dict(step, add_prefix_space=False)
        pre.append(step)
    changed["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pre} if pre else None
    return changed
