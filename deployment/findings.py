"""One line of `bouquet check`: what was looked at, and what to do where it is not right."""

from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """What a finding means for joining."""

    OK = "OK"
    NOTE = "note"
    """Worth knowing, or could not be found out."""
    MEND = "mend"
    """The site cannot take part like this."""


@dataclass(frozen=True)
class Finding:
    """What was looked at, the verdict, and a sentence: the facts, or what to do."""

    subject: str
    verdict: Verdict
    sentence: str


def fine(subject: str, sentence: str) -> Finding:
    """All is well."""
    return Finding(subject, Verdict.OK, sentence)


def note(subject: str, sentence: str) -> Finding:
    """Not wrong, but to be known."""
    return Finding(subject, Verdict.NOTE, sentence)


def mend(subject: str, sentence: str) -> Finding:
    """Wrong; the sentence says what to do."""
    return Finding(subject, Verdict.MEND, sentence)
