"""Messages out, answers in: whoever is silent, a wait ends.

Flower holds an answer until somebody asks for it. A mailbox asks for all that is still out, so that
an answer that comes after its round is taken from the SuperLink, counted and dropped. A SuperLink
that is out of breath (its database is locked, say) is asked again before the run gives up.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from adapters.errors import quoted
from server.flower_grid import Postbox, Question
from settings.events import log, logfmt

Found = TypeVar("Found")
AGAIN_AFTER_SECONDS = (1.0, 2.0, 4.0, 8.0)
TRANSPORT = "httpx"
"""The library by which Flower's grid asks the SuperLink: its errors are worth another try."""
SHORTEST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0


class Mailbox:
    """A run's messages, and what is out of them.

    strays: how many answers came that nobody waited for: `late` (their wait was over), `duplicate`
    (the message was answered before), `foreign` (to no message of this mailbox).
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._postbox = Postbox(grid)
        self._questions: dict[str, Question] = {}
        self._waiting: set[str] = set()
        self._later: set[str] = set()
        self._overdue: set[str] = set()
        self._answered: set[str] = set()
        self._answers: list[Message] = []
        self.strays: Counter[str] = Counter()
        self.unheard: list[Message] = []
        """Answers that had come when the caller of `exchange` stopped listening."""

    def node_ids(self) -> list[int]:
        """The nodes that are connected now, sorted."""
        return sorted(_patiently(self._grid.get_node_ids))

    def exchange(
        self,
        messages: Iterable[Message],
        seconds: float,
        array_bytes: Mapping[int, int] | None = None,
    ) -> Iterator[Message]:
        """Send the messages and yield each answer as it comes, until `seconds` have passed.

        array_bytes: node -> the most that the arrays of its answer can need; nothing by default.
        An answer that cannot be read comes as one with an error, of the node that sent it.

        The caller may stop before; what comes after that is late, and what had come with the last
        one that was taken is in `unheard`.
        """
        self.unheard = []
        deadline = time.monotonic() + seconds
        self._overdue |= self._waiting
        self._waiting = self._push(messages, array_bytes or {})
        pause = self._shortest_pause()
        while self._waiting:
            came = self._pull()
            for at, answer in enumerate(came):
                self.unheard = came[at + 1 :]
                yield answer
            left = deadline - time.monotonic()
            if not self._waiting or left <= 0.0:
                return
            pause = self._shortest_pause() if came else min(2.0 * pause, LONGEST_PAUSE_SECONDS)
            time.sleep(min(pause, left))

    def ask_later(self, messages: Iterable[Message]) -> None:
        """Send messages whose answers `answers` will hand out whenever they have come."""
        self._later |= self._push(messages, {})

    def answers(self) -> list[Message]:
        """What has come for `ask_later` since the last call; waits for nothing."""
        self._overdue |= self._waiting
        self._waiting = set()
        self._pull()
        came, self._answers = self._answers, []
        return came

    def _shortest_pause(self) -> float:
        """The more are out, the longer: to look is a write to the SuperLink's database."""
        return min(SHORTEST_PAUSE_SECONDS * len(self._waiting), LONGEST_PAUSE_SECONDS)

    def _push(self, messages: Iterable[Message], array_bytes: Mapping[int, int]) -> set[str]:
        letters = list(messages)
        names = list(_patiently(lambda: self._grid.push_messages(letters)))
        asked = {name: letter.metadata for name, letter in zip(names, letters, strict=True) if name}
        self._questions |= {
            name: Question(to.dst_node_id, to.message_type, array_bytes.get(to.dst_node_id, 0))
            for name, to in asked.items()
        }
        return set(asked)

    def _pull(self) -> list[Message]:
        """The answers that `exchange` waits for; all others are put where they belong."""
        came = []
        for answer in _patiently(lambda: self._postbox.pull(self._questions)):
            question = answer.metadata.reply_to_message_id
            self._questions.pop(question, None)
            if question in self._waiting:
                came.append(answer)
            elif question in self._later:
                self._answers.append(answer)
            else:
                self.strays[self._kind_of_stray(question)] += 1
            for names in (self._waiting, self._later, self._overdue):
                names.discard(question)
            self._answered.add(question)
        return came

    def _kind_of_stray(self, question: str) -> str:
        if question in self._answered:
            return "duplicate"
        return "late" if question in self._overdue else "foreign"


def _patiently(ask: Callable[[], Found]) -> Found:
    """The SuperLink's answer; asked up to five times where the way to it, or it, fails."""
    for pause in AGAIN_AFTER_SECONDS:
        try:
            return ask()
        except Exception as error:
            if not type(error).__module__.startswith(TRANSPORT):
                raise
            log.warning(logfmt("superlink-failed", again_in=pause, reason=quoted(error, 200)))
            time.sleep(pause)
    return ask()
