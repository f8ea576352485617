"""`mmllm ui`: a page in the browser that captions, transcribes, speaks and answers, and shows how an answer came about.

Gradio draws it. Its own ways of sharing, proxying and reporting stay off: see `mmllm.serving.page_routes`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmllm.serving.page_answers import Asker
from mmllm.serving.page_routes import ClosedRoutes, PageLimits
from mmllm.serving.page_tabs import Page

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class PageConfig:
    """What the page allows.

    Attributes:
        max_waiting: questions that wait for others; further ones are told to come later.
        limits: of what is sent.
    """

    max_waiting: int = 16
    limits: PageLimits = field(default_factory=PageLimits)

    def __post_init__(self) -> None:
        if self.max_waiting < 1:
            raise ValueError(f"max_waiting is {self.max_waiting}; it must be at least 1")


@contextmanager
def page_folder() -> Iterator[Path]:
    """A folder of its own for what is uploaded, which Gradio shares among all pages of a machine; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="mmllm-ui-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        try:
            yield Path(folder).resolve()
        finally:
            for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
                os.environ.pop(name, None)


def page_app(askers: Sequence[Asker], folder: Path, host: str, config: PageConfig | None = None) -> Any:
    """The page as an ASGI application.

    Args:
        askers: the models; the first answers everywhere, two are compared.
        folder: of `page_folder`, within which this is called.
        host: that will be listened on; see `ClosedRoutes`.
        config: what it allows.

    Raises:
        ModuleNotFoundError: Gradio isn't installed.
    """
    gradio = _gradio()
    from fastapi import FastAPI

    config = config or PageConfig()
    blocks = Page(gradio, list(askers), folder).draw()
    blocks.queue(max_size=config.max_waiting, default_concurrency_limit=1, api_open=False)
    # Gradio looks at the paths that requests name only where it was launched, which a mounted application never is.
    blocks.has_launched = True
    names = ("page.css", "page_frame.css", "page.js")
    style, frame_style, script = ((_HERE / name).read_text(encoding="utf-8") for name in names)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    gradio.mount_gradio_app(
        app,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=True,
        max_file_size=config.limits.upload_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=_theme(gradio),
        css=style,  # which Gradio makes hold within its container alone
        head=f"<style>{frame_style}</style><script>{script}</script>",
    )
    return ClosedRoutes(app, folder, host, config.limits)


def _gradio() -> Any:
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the page needs Gradio; pip install 'mmllm[ui]'") from error
    return gradio


def _theme(gradio: Any) -> Any:
    """Fonts that are there already: none is fetched."""
    return gradio.themes.Default(
        primary_hue="orange",
        neutral_hue="slate",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "monospace"],
    )
