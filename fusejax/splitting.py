"""Long documents in parts that fit every tokenizer."""

import unicodedata
from collections.abc import Sequence

from fusejax.errors import UserError
from fusejax.tokenizers import Tokenizer

_JOINERS = {"\u200d"}  # zero-width joiner: binds what stands on both of its sides


def room(tokenizer: Tokenizer, max_tokens: int) -> int:
    """Text tokens that fit beside EOS, and BOS where the tokenizer adds one."""
    return max_tokens - 1 - int(tokenizer.adds_bos)


def fits(text: str, tokenizers: Sequence[Tokenizer], max_tokens: int) -> bool:
    return all(len(tokenizer.encode(text)[0]) <= room(tokenizer, max_tokens) for tokenizer in tokenizers)


def split_text(text: str, tokenizers: Sequence[Tokenizer], max_tokens: int) -> list[str]:
    """Parts of at most `max_tokens` tokens in every tokenizer, special tokens included; joined they are the text.

    A part ends after a line where one ends in its last half, else after white space there, else wherever no
    character, letter with its marks, emoji sequence or CRLF is cut. Takes time linear in the text's length.
    """
    parts, start, window = [], 0, 4 * max_tokens
    while start < len(text):
        piece = text[start : start + window]
        last = start + window >= len(text)
        end = _longest(piece, tokenizers, max_tokens, last)
        if end is None:  # the window is too small to see where the part must end
            window *= 2
            continue
        parts.append(piece[:end])
        start += end
        window = max(64, end + end // 3)
    return parts


def _longest(piece: str, tokenizers: Sequence[Tokenizer], max_tokens: int, last: bool) -> int | None:
    """How many characters of `piece` make the next part; None where all of it would fit and more text follows."""
    data = piece.encode("utf-8")
    limit, too_long = len(data), False
    for tokenizer in tokenizers:
        ids, boundaries = tokenizer.encode(piece)
        most = room(tokenizer, max_tokens)
        if len(ids) > most:
            too_long = True
            limit = min(limit, int(boundaries[most - 1]) if most > 0 else 0)
    if not too_long:
        return len(piece) if last else None
    # A stretch that a tokenizer changes can end at the limit although its tokens do not fit.
    end = len(data[: min(limit, len(data) - 1)].decode("utf-8", "ignore"))
    while end > 0:
        end = _good_cut(piece, end)
        # A part is tokenized on its own in training, which may take more tokens than inside the text.
        if end > 0 and fits(piece[:end], tokenizers, max_tokens):
            return end
        end -= max(1, end // 20)
    raise UserError(
        f"max_length {max_tokens} is too small: not even one character ({piece[:1]!r}) of the text fits every tokenizer"
    )


def _good_cut(text: str, most: int) -> int:
    """The best end of a part of `text` with at most `most` characters."""
    line = text.rfind("\n", most // 2, most) + 1
    if line > 0:
        return line
    for end in range(most, most // 2, -1):
        if text[end - 1].isspace() and not text[end : end + 1].isspace() and _may_cut(text, end):
            return end
    end = most
    while end > 1 and not _may_cut(text, end):
        end -= 1
    return end if _may_cut(text, end) else most


def _may_cut(text: str, at: int) -> bool:
    """Whether what a reader sees as one character does not go over position `at`."""
    if not 0 < at < len(text):
        return True
    before, after = text[at - 1], text[at]
    if (before, after) == ("\r", "\n") or before in _JOINERS or after in _JOINERS:
        return False
    if unicodedata.category(after) in ("Mn", "Mc", "Me") or "\U0001f3fb" <= after <= "\U0001f3ff":
        return False  # marks belong to the letter before them, skin tones to the emoji
    if _is_regional(before) and _is_regional(after):
        run = 0  # flags are pairs of regional indicators
        while run < at and _is_regional(text[at - 1 - run]):
            run += 1
        return run % 2 == 0
    return True


def _is_regional(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"
