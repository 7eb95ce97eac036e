"""From text to tokens and back, for prompts and for answers that name tokens."""

from __future__ import annotations

import asyncio
import codecs
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jinja2
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from flexmore_ray.errors import UsageError

_LONG = 20_000  # characters or tokens; what takes longer than some milliseconds goes to a thread
_THREADS = 2
T = TypeVar("T")


class Tokens:
    """A tokenizer that never cuts or pads, and does not hold up the event loop.

    Args:
        tokenizer: as it came with the model.
        vocab_size: token ids that the model knows; None means those of the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self.size = min(len(tokenizer), vocab_size or len(tokenizer))
        """Token ids go from 0 to this, exclusive."""
        self.longest = max(map(len, self._encoder.get_vocab()))
        """Characters that a token stands for, at most."""
        decoder = json.loads(self._encoder.to_str())["decoder"]
        self._bytes_are_letters = '"ByteLevel"' in json.dumps(decoder)
        self._added = set(self._encoder.get_added_tokens_decoder())
        self._threads = ThreadPoolExecutor(_THREADS, "tokens")
        self._cache: dict[int, bytes] = {}

    async def encode(self, texts: Sequence[str], *, special: bool = True) -> list[tuple[int, ...]]:
        """Token ids of each text.

        Args:
            texts: any number of them, of any length.
            special: whether to add the tokens that the tokenizer puts around a text.
        """
        return await self._do(functools.partial(self._encode, texts, special), sum(map(len, texts)))

    async def _do(self, work: Callable[[], T], size: int) -> T:
        """Do it here, or on a thread where it takes long."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work) if size > _LONG else work()

    def _encode(self, texts: Sequence[str], special: bool) -> list[tuple[int, ...]]:
        """One by one: what the encoder has to say of a token is a hundred times its id. A batch lets go of the GIL."""
        one = functools.partial(self._encoder.encode_batch_fast, add_special_tokens=special)
        return [tuple(one([text])[0].ids) for text in texts]

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        work = functools.partial(self._encoder.decode, list(ids), skip_special_tokens=False)
        return await self._do(work, len(ids))

    async def chat(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """Token ids of a conversation whose next turn is the assistant's.

        The tokenizer's chat template says how a conversation is written down. Where it has none, a turn
        is a line ``role: content``, and the last line is ``assistant:``, for the model to go on from.

        Raises:
            UsageError: the template refuses the conversation, as many do whose turns do not alternate.
        """
        templated = bool(self._tokenizer.chat_template)
        work = functools.partial(self._render, messages) if templated else functools.partial(plain_chat, messages)
        text = await self._do(work, sum(len(message["content"]) for message in messages))
        return (await self.encode([text], special=not templated))[0]

    def _render(self, messages: Sequence[dict[str, str]]) -> str:
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(f"the model's chat template refuses the conversation: {reason}") from error
        assert isinstance(text, str)
        return text

    def spelling(self, token_id: int) -> bytes:
        """The bytes that a token stands for, which need not be whole characters; none for an unknown id."""
        if token_id not in self._cache:
            self._cache[token_id] = self._find_bytes(token_id)
        return self._cache[token_id]

    def _find_bytes(self, token_id: int) -> bytes:
        token = self._encoder.id_to_token(token_id)
        if token is None:
            return b""
        if self._bytes_are_letters and token_id not in self._added:
            return bytes(_byte_letters()[letter] for letter in token)
        return self._encoder.decode([token_id], skip_special_tokens=False).encode()

    def name(self, token_id: int) -> str:
        r"""The text of one token, or ``bytes:\xe2\x80`` where it is not whole characters."""
        raw = self.spelling(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def offsets(self) -> Offsets:
        """A counter of characters, from 0."""
        return Offsets(self)

    @property
    def info(self) -> dict[str, Any]:
        """What a client needs to use the tokenizer from afar."""
        tokenizer = self._tokenizer
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": self.size,
            "eos_token": tokenizer.eos_token,
            "bos_token": tokenizer.bos_token,
            "pad_token": tokenizer.pad_token,
            "unk_token": tokenizer.unk_token,
            "chat_template": tokenizer.chat_template,
        }


class Offsets:
    """Where in their text tokens start, in characters, as they come.

    A token that starts within a character starts where the character does.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokens, self._next = tokens, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> list[int]:
        """Starts of the next tokens."""
        starts = []
        for token_id in token_ids:
            starts.append(self._next)
            self._next += len(self._decoder.decode(self._tokens.spelling(token_id)))
        return starts


def plain_chat(messages: Iterable[dict[str, str]]) -> str:
    """A conversation for a model without a chat template: a line ``role: content`` per turn, then ``assistant:``."""
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant:"


@functools.cache
def _byte_letters() -> dict[str, int]:
    """The letter that byte-level vocabularies write for each byte.

    A printable Latin-1 byte is its own letter; the others are, in order, the letters from U+0100 on.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(own)]
    return {chr(byte): byte for byte in own} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
