"""From tokens that arrive one by one to text: characters that span tokens, ends and stop strings."""

import codecs
from collections.abc import Collection, Sequence


class TextStream:
    """The text of one row while its tokens arrive.

    canonical_bytes: per id the bytes of text that it stands for, None for special tokens, which show no text.
    ends: ids of tokens after which nothing comes. stop: strings; the text ends before the one that is complete first.
    """

    def __init__(
        self, canonical_bytes: Sequence[bytes | None], ends: Collection[int] = (), stop: Sequence[str] = ()
    ) -> None:
        self._bytes, self._ends, self._stop = canonical_bytes, ends, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # may be the beginning of a stop string
        self.text, self.done = "", False

    def push(self, token: int) -> str:
        """The new text that is sure to stay; nothing once `done`."""
        if self.done:
            return ""
        if token in self._ends:
            return self.close()
        piece = self._bytes[token] if token < len(self._bytes) else None
        return self._take(self._decoder.decode(piece or b""))

    def close(self) -> str:
        """What is left when no token comes any more; half a character shows as U+FFFD."""
        if self.done:
            return ""
        shown = self._take(self._decoder.decode(b"", final=True))
        if not self.done:
            rest, self._held, self.done = self._held, "", True
            self.text += rest
            shown += rest
        return shown

    def _take(self, new: str) -> str:
        """Add text; returns, and adds to `self.text`, what no stop string can begin in any more."""
        self._held += new
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            cut, self.done = min(found)[1], True
        else:
            cut = len(self._held) - max((_overlap(self._held, stop) for stop in self._stop), default=0)
        shown, self._held = self._held[:cut], self._held[cut:]
        self.text += shown
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
