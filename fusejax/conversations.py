"""Conversations: read, written by each model's own chat template, and where in its tokens the assistant speaks.

Templates differ, and so do their special tokens; what two models' rows have in common is the text of the assistant's
turns. So the *text* of a conversation is that: the contents of its assistant's messages, one after another. In the
tokens of any model, boundaries are byte offsets in it, and a token of a template or of another's turn ends where the
assistant has stopped so far. Rows are aligned, losses taken and bytes counted inside the turns.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from fusejax.errors import UserError

Message = dict[str, str]  # role, content

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # other spellings, in records of {from, value}
_PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class Turn(NamedTuple):
    """Where the assistant speaks in a model's tokens.

    first, end: its tokens are first .. end − 1; they may hold white space of the template besides. stop: token stop − 1
    is the template's token that ends the turn, or stop = end where it has none there. low, high: bytes of the text.
    """

    first: int
    end: int
    stop: int
    low: int
    high: int


def read(value: Any, where: str) -> list[Message]:
    """The messages of a record, {role, content} or {from, value} each, contents stripped as templates strip them.

    Raises UserError where it is no conversation, and where the assistant says nothing in it.
    """
    value = list(value) if isinstance(value, tuple | np.ndarray) else value
    if not isinstance(value, list) or not value:
        raise UserError(f'{where}: a conversation should be a list of messages such as {{"role": ..., "content": ...}}')
    messages = []
    for number, item in enumerate(value):
        role, content = (
            (item.get("role", item.get("from")), item.get("content", item.get("value")))
            if isinstance(item, dict)
            else (None, None)
        )
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f"{where}: message {number} should have a text `role` and a text `content`")
        content = content.strip()
        if not content:
            raise UserError(f"{where}: message {number} is empty")
        messages.append({"role": _ROLES.get(role, role), "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{where}: no message is the assistant's")
    return messages


def spoken(messages: Sequence[Message]) -> str:
    """The text of a conversation: what the assistant says."""
    return "".join(message["content"] for message in messages if message["role"] == "assistant")


def dump(messages: Sequence[Message]) -> str:
    """As JSON, the same for the same messages."""
    return json.dumps(messages, ensure_ascii=False)


def load(text: str) -> list[Message]:
    """What `dump` was given."""
    return json.loads(text)


def openings(messages: Sequence[Message]) -> list[list[Message]]:
    """Every beginning of a conversation that ends with the assistant, the longest first."""
    stops = [n for n, message in enumerate(messages, 1) if message["role"] == "assistant"]
    return [list(messages[:n]) for n in reversed(stops)]


def opening(conversation: str, text: str) -> str:
    """The beginning of a conversation (both as `dump` gives it) in which the assistant says `text`."""
    return next(dump(messages) for messages in openings(load(conversation)) if spoken(messages) == text)


class Template:
    """A model's chat template, and its token that ends a turn.

    fingerprint: of what it writes. end: the id of that token, None where it ends turns without one; see `find_end`.
    """

    def __init__(self, hf: Any, name: str) -> None:
        self._hf, self._name = hf, name
        if not getattr(hf, "chat_template", None):
            raise UserError(f"{name}: its tokenizer has no chat template; put chat_template.jinja into its folder")
        self.fingerprint: str = json.dumps(hf.chat_template)
        self.end: int | None = None

    def pieces(self, messages: Sequence[Message], where: str = "a conversation") -> list[str]:
        """What stands before, between and after the assistant's turns; the template's text is theirs put together.

        Raises UserError where the template refuses the conversation, or changes what the assistant says.
        """
        marks = iter(range(len(messages)))
        marked = [m | {"content": f"\ue000{next(marks)}\ue001"} if m["role"] == "assistant" else m for m in messages]
        names = [m["content"] for m in marked if m["role"] == "assistant"]
        rest, found = self.write(marked, where), []
        for name in names:
            before, mark, rest = rest.partition(name)
            found.append(before)
            if not mark:
                raise UserError(f"{self._name}: its chat template leaves out a turn of the assistant in {where}")
        found.append(rest)
        contents = [m["content"] for m in messages if m["role"] == "assistant"]
        if "".join(part for pair in zip(found, [*contents, ""], strict=True) for part in pair) != self.write(
            messages, where
        ):
            raise UserError(f"{self._name}: its chat template changes what the assistant says in {where}")
        return found

    def write(self, messages: Sequence[Message], where: str = "a conversation") -> str:
        """The conversation as the model reads it."""
        try:
            return self._hf.apply_chat_template(list(messages), tokenize=False)
        except Exception as error:  # whatever a template raises, it is a program of the model's
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{self._name}: its chat template refuses {where} ({reason})") from None

    def find_end(self, tokenizer: Any) -> int | None:
        """Set `end`: the first special token after what the assistant says. tokenizer: one that splits none."""
        _, after = self.pieces(_PROBE)
        ids, _ = tokenizer.encode(after)
        self.end = next((int(i) for i in ids if tokenizer.canonical_bytes[i] is None), None)
        return self.end


def encode(tokenizer: Any, messages: Sequence[Message], where: str = "a conversation") -> dict[str, np.ndarray]:
    """A conversation in a model's tokens: ids int32 [n], boundaries int32 [n] in its text, turns int32 [turns, 5].

    tokenizer: a `fusejax.tokenizers.Tokenizer` with a template.
    """
    pieces = tokenizer.template.pieces(messages, where)
    contents = [m["content"] for m in messages if m["role"] == "assistant"]
    sizes = [len(part.encode()) for pair in zip(pieces, [*contents, ""], strict=True) for part in pair]
    edges_E = np.concatenate([[0], np.cumsum(sizes)])
    whole = "".join(part for pair in zip(pieces, [*contents, ""], strict=True) for part in pair)
    ids, ends_T = tokenizer.encode(whole)
    starts, stops = edges_E[1:-2:2], edges_E[2:-1:2]
    turns, low = [], 0
    for number, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        first = int(np.searchsorted(ends_T, start, side="right"))
        end = int(np.searchsorted(ends_T, stop, side="left")) + 1
        later = starts[number + 1] if number + 1 < len(starts) else len(whole.encode())
        last = int(np.searchsorted(ends_T, later, side="right"))
        closing = np.flatnonzero(ids[end:last] == (-1 if tokenizer.template.end is None else tokenizer.template.end))
        if first == 0:
            raise UserError(
                f"{tokenizer.name}: its chat template writes nothing before the assistant's turn in {where}"
            )
        turns.append(Turn(first, end, end + int(closing[0]) + 1 if len(closing) else end, low, low + stop - start))
        low += stop - start
    for one, next_one in pairwise(turns):
        if one.stop > next_one.first:
            raise UserError(f"{tokenizer.name}: one token holds parts of two turns of the assistant in {where}")
    inside = np.clip(ends_T[:, None] - starts[None], 0, (stops - starts)[None]).sum(1)
    return {"ids": ids, "boundaries": inside.astype(np.int32), "turns": np.array(turns, np.int32)}


def turns_of(record: Any) -> list[Turn]:
    """The turns of a record of tokens; none for a document that is no conversation."""
    return [Turn(*turn) for turn in np.asarray(record["turns"]).tolist()] if "turns" in record else []


def text_tokens(record: Any) -> np.ndarray | None:
    """bool [n]: the tokens that hold the conversation's text; None for a document that is no conversation."""
    if "turns" not in record:
        return None
    inside = np.zeros(len(record["ids"]), bool)
    for turn in turns_of(record):
        inside[turn.first : turn.end] = True
    return inside


def text_ce(ce_R: np.ndarray, record: Any) -> np.ndarray:
    """The cross-entropies of rows (row t is of token t + 1), of conversations 0 where that is no text of theirs."""
    inside = text_tokens(record)
    return ce_R if inside is None else np.where(np.append(inside[1:], False), ce_R, 0.0).astype(ce_R.dtype)


def spoken_labels(labels_T: np.ndarray, record: Any) -> np.ndarray:
    """Row t's next token, −1 where that is neither what the assistant says nor what ends its turn."""
    if "turns" not in record:
        return labels_T
    result = np.full_like(labels_T, -1)
    for turn in turns_of(record):
        rows = slice(turn.first - 1, turn.stop - 1)
        result[rows] = labels_T[rows]
    return result
