"""What the wheel holds: the package `bouquet`, with every room below `bouquet/app/`.

An editable install maps `bouquet` alone, which finds the rooms beside itself.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOMS = (
    "core",
    "adapters",
    "settings",
    "wire",
    "strategies",
    "tasks",
    "models",
    "journal",
    "client",
    "server",
    "deployment",
    "simulations",
    "reports",
    "commands",
)


class Rooms(BuildHookInterface):  # type: ignore[type-arg]
    """Puts the rooms into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """An editable wheel is of version `editable`, and needs none of them."""
        if version == "standard":
            held = [*ROOMS, "pyproject.toml", "LICENSE"]
            rows = {str(Path(self.root, name)): f"bouquet/app/{name}" for name in held}
            build_data["force_include"].update(rows)
