"""docs/deploy.md as steps: what to type on which machine, and which files to write."""

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "deploy.md"
BLOCK = re.compile(r"^```(\w+)(?: ([^\n]*))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


ALONE = (("trial",), ("laptop",))
"""Machines that are no part of the page's federation."""


@dataclass(frozen=True)
class Step:
    """One block of the page."""

    machines: tuple[str, ...]
    """coordinator, a site's name, trial or laptop; of a toml block, the name of the file."""
    text: str
    language: str
    keeps_running: bool


def steps() -> list[Step]:
    """Every block, in order."""
    found = []
    for language, info, text in BLOCK.findall(PAGE.read_text()):
        words = info.split()
        machines = tuple(word for word in words if word != "running")
        found.append(Step(machines, text, language, "running" in words))
    return found
