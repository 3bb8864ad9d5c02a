"""The Flower ServerApp. Importing it loads neither torch nor transformers."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.rounds import run_rounds
from settings.run import run_settings

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run's configuration describes."""
    run_rounds(grid, run_settings(context.run_config))
