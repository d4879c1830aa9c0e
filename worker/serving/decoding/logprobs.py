"""Log-probabilities of tokens: from the model's logits, and in the two forms of OpenAI's API.

They are of the model's own distribution: temperature, top-p and the like, and a form that constrains the answer, change
what is drawn but not what is reported. vLLM calls these raw_logprobs.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

LEAST = -9999.0
"""Replaces minus infinity, which JSON does not have. vLLM's number."""


class TokenLogprob(NamedTuple):
    """A token, and its probability according to the model at its position."""

    token: int
    logprob: float | None  # None: nothing precedes it
    top: Sequence[tuple[int, float]] = ()  # the likeliest tokens at the position, likeliest first


def score(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """From logits of shape (positions, vocabulary) and the token at each position. Raises ValueError if the logits are
    not numbers."""
    total = logits.logsumexp(-1, keepdim=True)
    if not bool(total.isfinite().all()):
        raise ValueError("the model's logits are not all numbers")
    own = logits.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])
    best = logits.topk(min(top, logits.shape[-1]), -1)
    # one sum for both: the likeliest token has the same value in both lists
    own, values = ((each - total).clamp(min=LEAST).tolist() for each in (own, best.values))
    return [
        TokenLogprob(token, logprob, tuple(zip(likeliest, logprobs, strict=True)))
        for token, (logprob,), likeliest, logprobs in zip(tokens, own, best.indices.tolist(), values, strict=True)
    ]


class TokenText(NamedTuple):
    """A token as bytes, and as text; if its bytes alone are no characters, `bytes:` and their numbers."""

    text: str
    raw: bytes


class TokenTexts:
    """The tokens of a tokenizer as they appear within a text. Any thread may use it."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._byte_of = {sign: byte for byte, sign in bytes_to_unicode().items()}
        # after another token, since some tokenizers omit the space of a text's first token
        self._before = tokenizer("a", add_special_tokens=False).input_ids[-1:]
        self._known: dict[int, TokenText] = {}

    def __getitem__(self, token: int) -> TokenText:
        if token not in self._known:
            raw = self._raw(token)
            try:
                text = raw.decode()
            except UnicodeDecodeError:
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
            self._known[token] = TokenText(text, raw)
        return self._known[token]

    def special(self, token: int) -> bool:
        """Whether it is one of the tokenizer's own special tokens, which an answer's text omits."""
        return token in self._special

    def _raw(self, token: int) -> bytes:
        text = self._decode([*self._before, token])[len(self._decode(self._before)) :]
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return text.encode()
        piece = self._tokenizer.convert_ids_to_tokens(token) or ""
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(byte[1])
        if all(sign in self._byte_of for sign in piece):
            return bytes(self._byte_of[sign] for sign in piece)
        return text.encode()

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return text


def chat_form(scored: Sequence[TokenLogprob], texts: TokenTexts) -> dict[str, Any]:
    """choices[].logprobs of a chat completion."""

    def said(token: int, logprob: float | None) -> dict[str, Any]:
        word = texts[token]
        return {"token": word.text, "bytes": list(word.raw), "logprob": logprob}

    content = [
        {**said(one.token, one.logprob), "top_logprobs": [said(*likely) for likely in one.top]} for one in scored
    ]
    return {"content": content, "refusal": None}


class TextForm:
    """choices[].logprobs of a completion, in parts: each token's offset in the choice's text continues."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span several tokens
        self._place = 0

    def part(self, scored: Sequence[TokenLogprob], text: str) -> dict[str, Any]:
        """`text`: the choice's, from its beginning."""
        return {
            "tokens": [self._texts[one.token].text for one in scored],
            "token_logprobs": [one.logprob for one in scored],
            "top_logprobs": [self._top(one) for one in scored],
            "text_offset": list(self._offsets(scored, text)),
        }

    def _top(self, one: TokenLogprob) -> dict[str, float] | None:
        """The likeliest tokens and the token itself, by text: of several with the same text, the likeliest."""
        if one.logprob is None:
            return None
        found: dict[str, float] = {}
        for token, logprob in (*one.top, (one.token, one.logprob)):
            found.setdefault(self._texts[token].text, logprob)
        return found

    def _offsets(self, scored: Sequence[TokenLogprob], text: str) -> Iterator[int]:
        for one in scored:
            word, raw = self._texts[one.token]
            if raw and raw[0] >> 6 != 0b10:  # no continuation byte: what came before is no character
                self._place += len(self._decoder.decode(b"", final=True))
            yield self._place
            if self._texts.special(one.token) and not text.startswith(word, self._place):
                continue
            if self._place == 0 and raw.startswith(b" ") and not text.startswith(" "):
                raw = raw[1:]
            self._place += len(self._decoder.decode(raw))
