"""Rows that write: what was drawn of each, and where it ends."""

from __future__ import annotations

from mmllm.inference.engine.requests import FinishReason, TextRequest, TextResult, TextUpdate
from mmllm.inference.engine.sampling import RowSampler, TextRules
from mmllm.inference.engine.speculation import Accepted
from mmllm.inference.engine.text_stream import TextStream
from mmllm_tokenizers.folder import TokenizerFolder


class TextRow:
    """One row that writes.

    Args:
        request: what is asked for.
        rules: of its tokenizer.
        tokenizer: of the model.
        is_streamed: its text is told while it is written.

    Raises:
        ValueError: the request names ids that there aren't.
    """

    def __init__(self, request: TextRequest, rules: TextRules, tokenizer: TokenizerFolder, is_streamed: bool) -> None:
        self.request = request
        self.sampler = RowSampler(request, rules)
        self.prompt_logprobs: list[float | None] = [None] * request.prompt.num_tokens
        self._tokenizer = tokenizer
        self._is_streamed = is_streamed
        self._stream = TextStream(tokenizer, request.stop) if is_streamed or request.stop else None
        self._logprobs: list[float] = []
        self._top_logprobs: list[dict[int, float]] = []
        self._finish: FinishReason | None = None
        self._num_told = 0
        self._text_told = 0
        self._new_text: list[str] = []

    @property
    def num_new(self) -> int:
        """Ids that were drawn, an end included."""
        return len(self.sampler.ids)

    @property
    def next_id(self) -> int:
        """The id that the next position holds."""
        return self.sampler.ids[-1]

    def take(self, token_id: int, logprob: float | None, top_logprobs: dict[int, float] | None) -> bool:
        """Appends an id that was drawn; whether the row goes on."""
        self.sampler.accept(token_id)
        return self._note(len(self.sampler.ids), logprob, top_logprobs)

    def take_accepted(self, accepted: Accepted) -> bool:
        """As `take`, of several ids that the sampler has accepted; what lies behind the text's end is dropped."""
        first = len(self.sampler.ids) - len(accepted.ids)
        rest = zip(accepted.logprobs, accepted.top_logprobs, strict=True)
        for count, (logprob, top_logprobs) in enumerate(rest, start=first + 1):
            if not self._note(count, logprob, top_logprobs):
                del self.sampler.ids[count:]
                return False
        return True

    def _note(self, count: int, logprob: float | None, top_logprobs: dict[int, float] | None) -> bool:
        """Takes in the id that is the text's `count`-th; whether the row goes on."""
        sampler, request = self.sampler, self.request
        token_id = sampler.ids[count - 1]
        if logprob is not None:
            self._logprobs.append(logprob)
        if top_logprobs is not None:
            self._top_logprobs.append(top_logprobs)
        if sampler.is_end(token_id):
            self._finish = "stop"
        elif self._stream is not None:
            self._new_text.append(self._stream.push([token_id]))
            if self._stream.stopped is not None:
                self._finish = "stop"
        if self._finish is None and count >= request.max_new_tokens:
            self._finish = "length"
        if self._finish is not None and self._stream is not None:
            self._new_text.append(self._stream.finish())
        return self._finish is None

    def stop_at_length(self) -> None:
        """Ends the row where it is: there is no room for more."""
        self._finish = "length"
        if self._stream is not None:
            self._new_text.append(self._stream.finish())

    def update(self) -> TextUpdate | None:
        """What is new since the last one; None: nothing."""
        ids = self._ids()
        new_ids, text = ids[self._num_told :], "".join(self._new_text)
        if not new_ids and not text:
            return None
        self._new_text.clear()
        here = slice(self._num_told, len(ids))
        self._num_told = len(ids)
        if self.request.num_logprobs is None:
            return TextUpdate(text, new_ids)
        return TextUpdate(text, new_ids, tuple(self._logprobs[here]), tuple(self._top_logprobs[here]))

    def result(self, is_cancelled: bool) -> TextResult:
        """What was written."""
        ids = self._ids()
        stop = None if self._stream is None else self._stream.stopped
        if self._stream is not None and self._finish is None and not self._is_streamed:
            self._stream.finish()  # else what is held back was never told
        text = self._tokenizer.text.decode(list(ids)) if self._stream is None else self._stream.text
        has_logprobs = self.request.num_logprobs is not None
        return TextResult(
            ids,
            text,
            "cancelled" if is_cancelled or self._finish is None else self._finish,
            tuple(self._logprobs) if has_logprobs else None,
            tuple(self._top_logprobs) if has_logprobs else None,
            tuple(self.prompt_logprobs) if self.request.prompt_logprobs else None,
            stop,
            self.sampler.ids[-1] if len(ids) < len(self.sampler.ids) else None,
        )

    def _ids(self) -> tuple[int, ...]:
        """Without the end."""
        ids = self.sampler.ids
        if ids and self.sampler.is_end(ids[-1]):
            ids = ids[:-1]
        return tuple(ids)
