"""The Flower ServerApp. Importing it loads neither torch nor transformers."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.progress import log_to_stdout
from server.rounds import run_rounds
from settings.run import run_settings

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run's configuration describes."""
    log_to_stdout()
    run_rounds(grid, run_settings(context.run_config))
