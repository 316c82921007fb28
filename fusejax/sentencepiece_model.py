"""Tokenizers that come as a raw SentencePiece model (`tokenizer.model`) without a tokenizer.json.

Read here, without the sentencepiece package, because the order of a BPE's merges is not in the file: it follows from
the pieces' scores. Taking the order of the ids instead tokenizes runs of spaces wrongly, and says nothing.
"""

import json
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from fusejax.canonical import SPACE_MARKER
from fusejax.errors import UserError

# Texts on which tokenizers that should be the same tend to differ: spaces and their runs, line ends, digits, accents,
# characters outside the vocabulary.
PROBES = (
    "Hello world", " a", "  two  three", "a  b   c    d", " " * 7, "\n\nx\n", "\tdef f(x):\n        return x",
    "12345 678", "naïve café 😀", "日本語", "a\u00a0b", "e\u0301", "don't", "",
)  # fmt: skip

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # SentencePiece.Type
_ROLES = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}  # field of TrainerSpec, default id


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


class Model(NamedTuple):
    """What a SentencePiece model file says; roles: 'bos' ... → id."""

    pieces: list[Piece]
    kind: int
    byte_fallback: bool
    roles: dict[str, int]
    charsmap: bytes
    dummy_prefix: bool
    squeeze_spaces: bool


def read(path: Path) -> Model:
    """The model of a file; UserError where it is none, or of a kind that has no fast form."""
    try:
        fields = list(_fields(path.read_bytes()))
        pieces = [_piece(value) for number, value in fields if number == 1]
        trainer = dict(_fields(next((value for number, value in fields if number == 2), b"")))
        normalizer = dict(_fields(next((value for number, value in fields if number == 3), b"")))
    except (OSError, ValueError, IndexError, TypeError, struct.error) as error:
        raise UserError(f"{path}: is not a SentencePiece model that can be read ({error})") from None
    kind = trainer.get(3, _UNIGRAM)
    if not pieces or kind not in (_UNIGRAM, _BPE) or trainer.get(24, 0):
        raise UserError(f"{path}: only SentencePiece models of type unigram or BPE with prefix markers are supported")
    roles = {role: _signed(trainer.get(field, default)) for role, (field, default) in _ROLES.items()}
    return Model(
        pieces=pieces,
        kind=kind,
        byte_fallback=any(piece.kind == _BYTE for piece in pieces),
        roles={role: i for role, i in roles.items() if 0 <= i < len(pieces)},
        charsmap=normalizer.get(2, b""),
        dummy_prefix=bool(normalizer.get(3, 1)),
        squeeze_spaces=bool(normalizer.get(4, 1)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, int or bytes) of a protocol buffer message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = varint()
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire) if wire != 2 else varint()
        if size is None or at + size > len(data):
            raise ValueError(f"byte {at} makes no sense")
        yield number, data[at : at + size]
        at += size


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    return Piece(fields.get(1, b"").decode("utf-8"), score, fields.get(3, _NORMAL))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def backend(model: Model) -> Any:
    """A `tokenizers` backend that tokenizes as the SentencePiece model does."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    unknown = model.pieces[model.roles["unk"]].text if "unk" in model.roles else None
    core: Any
    if model.kind == _BPE:
        vocab = {piece.text: i for i, piece in enumerate(model.pieces)}
        core = models.BPE(
            vocab, _merges(model.pieces), unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback
        )
    else:
        scored = [(piece.text, piece.score) for piece in model.pieces]
        core = models.Unigram(scored, unk_id=model.roles.get("unk"), byte_fallback=model.byte_fallback)
    result = Tokenizer(core)
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.squeeze_spaces:
        # Spaces alone: SentencePiece keeps a text's first and last newlines.
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(SPACE_MARKER))
    result.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE_MARKER)])
    undone: list[Any] = [decoders.Replace(SPACE_MARKER, " "), decoders.ByteFallback(), decoders.Fuse()]
    result.decoder = decoders.Sequence([*undone, *([decoders.Strip(" ", 1, 0)] if model.dummy_prefix else [])])
    special = [piece.text for piece in model.pieces if piece.kind in (_UNKNOWN, _CONTROL)]
    result.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    whole = [piece.text for piece in model.pieces if piece.kind == _USER_DEFINED and SPACE_MARKER not in piece.text]
    result.add_tokens([AddedToken(text, normalized=False) for text in whole])
    return result


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, the best-scored piece first, then the first in the file."""
    usable = {piece.text for piece in pieces if piece.kind in (_NORMAL, _USER_DEFINED, _UNUSED)}
    order = {piece.text: i for i, piece in enumerate(pieces)}
    found = []
    for piece in pieces:
        if piece.kind in (_NORMAL, _USER_DEFINED):
            for cut in range(1, len(piece.text)):
                left, right = piece.text[:cut], piece.text[cut:]
                if left in usable and right in usable:
                    found.append((-piece.score, order[piece.text], order[left], order[right], (left, right)))
    return [merge for *_, merge in sorted(found)]


def _check(model: Model, built: Any, path: Path) -> None:
    """UserError where the backend's ids are not those of SentencePiece's own procedure on a probe (BPE)."""
    kinds = {piece.kind for piece in model.pieces}
    if model.kind != _BPE or model.charsmap or model.squeeze_spaces or kinds & {_USER_DEFINED, _UNUSED}:
        return  # the procedure below knows nothing of these
    for probe in PROBES:
        text = probe.replace(" ", SPACE_MARKER)
        wanted = _bpe(model, SPACE_MARKER + text if model.dummy_prefix and text else text)
        if built.encode(probe, add_special_tokens=False).ids != wanted:
            raise UserError(
                f"{path}: {probe!r} is not tokenized as SentencePiece does; save the model's tokenizer.json"
            )


def _bpe(model: Model, text: str) -> list[int]:
    """Ids of a text by SentencePiece's procedure: again and again the best-scored pair, the leftmost of equals."""
    scores = {piece.text: (piece.score, i) for i, piece in enumerate(model.pieces) if piece.kind == _NORMAL}
    symbols = list(text)
    while True:
        pairs = [(scores[a + b][0], -k) for k, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not pairs:
            break
        k = -max(pairs)[1]
        symbols[k : k + 2] = [symbols[k] + symbols[k + 1]]
    ids: list[int] = []
    bytes_at = {piece.text: i for i, piece in enumerate(model.pieces) if piece.kind == _BYTE}
    for symbol in symbols:
        if symbol in scores:
            ids.append(scores[symbol][1])
        elif model.byte_fallback:
            ids += [bytes_at[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        elif not ids or ids[-1] != model.roles["unk"]:  # SentencePiece joins unknown characters to one
            ids.append(model.roles["unk"])
    return ids


def load(path: Path, settings_path: Path | None) -> Any:
    """A transformers tokenizer from a `tokenizer.model` and, where there is one, its tokenizer_config.json."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    model = read(path)
    built = backend(model)
    _check(model, built, path)
    settings: dict[str, Any] = {}
    if settings_path is not None:
        try:
            settings = json.loads(settings_path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{settings_path}: cannot be read ({error})") from None
    roles = {f"{role}_token": model.pieces[i].text for role, i in model.roles.items()}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token:
            roles[key] = token
    added = sorted((int(i), token) for i, token in settings.get("added_tokens_decoder", {}).items())
    for _, token in added:
        if built.token_to_id(token["content"]) is None:
            built.add_tokens([AddedToken(token["content"], special=token.get("special", False), normalized=False)])
    bos = roles.get("bos_token")
    if bos and settings.get("add_bos_token", True):
        built.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, built.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=built, name_or_path=str(path.parent), **roles)
