"""The plugin that a SuperLink's database loads by its entry point, wherever the rooms lie."""

from bouquet.rooms import move_in

move_in()

from deployment.database import PatientDatabase  # noqa: E402

__all__ = ["PatientDatabase"]
