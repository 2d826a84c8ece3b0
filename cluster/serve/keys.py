"""An API key in front of every route but health."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from pathlib import Path
from typing import Any

from cluster.config import ConfigError

VARIABLE = "MUSKETEERS_API_KEY"
DIGEST = "MUSKETEERS_API_KEY_SHA256"  # what Ray's processes are told, in place of the key
OPEN_ROUTES = ("/health", "/-/healthz")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def api_key(file: Path | None, host: str) -> str | None:
    """The key from a file or from `MUSKETEERS_API_KEY`; None where none is wanted.

    Raises:
        ConfigError: when there is none although the host is not loopback, or it is empty.
    """
    if file is not None:
        try:
            key = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-key-file {file} cannot be read: {error}") from error
        if not key:
            raise ConfigError(f"--api-key-file {file} is empty: write a key into it")
    else:
        key = os.environ.get(VARIABLE, "").strip()
    if not key and host not in LOOPBACK:
        raise ConfigError(f"--host {host} is seen by other machines: give --api-key-file FILE, or set {VARIABLE}")
    return key or None


def digest(key: str | None) -> str:
    """What is compared with; empty without a key."""
    return hashlib.sha256(key.encode()).hexdigest() if key else ""


class KeyMiddleware:
    """Answers 401, in OpenAI's form, to whoever does not know the key."""

    def __init__(self, app: Any, digest: str) -> None:
        self.app, self.digest = app, digest

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """An ASGI call."""
        if scope["type"] not in ("http", "websocket") or not self.digest or self._knows(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._refuse(send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _knows(self, scope: Any) -> bool:
        if scope["path"] in OPEN_ROUTES:
            return True
        given = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"")
        kind, _, key = given.decode("latin-1").partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(digest(key.strip()), self.digest)

    @staticmethod
    async def _refuse(send: Any) -> None:
        error = {
            "message": "a valid API key is needed: send it as `Authorization: Bearer KEY`",
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_api_key",
        }
        headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})


def proxy_middlewares() -> list[Any]:
    """For Ray Serve's own proxy, which answers some routes by itself."""
    from starlette.middleware import Middleware

    return [Middleware(KeyMiddleware, digest=os.environ.get(DIGEST, ""))]
