"""The page of one run, live: what `bouquet status` knows, sent as it changes.

Whoever asks must name this machine and carry the token: another site that is open in the same
browser, or another user of this machine, gets nothing. Everything on the page is in it: no request
leaves for elsewhere, and the policy of the page forbids it.
"""

import asyncio
import hmac
import json
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import (
    HTMLResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

from core.errors import BouquetError, quoted
from journal.status import Record, Status, read_status

HERE = Path(__file__).resolve().parent
LOOK_SECONDS = 1.0
STILL_HERE_SECONDS = 15.0
LONGEST_LINE = 5000
MOST_ROUNDS = 500
"""Of a longer run, the last."""


def watch_app(folder: Path, token: str, is_ending: Callable[[], bool] = lambda: False) -> Starlette:
    """The page and its events; asked with ?token= once, by the cookie from then on.

    is_ending: whether the server is about to end, and with it the stream of events.
    """

    def allowed(request: Request) -> bool:
        carried = request.query_params.get("token") or request.cookies.get(cookie(request), "")
        return hmac.compare_digest(carried.encode(), token.encode())

    async def page(request: Request) -> Response:
        if not allowed(request):
            return _refused()
        if "token" in request.query_params:  # out of the address bar and of the history
            response: Response = RedirectResponse("/", status_code=303)
            # Lax: the browser comes from a file, and a strict cookie would not go along to "/".
            response.set_cookie(cookie(request), token, httponly=True, samesite="lax")
            return response
        return _page()

    async def events(request: Request) -> Response:
        if not allowed(request):
            return _refused()
        return StreamingResponse(
            _events(folder, is_ending),
            media_type="text/event-stream",
            headers={"cache-control": "no-store"},
        )

    return Starlette(
        routes=[Route("/", page), Route("/events", events)],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])],
    )


def cookie(request: Request) -> str:
    """A cookie is sent to every port of a machine: each page has one of its own."""
    return f"bouquet-watch-{request.url.port}"


def _refused() -> Response:
    words = "This page needs the address that bouquet watch printed, with its token.\n"
    return PlainTextResponse(words, status_code=403)


def _page() -> Response:
    nonce = secrets.token_urlsafe(16)
    style = "".join((HERE / f"{name}.css").read_text() for name in ("palette", "watch"))
    html = (HERE / "watch.html").read_text()
    parts = {"NONCE": nonce, "STYLE": style, "SCRIPT": (HERE / "watch.js").read_text()}
    for name, text in parts.items():
        html = html.replace(f"@{name}@", text)
    policy = {
        "default-src": "'none'",
        "style-src": f"'nonce-{nonce}'",
        "script-src": f"'nonce-{nonce}'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "cache-control": "no-store",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    return HTMLResponse(html, headers=headers)


async def _events(folder: Path, is_ending: Callable[[], bool]) -> AsyncIterator[str]:
    """Status, rounds and configuration, each whenever it has changed."""
    sent: dict[str, str] = {}
    silent = 0.0
    while not is_ending():
        came = False
        for name, told in (await asyncio.to_thread(_look, folder)).items():
            text = json.dumps(told)
            if sent.get(name) != text:
                sent[name], came = text, True
                if name == "status":
                    told = {**told, "now": datetime.now(UTC).isoformat(timespec="seconds")}
                yield f"event: {name}\ndata: {json.dumps(told)}\n\n"
        silent = 0.0 if came else silent + LOOK_SECONDS
        if silent >= STILL_HERE_SECONDS:
            silent = 0.0
            yield ": still here\n\n"
        await asyncio.sleep(LOOK_SECONDS)


def _look(folder: Path) -> dict[str, Any]:
    """What the folder says now; where it cannot be read, that alone."""
    try:
        status = read_status(folder)
        lines = (folder / "config.toml").read_text().splitlines()
        config = "\n".join(quoted(line, LONGEST_LINE) for line in lines)
        return {
            "config": config,
            "rounds": [_round(status, record) for record in status.records[-MOST_ROUNDS:]],
            "status": status.document(),
        }
    except (BouquetError, OSError) as error:
        return {"status": _unreadable(folder, str(error))}
    except Exception as error:  # of many kinds, for what another program wrote into the folder
        return {"status": _unreadable(folder, f"{folder} is damaged: {error!r}")}


def _unreadable(folder: Path, words: str) -> dict[str, Any]:
    empty = {"metrics": {}, "sites": [], "rounds": 0, "rounds_done": 0, "strategy": ""}
    return {"run": str(folder), "state": "stopped", "says": quoted(words, 1000), **empty}


def _round(status: Status, record: Record) -> Mapping[str, Any]:
    """One line of rounds.jsonl, as far as the page shows it."""
    loss = "client_held_out_loss" if status.own_losses else "held_out_loss"
    prefix = "held_out_"
    return {
        "round": record["round"],
        "clients": [quoted(client["client"], 80) for client in record.get("clients", [])],
        "failed": [quoted(failure["client"], 80) for failure in record.get("failures", [])],
        "train_loss": record.get("train_loss"),
        "loss": record.get(loss, record.get("client_held_out_loss")),
        "metrics": {
            name.removeprefix(prefix): value
            for name, value in record.items()
            if name.startswith(prefix) and name not in ("held_out_loss", "held_out_tokens")
        },
        "bytes_up": record.get("bytes_up"),
        "bytes_down": record.get("bytes_down"),
        "seconds": record.get("seconds"),
    }
