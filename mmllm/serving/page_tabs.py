"""What is on the page: its tabs, and what happens when they are used.

Shown and hidden parts, sounds and menus are Gradio's; what it can't draw is HTML of `mmllm.serving.page_looking`.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from mmllm.evaluation.answer_traces import AnswerTrace
from mmllm.inference.inputs import ImagePart
from mmllm.serving.page_answers import (
    MAX_CHARACTERS,
    MAX_MESSAGES,
    MAX_SENTENCES,
    Answer,
    Asker,
    Conversation,
    MessagePart,
    Spoken,
    message_parts,
    sentences,
)
from mmllm.serving.page_looking import (
    layer_names,
    speech_html,
    speech_traces_html,
    tokens_html,
    trace_html,
    transcript_html,
    wav_bytes,
)

KEPT_SECONDS = 3600
"""How long uploads, and what was answered last, stay where they are."""
_OWN_VOICE = "the model's choice"
_logger = logging.getLogger(__name__)


@dataclass
class Page:
    """The page's parts, and what happens when they are used."""

    gradio: Any
    askers: list[Asker]
    folder: Path

    @property
    def asker(self) -> Asker:
        """Who answers where nothing is compared."""
        return self.askers[0]

    def draw(self) -> Any:
        """The whole page."""
        gradio = self.gradio
        with gradio.Blocks(
            title=f"mmllm · {self.asker.name}", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)
        ) as blocks:
            gradio.HTML(self._head())
            self.last = gradio.State(None, time_to_live=KEPT_SECONDS)
            with gradio.Tabs():
                if self.asker.sees:
                    self._caption_tab()
                if self.asker.hears:
                    self._transcribe_tab()
                if self.asker.speaks:
                    self._speak_tab()
                self._chat_tab()
                if len(self.askers) > 1:
                    self._compare_tab()
            self._trace_part()
        return blocks

    def _head(self) -> str:
        can = {"sees": self.asker.sees, "hears": self.asker.hears, "speaks": self.asker.speaks}
        senses = [name for name, has in can.items() if has] or ["reads", "writes"]
        millions = self.asker.model.model.num_parameters() / 1e6
        names = " and ".join(asker.name for asker in self.askers)
        what = f"{', '.join(senses)} · {millions:.1f} M parameters · all of it on this machine"
        return f'<div class="mm-head"><h1>{escape(names)}</h1><p>{what}</p></div>'

    def _caption_tab(self) -> None:
        gradio = self.gradio
        with gradio.Tab("Caption"), gradio.Row():
            with gradio.Column():
                image = gradio.Image(
                    label="Picture", sources=["upload", "webcam", "clipboard"], type="filepath", image_mode=None,
                    height=300, buttons=["fullscreen"], elem_id="caption-picture",
                )  # fmt: skip
            with gradio.Column():
                caption = gradio.Textbox(label="Caption", lines=3, buttons=["copy"], elem_id="caption-text")
                note = gradio.HTML("", elem_classes="mm-note")
        outputs = [caption, note, self.last]
        image.input(self._told(self._caption), image, outputs, **_EVENT)

    def _caption(self, path: str | None) -> tuple[str, str, Answer | None]:
        if path is None:
            return "", "", None
        answer = self.asker.caption(path)
        return answer.text, _cost(answer), answer

    def _transcribe_tab(self) -> None:
        gradio = self.gradio
        with gradio.Tab("Transcribe"), gradio.Row():
            with gradio.Column():
                sound = gradio.Audio(
                    label="Sound", sources=["upload", "microphone"], type="filepath", buttons=[], elem_id="heard-sound"
                )
            with gradio.Column():
                transcript = gradio.HTML("", elem_id="heard-text", min_height=120)
                note = gradio.HTML("", elem_classes="mm-note")
        sound.input(self._told(self._transcribe), sound, [transcript, note, self.last], **_EVENT)

    def _transcribe(self, path: str | None) -> tuple[str, str, Answer | None]:
        if path is None:
            return "", "", None
        transcript, answer = self.asker.transcribe(path)
        return transcript_html(transcript, f"gradio_api/file={path}"), _cost(answer), answer

    def _speak_tab(self) -> None:
        gradio, asker = self.gradio, self.asker
        with gradio.Tab("Speak"), gradio.Row():
            with gradio.Column():
                text = gradio.Textbox(
                    label="Text",
                    lines=4,
                    max_length=MAX_CHARACTERS,
                    placeholder="What is to be said",
                    elem_id="say-text",
                )
                voices = [_OWN_VOICE, *asker.voices]
                voice = gradio.Dropdown(voices, value=_OWN_VOICE, label="Voice", visible=len(voices) > 1)
                rate = gradio.Slider(
                    0.5,
                    2.0,
                    value=1.0,
                    step=0.05,
                    label="Rate",
                    info="1: as it speaks by itself",
                    visible=asker.has_pace,
                )
                say = gradio.Button("Speak", variant="primary", elem_id="say")
            with gradio.Column():
                slots = [
                    gradio.HTML(
                        "", visible=number == 0, elem_id=f"said-{number}", min_height=100 if not number else None
                    )
                    for number in range(MAX_SENTENCES)
                ]
                whole = gradio.Audio(
                    label="All of it", interactive=False, visible=False, buttons=["download"], elem_id="said-whole"
                )
        gradio.on(
            [say.click, text.submit], self._told(self._speak), [text, voice, rate], [*slots, whole, self.last], **_EVENT
        )

    def _speak(self, text: str, voice: str, rate: float) -> Iterator[list[Any]]:
        """Sentence by sentence; all so far are given each time: of what comes fast, Gradio shows the last alone."""
        gradio, said, htmls = self.gradio, [], []
        whole = gradio.Audio(None, visible=False)
        yield [*self._slots(htmls), whole, gradio.skip()]
        count = len(sentences(text or ""))
        for spoken in self.asker.speak(text or "", None if voice == _OWN_VOICE else voice, rate):
            said.append(spoken)
            htmls.append(speech_html(spoken.text, spoken.waveform, len(said) < count))
            answer: Any = gradio.skip()
            if len(said) == count:
                answer = Answer(text, self.asker, spoken=tuple(said))
                whole = gradio.Audio(self._wav(said), visible=True) if count > 1 else whole
            yield [*self._slots(htmls), whole, answer]

    def _slots(self, htmls: Sequence[str]) -> list[Any]:
        """What each place for a sentence shows."""
        filled = [self.gradio.HTML(html, visible=True) for html in htmls]
        rest = range(len(htmls), MAX_SENTENCES)
        return [*filled, *(self.gradio.HTML("", visible=number == 0) for number in rest)]

    def _chat_tab(self) -> None:
        gradio, asker = self.gradio, self.asker
        with gradio.Tab("Chat"):
            before = gradio.State(Conversation(), time_to_live=KEPT_SECONDS)
            bot = gradio.Chatbot(
                height=380, buttons=["copy"], render_markdown=False, feedback_options=None, label="Conversation",
                placeholder=_chat_hint(asker), elem_id="chat", allow_tags=False,
            )  # fmt: skip
            kinds = [kind for kind, has in (("image", asker.sees), ("audio", asker.hears)) if has]
            message = gradio.MultimodalTextbox(
                file_types=kinds, file_count="multiple", sources=["upload", *(["microphone"] if asker.hears else [])],
                show_label=False, placeholder="Message, pictures, sounds", max_plain_text_length=4000, max_lines=6,
                elem_id="chat-message",
            )  # fmt: skip
            with gradio.Row():
                aloud = gradio.Checkbox(label="Speak the text", visible=asker.speaks and asker.converses)
                clear = gradio.Button("Start again", size="sm")
        outputs = [bot, message, before, self.last]
        message.submit(self._told(self._chat), [message, before, aloud, bot], outputs, **_EVENT)
        clear.click(lambda: ([], None, Conversation(), None), None, outputs, **_LIGHT_EVENT)

    def _chat(
        self, message: dict[str, Any], before: Conversation | None, aloud: bool, shown: list[dict[str, Any]]
    ) -> tuple[Any, ...]:
        gradio = self.gradio
        text, files = message.get("text") or "", message.get("files") or []
        parts = message_parts(text, files)
        before = before or Conversation()  # None: what was said is too old, and forgotten
        answer = self.asker.answer(before, parts, aloud)
        media = zip(parts, files, strict=False)  # a text is the last part
        shown = shown + [{"role": "user", "content": self._shown(part, path)} for part, path in media]
        shown += [{"role": "user", "content": text}] if text.strip() else []
        content: Any = answer.text
        if answer.spoken:
            content = gradio.Audio(self._wav(answer.spoken), buttons=["download"], show_label=False)
        shown.append({"role": "assistant", "content": content})
        return shown[-2 * MAX_MESSAGES :], None, before.said(parts, answer.text), answer

    def _shown(self, part: MessagePart, path: str) -> Any:
        """A picture or a sound of a message, without Gradio's button to share it elsewhere."""
        if isinstance(part, ImagePart):
            return self.gradio.Image(path, buttons=["fullscreen"], show_label=False)
        return self.gradio.Audio(path, buttons=[], show_label=False)

    def _wav(self, spoken: Sequence[Spoken]) -> str:
        """A file of sentences, one behind the other, which Gradio deletes when it is old."""
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".wav", delete=False) as file:
            file.write(wav_bytes([each.waveform for each in spoken]))
        return file.name

    def _compare_tab(self) -> None:
        gradio = self.gradio
        with gradio.Tab("Compare"):
            with gradio.Row():
                with gradio.Column(min_width=260):
                    image = gradio.Image(
                        label="Picture", sources=["upload", "webcam", "clipboard"], type="filepath", image_mode=None,
                        height=220, buttons=[], visible=self.asker.sees, elem_id="compare-picture",
                    )  # fmt: skip
                with gradio.Column(min_width=260):
                    sound = gradio.Audio(
                        label="Sound", sources=["upload", "microphone"], type="filepath", buttons=[],
                        visible=self.asker.hears, elem_id="compare-sound",
                    )  # fmt: skip
                    question = gradio.Textbox(label="Question, or nothing", elem_id="compare-question")
                    ask = gradio.Button("Ask both", variant="primary", elem_id="compare")
            with gradio.Row():
                outputs: list[Any] = []
                for number, asker in enumerate(self.askers):
                    with gradio.Column(min_width=260):
                        outputs.append(gradio.Textbox(label=asker.name, lines=2, elem_id=f"compared-{number}"))
                        outputs.append(gradio.HTML(""))
        gradio.on(
            [ask.click, question.submit], self._told(self._compare), [image, sound, question], [*outputs, self.last],
            **_EVENT,
        )  # fmt: skip

    def _compare(self, image: str | None, sound: str | None, question: str) -> list[Any]:
        parts = message_parts(question or "", [path for path in (image, sound) if path])
        outputs: list[Any] = []
        answers = [asker.answer(Conversation(), parts) for asker in self.askers]
        for answer in answers:
            if answer.spoken:
                raise ValueError("what is compared is written; add a picture or a sound")
            outputs += [answer.text, _part(tokens_html(answer.trace())) + _note(answer)]
        return [*outputs, answers[0]]

    def _trace_part(self) -> None:
        gradio = self.gradio
        self.trace = gradio.State(None, time_to_live=KEPT_SECONDS)
        with gradio.Accordion("How the last answer came about", open=True, visible=False, elem_id="how") as part:
            look = gradio.Button("Look into it", size="sm", elem_id="look")
            layer = gradio.Dropdown([], label="Attention of", visible=False, elem_id="layer")
            shown = gradio.HTML("", visible=False, elem_id="trace")
        look.click(self._told(self._look), self.last, [self.trace, look, layer, shown], **_EVENT)
        layer.input(self._told(_relook), [self.trace, layer], shown, **_EVENT)
        # In turn with the questions: behind the look at a new answer it would hide what is shown of that one.
        self.last.change(self._offer, self.last, [part, look, layer, shown, self.trace], **_EVENT)

    def _offer(self, answer: Answer | None) -> list[Any]:
        """A new answer: what was shown of the one before it goes."""
        gradio = self.gradio
        can_look = answer is not None and answer.has_trace
        part, look = gradio.Accordion(visible=can_look), gradio.Button(visible=True)
        return [part, look, gradio.Dropdown(visible=False), gradio.HTML("", visible=False), None]

    def _look(self, answer: Answer | None) -> tuple[AnswerTrace | None, Any, Any, Any]:
        if answer is None:
            raise ValueError("there is no answer yet, or it is too old; ask something first")
        if answer.spoken:
            shown = self.gradio.HTML(speech_traces_html(answer.speech_traces()), visible=True)
            return None, self.gradio.Button(visible=False), self.gradio.skip(), shown
        trace = answer.trace()
        names = layer_names(trace)
        menu = self.gradio.Dropdown(names, value=names[0], visible=bool(trace.pictures and trace.words))
        return trace, self.gradio.Button(visible=False), menu, self.gradio.HTML(trace_html(trace), visible=True)

    def _told(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose errors are sentences on the page: the user's own, or that the log says more."""
        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def generating(*args: Any) -> Iterator[Any]:
                try:
                    yield from function(*args)
                except Exception as error:
                    yield self._said(error)

            return generating

        @functools.wraps(function)
        def calling(*args: Any) -> Any:
            try:
                return function(*args)
            except Exception as error:
                return self._said(error)

        return calling

    def _said(self, error: Exception) -> Any:
        """Says what is wrong, and leaves the page as it is."""
        if isinstance(error, (ValueError, OSError)):
            text = re.sub(rf"{re.escape(str(self.folder))}/(?:[0-9a-f]+/)?", "", " ".join(str(error).split()))
            title = "That can't be answered"
        else:
            _logger.error("the page failed", exc_info=error)
            text, title = "This went wrong in mmllm itself; its log, where it was started, says more.", "Error"
        self.gradio.Warning(escape(text), duration=12, title=title)
        return self.gradio.skip()


_EVENT: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "models", "show_progress": "minimal"}
"""Nothing is an endpoint for programs (`mmllm serve` is), and one question runs at a time."""
_LIGHT_EVENT: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "light", "show_progress": "hidden"}
"""Of what asks no model, and needn't wait for those who do."""


def _relook(trace: AnswerTrace | None, layer: str) -> str:
    if trace is None:
        raise ValueError("this answer is too old to look into; ask again")
    if layer not in layer_names(trace):
        raise ValueError(f"there is no {layer!r} in this answer; choose from the menu")
    return trace_html(trace, layer)


def _cost(answer: Answer) -> str:
    tokens = f"{len(answer.result.ids)} tokens in " if answer.result is not None else ""
    return f"{tokens}{answer.seconds:.2f} s"


def _note(answer: Answer) -> str:
    return f'<p class="mm-note">{_cost(answer)}</p>'


def _part(html: str) -> str:
    return f'<section class="mm-part">{html}</section>'


def _chat_hint(asker: Asker) -> str:
    if asker.converses:
        return "Write something, or add pictures and sounds."
    can = []
    if asker.sees:
        can.append("A picture alone is captioned.")
    if asker.speaks:
        can.append("A sound alone is written down, a text alone is spoken.")
    elif asker.hears:
        can.append("A sound alone is written down.")
    can.append("Add a question to a picture or a sound, and it is answered.")
    return "This model knows tasks, not conversations. " + " ".join(can)
