"""The Flower ServerApp. Importing it loads neither torch nor transformers."""

import sys

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from core.errors import BouquetError
from core.events import log, logfmt
from server.progress import is_observed
from server.rounds import run_rounds
from settings.run import run_settings

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run's configuration describes."""
    try:
        run_rounds(grid, run_settings(context.run_config))
    except BouquetError as error:
        if not is_observed():
            log.error(logfmt("failed", reason=str(error)))
            sys.tracebacklimit = 0  # Flower logs what it catches here; the message says it all
        raise
