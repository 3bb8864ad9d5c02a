"""The one configuration: flat keys with dots, parsed once at the door into frozen dataclasses."""
