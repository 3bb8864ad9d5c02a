"""Files of a deployment, filled in from templates/: `@NAME@` stands for a value."""

import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "templates"


def fill(template: str, values: dict[str, str]) -> str:
    """The template's text with every placeholder filled in; a KeyError names one without value."""
    text = (FOLDER / template).read_text()
    return re.sub(r"@([A-Z_]+)@", lambda found: values[found[1]], text)


def write_filled(path: Path, template: str, values: dict[str, str]) -> None:
    """Write it; what ends in .sh with a first line of `#!` becomes executable."""
    text = fill(template, values)
    path.write_text(text)
    path.chmod(0o755 if text.startswith("#!") else 0o644)
