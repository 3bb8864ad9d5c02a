"""How the SuperLink shares its database: one request after another, and none gives up soon.

SQLite has one writer at a time, and nearly every question to a SuperLink writes. Flower lets
fifteen try at once and gives each five seconds ("database is locked"); whatever was sent with a
request that gave up is lost. No option changes that. But SQLAlchemy, through which Flower opens the
database, takes plugins by its URL: `--database sqlite:///superlink.db?plugin=bouquet`.
"""

from typing import Any

from sqlalchemy import URL, Engine, Pool, QueuePool, event
from sqlalchemy.engine import CreateEnginePlugin

PATIENCE_SECONDS = 25
"""Below the 30 s after which those who asked the SuperLink by HTTP stop listening."""


class PatientDatabase(CreateEnginePlugin):
    """Requests queue for one connection; that one waits for a lock of others, such as a backup."""

    def update_url(self, url: URL) -> URL:
        """It takes nothing from the URL."""
        return url

    def handle_pool_kwargs(self, pool_cls: type[Pool], pool_args: dict[str, Any]) -> None:
        """A connection for whoever is first in the queue."""
        if issubclass(pool_cls, QueuePool):
            pool_args.update(pool_size=1, max_overflow=0, timeout=PATIENCE_SECONDS)

    def engine_created(self, engine: Engine) -> None:
        """Set it whenever the connection is taken: Flower sets its own when it is made."""
        event.listen(engine, "checkout", _wait_longer)


def _wait_longer(connection: Any, *_: object) -> None:
    connection.execute(f"PRAGMA busy_timeout = {1000 * PATIENCE_SECONDS}").close()
