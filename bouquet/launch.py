"""The command `bouquet`: a process of Bouquet's own, in which the rooms are found first."""

from bouquet.rooms import move_in


def main() -> None:
    """Run the command line."""
    move_in()
    from commands.cli import main as command_line

    command_line()
