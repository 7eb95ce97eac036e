"""From tokens to text, piece by piece: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one sequence as its tokens come.

    Args:
        tokenizer: turns ids into text; special tokens have none.
        stop: the text ends before the first of these.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._longest = max(map(len, stop), default=0)
        self._ends: list[int] = []  # length of the text after each token
        self._undecoded: list[int] = []  # tokens that are no whole character yet
        self._sent_text = self._sent_tokens = 0
        self.text = ""
        """All of it so far, cut at a stop string."""
        self.stopped = False
        """Whether a stop string came; tokens pushed after it are left out."""

    def push(self, token_ids: Iterable[int]) -> None:
        """Add tokens."""
        for token_id in token_ids:
            if self.stopped:
                return
            piece = self._decoder.step(self._tokenizer, token_id)
            self._undecoded = [*self._undecoded, token_id] if piece is None else []
            self._add(piece or "")
            self._ends.append(len(self.text))

    def _add(self, piece: str) -> None:
        self.text += piece
        start = max(0, len(self.text) - len(piece) - self._longest + 1)
        found = [place for stop in self._stop if (place := self.text.find(stop, start)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def take(self, *, last: bool) -> tuple[str, int]:
        """What has not been taken yet: text, and the number of tokens that it comes from.

        Args:
            last: whether no more tokens come; else what may be the start of a stop string is held back.
        """
        if last and self._undecoded and not self.stopped:  # what is left of a character is shown as such
            self._add(self._tokenizer.decode(self._undecoded, skip_special_tokens=True))
            self._undecoded = []
        end = len(self.text) if last or self.stopped else len(self.text) - self._start_of_stop()
        text = self.text[self._sent_text : end]
        before = self._sent_tokens
        while self._sent_tokens < len(self._ends) and self._is_out(self._sent_tokens, end):
            self._sent_tokens += 1
        self._sent_text = end
        return text, self._sent_tokens - before

    def _is_out(self, token: int, end: int) -> bool:
        """Whether a token's text is part of the first `end` characters."""
        if self.stopped:  # a token whose text was cut away whole goes with it
            return (self._ends[token - 1] if token else 0) < end
        return self._ends[token] <= end

    def _start_of_stop(self) -> int:
        """Length of the longest end of the text that a stop string starts with."""
        for length in range(min(self._longest - 1, len(self.text)), 0, -1):
            tail = self.text[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0
