"""Hugging Face tokenizers with the two things alignment needs: canonical bytes and byte boundaries.

The *boundary* of a token is the byte offset in the text's UTF-8 where the token ends (see `Tokenizer.encode`).
"""

import json
import os
import weakref
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from fusejax import canonical, conversations, tokenizer_files
from fusejax.config import Config, ModelConfig
from fusejax.errors import UserError
from fusejax.outputs import fingerprint

_ROLES = ("bos", "eos", "pad", "unk")


class Tokenizer:
    """A tokenizer with a fast (`tokenizers`) backend.

    name: how messages call it. fingerprint: equal for tokenizers that do the same; text_fingerprint: for those that
    make the same tokens of every text, whatever they put around it. vocab_size: highest id + 1.
    roles: {"bos" | "eos" | "pad" | "unk": id}, for those that exist. adds_bos: whether it puts BOS before a text.
    canonical_bytes: per id the bytes of text that it stands for; None for special tokens and unused ids.

    hf: a tokenizer of transformers; its backend is changed, unless `copy`. split_special: whether '</s>' written in a
    text is text (True, right for documents) or the special token. bos: `never` to leave BOS out whatever hf does,
    `template` to read conversations by hf's chat template (`template`, else None; see `fusejax.conversations`).
    """

    def __init__(
        self, hf: Any, name: str = "", split_special: bool = True, copy: bool = True, bos: str = "auto"
    ) -> None:
        backend = getattr(hf, "backend_tokenizer", None)
        self.name = name or getattr(hf, "name_or_path", "") or type(hf).__name__
        if backend is None:
            raise UserError(f"{self.name}: its tokenizer has no fast form; save it with a tokenizer.json")
        serialized = backend.to_str()
        spec = json.loads(serialized)
        if spec["model"].get("dropout"):
            raise UserError(f"{self.name}: its tokenizer drops merges at random (model.dropout); set that to null")
        ids = {role: getattr(hf, f"{role}_token_id", None) for role in _ROLES}
        self.roles: dict[str, int] = {role: i for role, i in ids.items() if isinstance(i, int)}
        self.adds_bos = bos == "auto" and "bos" in self.roles and _puts_bos(hf, self.roles["bos"])
        self._spec: dict[str, Any] = spec
        self._backend = _backend(serialized if copy else backend, split_special)
        specials = canonical.special_ids(self._spec, {*self.roles.values(), *hf.all_special_ids})
        self.canonical_bytes: list[bytes | None] = canonical.canonical_bytes(self._spec, specials)
        if not any(self.canonical_bytes):
            raise UserError(f"{self.name}: its tokenizer has no tokens; save the whole of it (tokenizer.json) there")
        self.vocab_size = len(self.canonical_bytes)
        self.template: conversations.Template | None = None
        described = [spec[key] for key in ("model", "normalizer", "pre_tokenizer", "decoder", "added_tokens")]
        described += [sorted(specials), split_special]
        self.text_fingerprint: str = fingerprint(json.dumps(described).encode())
        self.fingerprint: str = fingerprint([self.text_fingerprint, self.roles, self.adds_bos])
        self._bytes = np.array([c or b"" for c in self.canonical_bytes], object)
        self.lengths = np.array([len(c or b"") for c in self.canonical_bytes], np.int32)
        """int32[vocab_size]: how many bytes each token stands for; 0 for special tokens."""
        if bos == "template":
            self._take_template(conversations.Template(hf, self.name))

    def _take_template(self, template: conversations.Template) -> None:
        """Read conversations by it: it writes BOS itself, and the token that ends its turns is EOS, to map by role."""
        self.template = template
        end = template.find_end(self)
        if end is not None:
            self.roles["eos"] = end
        self.fingerprint = fingerprint([self.text_fingerprint, self.roles, self.adds_bos, template.fingerprint])

    @classmethod
    def load(
        cls, model: str, revision: str | None = None, bos: str = "auto", split_special: bool = True
    ) -> "Tokenizer":
        """The tokenizer of a local folder or a hub name; UserError where there is none or the hub is out of reach."""
        split_special = split_special and bos != "template"  # a template writes special tokens
        return _loaded(model, revision, bos, split_special, tokenizer_files.stamps(model))

    @classmethod
    def of(cls, tokenizer: Any) -> "Tokenizer":
        """`tokenizer` itself, a folder's or hub name's, or a transformers one's with its way with specials in text."""
        if isinstance(tokenizer, cls):
            return tokenizer
        if isinstance(tokenizer, str | os.PathLike):
            return cls.load(os.fspath(tokenizer))
        if not callable(getattr(tokenizer, "encode", None)):
            kind = type(tokenizer).__name__
            raise TypeError(f"a tokenizer should be of fusejax or transformers, a folder or a hub name, not {kind}")
        known = _wrapped.get(tokenizer)
        if known is None or known[0] != len(tokenizer):
            split = bool(getattr(tokenizer, "split_special_tokens", False))
            known = _wrapped[tokenizer] = (len(tokenizer), cls(tokenizer, split_special=split))
        return known[1]

    @property
    def eos_id(self) -> int | None:
        return self.roles.get("eos")

    @property
    def bos_id(self) -> int | None:
        return self.roles.get("bos")

    @property
    def added(self) -> int:
        """Tokens that a document has beside its text's: EOS, and BOS where it is put before a text."""
        return int(self.adds_bos) + int(self.eos_id is not None)

    @property
    def pad_id(self) -> int | None:
        return self.roles.get("pad")

    def shown(self, i: int) -> str:
        """Token i for a reader: its text with spaces as '␣' and what cannot be printed escaped, or a special's name."""
        piece = self.canonical_bytes[i] if 0 <= i < self.vocab_size else None
        if piece is None:
            return str(self._backend.id_to_token(i) or f"<{i}>")
        return printable(piece)

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32[n], boundaries int32[n]) of a text, without special tokens.

        boundaries[t] = byte offset in the text's UTF-8 where token t ends; they never decrease, and the last one is
        the text's length. Where a tokenizer changes the text (normalizes, drops, has no token for it), all tokens
        of the changed stretch get the stretch's end. A token that stands for no text (a dummy prefix alone) ends
        where the one before it ends.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """`encode` of each text; the texts are spread over the machine's cores."""
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"{self.name}: a text should be a str, not {type(text).__name__}")
        try:
            utf8 = [text.encode("utf-8") for text in texts]
        except UnicodeEncodeError:
            raise UserError(f"{self.name}: a text holds half a surrogate pair, which UTF-8 cannot hold") from None
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        result = []
        for text, data, encoding in zip(texts, utf8, encodings, strict=True):
            ids = np.array(encoding.ids, np.int32)
            boundaries = self._boundaries(ids, data)
            if boundaries is None:
                slow = self._backend.encode(text, add_special_tokens=False)
                ids = np.array(slow.ids, np.int32)
                boundaries = self._boundaries_by_offsets(ids, text, data, slow.offsets)
            result.append((ids, boundaries))
        return result

    def spells(self, ids: np.ndarray, data: bytes) -> bool:
        """Whether the canonical bytes of `ids` are the text (its UTF-8 `data`), a dummy prefix aside."""
        return self._boundaries(ids, data) is not None

    def _boundaries(self, ids: np.ndarray, data: bytes) -> np.ndarray | None:
        """Boundaries from canonical bytes alone, None where these do not spell the text."""
        spelled = b"".join(self._bytes[ids].tolist())
        ends = np.cumsum(self.lengths[ids], dtype=np.int32)
        if spelled == data:
            return ends
        if len(spelled) == len(data) + 1 and spelled[:1] == b" " and spelled[1:] == data:
            return np.maximum(ends - 1, 0)  # the dummy prefix is no text
        return None

    def _boundaries_by_offsets(
        self, ids: np.ndarray, text: str, data: bytes, offsets: list[tuple[int, int]]
    ) -> np.ndarray:
        """Boundaries of a text that canonical bytes do not spell everywhere.

        Tokens are followed through the text as long as they spell it; from a token that does not, the stretch up
        to the next place where the backend's offsets show the end of a character is taken as one.
        """
        n = len(ids)
        if not n:
            return np.zeros(0, np.int32)
        byte_of = np.concatenate([[0], np.cumsum([len(character.encode()) for character in text])])
        starts = byte_of[[start for start, _ in offsets]].tolist()
        ends = np.maximum.accumulate(byte_of[[end for _, end in offsets]]).tolist()
        pieces = self._bytes[ids].tolist()
        if pieces[0][:1] == b" " and (data[:1] != b" " or self._prefixes_spaces):
            pieces[0] = pieces[0][1:]  # the dummy prefix
        result = np.zeros(n, np.int32)
        at = t = 0
        while t < n:
            stop = at + len(pieces[t])
            inside_character = t + 1 < n and starts[t + 1] < ends[t]
            # Offsets may leave out white space at a token's ends, and give a token that splits a character all of it.
            agrees = (ends[t] <= stop or inside_character) and not data[ends[t] : stop].strip()
            if agrees and self.canonical_bytes[ids[t]] is not None and data.startswith(pieces[t], at):
                at, result[t] = stop, stop
                t += 1
                continue
            last = t
            while last + 1 < n and starts[last + 1] < ends[last]:
                last += 1
            at = max(at, ends[last])
            if last + 1 < n and at < starts[last + 1]:
                # What lies before the next token but for white space was taken in by this one (a composed accent).
                at += len(data[at : starts[last + 1]].rstrip())
            result[t : last + 1] = at
            t = last + 1
        result[-1] = len(data)  # what the tokenizer dropped at the end belongs to its last token
        return result

    @cached_property
    def _mid_text(self) -> Any:
        return _backend(json.dumps(canonical.mid_text(self._spec)), split_special=True)

    @cached_property
    def surfaces(self) -> list[str | None]:
        """Per id its spelling in the vocabulary, spaces written '▁' whatever the tokenizer writes; see `canonical`."""
        return canonical.surfaces(self._spec)

    @cached_property
    def writes_dummy_prefix(self) -> bool:
        """Whether the first token of a text is marked as one that follows a space ('▁The' of 'The')."""
        ids, _ = self.encode("a")
        return bool(len(ids)) and (self.surfaces[ids[0]] or "").startswith(canonical.SPACE_MARKER)

    @cached_property
    def _prefixes_spaces(self) -> bool:
        """Whether a text that starts with a space gets a dummy prefix, too."""
        ids = self._backend.encode(" a", add_special_tokens=False).ids
        return b"".join(self._bytes[ids].tolist()).startswith(b"  ")

    @cached_property
    def _byte_ids(self) -> dict[int, int]:
        return {byte: i for i, byte in canonical.byte_tokens(self._spec).items()}

    @cached_property
    def ids_of_bytes(self) -> dict[bytes, int]:
        """Canonical bytes → id. Of several tokens with the same bytes, the one that the tokenizer uses."""
        single = set(self._byte_ids.values())
        found: dict[bytes, int] = {}
        several: dict[bytes, list[int]] = {}
        for i, piece in enumerate(self.canonical_bytes):
            if not piece or i in single:
                continue
            if piece in found:
                several.setdefault(piece, [found[piece]]).append(i)
            else:
                found[piece] = i
        for piece, (i, used) in zip(several, self._tokenize_mid_text(list(several)), strict=True):
            if used == 1 and i in several[piece]:
                found[piece] = i
        for i in sorted(single):
            found.setdefault(self.canonical_bytes[i], i)  # type: ignore[arg-type]
        return found

    def map_bytes(self, pieces: Sequence[bytes]) -> np.ndarray:
        """int32[len(pieces)]: the first token that these bytes become in the middle of a text; -1 where none does.

        Bytes that are a token are that token; bytes that are no text (parts of characters) are looked up byte-wise.
        """
        known = self.ids_of_bytes
        result = np.array([known.get(piece, -1) for piece in pieces], np.int32)
        unknown = [k for k in np.flatnonzero(result < 0).tolist() if pieces[k]]
        for k, (i, _) in zip(unknown, self._tokenize_mid_text([pieces[k] for k in unknown]), strict=True):
            result[k] = i
        return result

    def _tokenize_mid_text(self, pieces: Sequence[bytes]) -> list[tuple[int, int]]:
        """(first token or -1, number of tokens) of each, in the middle of a text."""
        result = [(-1, 0)] * len(pieces)
        texts: list[str] = []
        where: list[int] = []
        for k, piece in enumerate(pieces):
            text = piece.decode("utf-8", "ignore")
            if text.encode() == piece or (self._byte_ids and text and piece.startswith(text.encode())):
                texts.append(text)
                where.append(k)
            else:
                result[k] = self._tokenize_bytes(piece)
        for k, encoding in zip(where, self._mid_text.encode_batch_fast(texts, add_special_tokens=False), strict=True):
            ids = encoding.ids
            if ids and self.canonical_bytes[ids[0]] is not None:
                result[k] = ids[0], len(ids)
        return result

    def _tokenize_bytes(self, piece: bytes) -> tuple[int, int]:
        """Bytes that begin or end inside a character."""
        if canonical.is_byte_level(self._spec):
            tokens = self._mid_text.model.tokenize("".join(map(canonical.CHARACTER_OF_BYTE.__getitem__, piece)))
            return (tokens[0].id, len(tokens)) if tokens else (-1, 0)
        return self._byte_ids.get(piece[0], -1), len(piece)


