"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ServeConfig:
    """Bounds of a server, and whom it answers.

    Attributes:
        api_keys: one of which each request must carry (`Authorization: Bearer KEY`); empty: none is asked for.
        cors_origins: web pages' origins that may read answers, `*` for any; requests of other pages are refused.
        conversations: whether models are to be sent whole conversations; None: those with a chat template of their own.
        max_queue: requests that may wait while as many run as the engine takes; further ones are answered 429.
        max_speaking: sounds that are streamed at once, so that each is made faster than it is listened to; further ones
            are answered 429. None: as many as come in time.
        max_body_bytes: of a request.
        max_pixels: of all pictures of a request, told from their headers before they are decoded.
        max_sounds_seconds: of all sounds of a request.
        max_media: pictures and sounds of a request.
        max_context: tokens of a prompt, its pictures and sounds included, and of its answer together.
        max_new_tokens: that a client may ask for.
        max_choices: answers to one prompt.
        max_speech_characters: of a text to be spoken.
        media_threads: threads in which pictures and sounds are decoded.
        allow_remote: hosts from which pictures may be fetched; empty: a client must send them.
        remote_seconds: that fetching one may take.
        drain_seconds: that running requests may take when the server is told to stop.
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    cors_origins: tuple[str, ...] = ()
    conversations: bool | None = None
    max_queue: int = 64
    max_speaking: int | None = None
    max_body_bytes: int = 32 * 2**20
    max_pixels: int = 50_000_000
    max_sounds_seconds: float = 900.0
    max_media: int = 64
    max_context: int = 16_384
    max_new_tokens: int = 4096
    max_choices: int = 16
    max_speech_characters: int = 4096
    media_threads: int = 2
    allow_remote: tuple[str, ...] = ()
    remote_seconds: float = 10.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in (
            "max_speaking", "max_body_bytes", "max_pixels", "max_sounds_seconds", "max_media", "max_context",
            "max_new_tokens", "max_choices", "max_speech_characters", "media_threads", "remote_seconds",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("max_queue", "drain_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if any(len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key for key in self.api_keys):
            raise ValueError("an API key must have 8 characters or more, of ASCII and without spaces")
        for origin in self.cors_origins:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise ValueError(f"cors origin {origin!r}: give scheme and host, such as https://example.org, or *")
        for host in self.allow_remote:
            if not host or "/" in host or ":" in host or "*" in host:
                raise ValueError(f"allow_remote {host!r}: give a host's name alone, such as images.example.org")
