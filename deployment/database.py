"""How the SuperLink shares its database: one request after another, and none gives up soon.

SQLite has one writer at a time, and nearly every question to a SuperLink writes. Flower lets
fifteen try at once and gives each five seconds ("database is locked"); whatever was sent with a
request that gave up is lost. No option changes that. But SQLAlchemy, through which Flower opens the
database, takes plugins by its URL: `--database sqlite:///superlink.db?plugin=bouquet`.

What a site pushes is stored before anybody looks at it. Two announcements harm all other sites, and
are refused here: one of so many parts that storing them keeps all others waiting, and one whose
times are no numbers, which SQLite stores as NULL and Flower cannot read again.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from sqlalchemy import URL, Connection, Engine, Pool, QueuePool, event
from sqlalchemy.engine import CreateEnginePlugin

PATIENCE_SECONDS = 25
"""Below the 30 s after which those who asked the SuperLink by HTTP stop listening."""


MOST_OBJECTS = 4000
"""Parts of one message, about half a millisecond each; arrays of 20 GB have so many chunks."""
NEW_OBJECT = "INSERT INTO objects "
NEW_ANSWER = "INSERT INTO message_res "
COUNTED = "bouquet_objects"


class RefusedAnnouncementError(ValueError):
    """What a site announced is not stored: the transaction is rolled back, and the push fails."""


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
        event.listen(engine, "begin", _count_anew)
        event.listen(engine, "before_cursor_execute", _refuse_what_harms)


def _wait_longer(connection: Any, *_: object) -> None:
    connection.execute(f"PRAGMA busy_timeout = {1000 * PATIENCE_SECONDS}").close()


def _count_anew(connection: Connection) -> None:
    connection.info[COUNTED] = 0


def _refuse_what_harms(
    connection: Connection, _: object, statement: str, parameters: Any, *__: object
) -> None:
    if statement.startswith(NEW_OBJECT):
        connection.info[COUNTED] = connection.info.get(COUNTED, 0) + 1
        if connection.info[COUNTED] > MOST_OBJECTS:
            raise RefusedAnnouncementError(f"a message of more than {MOST_OBJECTS:,} objects")
    elif statement.startswith(NEW_ANSWER):
        values = parameters.values() if isinstance(parameters, Mapping) else parameters
        if not all(isfinite(value) for value in values if isinstance(value, float)):
            raise RefusedAnnouncementError("an answer whose times are no finite numbers")
