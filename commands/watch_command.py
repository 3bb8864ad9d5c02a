"""`bouquet watch`: a run as a page that is always up to date, on this machine only."""

import os
import secrets
import socket
import tempfile
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated

import typer

from commands import job_options as job
from commands.terminal import console
from core.errors import UsageError
from journal.status import read_status


@contextmanager
def shown_in_browser(address: str) -> Iterator[None]:
    """The page in a browser, by a file for this user alone: all users see a command's arguments."""
    descriptor, name = tempfile.mkstemp(prefix="bouquet-watch-", suffix=".html")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(f'<meta http-equiv="refresh" content="0; url={address}">\n')
        webbrowser.open(Path(name).as_uri())
        yield
    finally:
        Path(name).unlink(missing_ok=True)


def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="On the loopback interface; 0: one that is free.")
    ] = 0,
    browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in a browser.")
    ] = True,
    debug: job.DebugOption = False,
) -> None:
    """Show a run as a live page: is it alive, whom does it wait for, what failed.

    Of a simulation or a deployment. The page is served to this machine alone, to whoever has the
    address with its token; from elsewhere: ssh -L 8800:127.0.0.1:8800 HOST, with --port 8800.

    Example:
      bouquet watch coordinator/runs/trial
    """
    import uvicorn

    from reports.watch_app import watch_app

    read_status(run)
    token = secrets.token_urlsafe(24)
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", port))
            listening.listen()  # so that the address answers as soon as it is printed
        except OSError as error:
            raise UsageError(
                f"port {port} cannot be used: {error.strerror}. Leave --port out for a free one"
            ) from error
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/?token={token}"
        console.print(f"{run} is at {address}", soft_wrap=True, markup=False)
        console.print("Ctrl-C ends the page; the run goes on.", style="dim")
        config = uvicorn.Config(
            watch_app(run.resolve(), token, lambda: server.should_exit),
            log_level="error",
            timeout_graceful_shutdown=3,
            lifespan="off",
            ws="none",
        )
        server = uvicorn.Server(config)
        with suppress(KeyboardInterrupt), shown_in_browser(address) if browser else nullcontext():
            server.run(sockets=[listening])
    console.print("the page is closed")
