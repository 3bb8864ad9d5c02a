"""How the SuperLink waits for its database, which one writer has at a time.

Flower's requests give up after five seconds ("database is locked"), and no option changes that;
whatever was sent with them is lost. SQLAlchemy, through which Flower opens the database, takes
plugins by the database's URL: `--database sqlite:///superlink.db?plugin=bouquet`.
"""

from typing import Any

from sqlalchemy import URL, Engine, event
from sqlalchemy.engine import CreateEnginePlugin

PATIENCE_SECONDS = 25
"""Below the 30 s after which those who asked the SuperLink by HTTP stop listening."""


class PatientDatabase(CreateEnginePlugin):
    """Whoever finds the database locked waits for its turn."""

    def update_url(self, url: URL) -> URL:
        """It takes nothing from the URL."""
        return url

    def engine_created(self, engine: Engine) -> None:
        """Set it whenever a connection is taken: Flower sets its own when one is made."""
        event.listen(engine, "checkout", _wait_longer)


def _wait_longer(connection: Any, *_: object) -> None:
    connection.execute(f"PRAGMA busy_timeout = {1000 * PATIENCE_SECONDS}").close()