def printable(piece: bytes) -> str:
    """Bytes of text on one line: spaces as '␣', controls and parts of characters escaped.

    >>> printable(b" a\n")
    '␣a\\\\n'
    """
    text = piece.decode("utf-8", "backslashreplace").replace(" ", "␣")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def for_model(model: ModelConfig) -> Tokenizer:
    """The tokenizer of a model of the configuration."""
    return Tokenizer.load(model.model, model.revision, model.bos)


def for_config(config: Config) -> dict[str, Tokenizer]:
    """Model name → tokenizer of the target and of every source; models with equal tokenizers share one object."""
    shared: dict[str, Tokenizer] = {}
    result = {}
    for model in (config.target, *config.sources):
        tokenizer = for_model(model)
        result[model.model] = shared.setdefault(tokenizer.fingerprint, tokenizer)
    return result


_wrapped: "weakref.WeakKeyDictionary[Any, tuple[int, Tokenizer]]" = weakref.WeakKeyDictionary()


def _backend(made_from: Any, split_special: bool) -> Any:
    """A backend, from its serialized form or as it is, that encodes all of a text."""
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(made_from) if isinstance(made_from, str) else made_from
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = split_special
    return backend


@lru_cache(maxsize=16)  # every stage asks for the same few
def _loaded(
    model: str, revision: str | None, bos: str, split_special: bool, files: tuple[tuple[str, int, int], ...]
) -> Tokenizer:
    hf = tokenizer_files.load(model, revision)
    return Tokenizer(hf, name=model, split_special=split_special, copy=False, bos=bos)


def _puts_bos(hf: Any, bos_id: int) -> bool:
    with_specials, without = hf("a").input_ids, hf("a", add_special_tokens=False).input_ids
    return len(with_specials) > len(without) and with_specials[0] == bos_id
