"""One client of a run: what it says of itself, under the name that its key gives it."""

import re
from dataclasses import dataclass, replace

from flwr.app import Message, RecordDict

from server.names import registered_names, true_name
from settings.site import NAME
from wire.messages import QUERY_RECORDS, Failure, records_of
from wire.site_card import LONGEST_NAME, SiteCard


@dataclass(frozen=True)
class Member:
    """One client that can take part."""

    name: str
    node_id: int
    card: SiteCard

    @property
    def rank(self) -> int:
        """The rank that it can afford."""
        return self.card.rank

    @property
    def num_examples(self) -> int:
        """Training examples, as it said before the run."""
        return self.card.num_examples

    @property
    def holds(self) -> frozenset[str]:
        """The pieces of merged that it has, by version."""
        return self.card.holds or frozenset()

    def holding(self, pieces: frozenset[str]) -> "Member":
        """The same client with these pieces."""
        return replace(self, card=replace(self.card, holds=pieces))


def member_of(answer: Message) -> Member:
    """The member that an answer to `query` describes; ReplyError where it describes none."""
    node = answer.metadata.src_node_id
    card = SiteCard.from_records(records_of(answer, QUERY_RECORDS))
    return Member(true_name(node, card.client), node, card)


def claimed_name(answer: Message) -> str:
    """What to call a node that does not take part; the name beside a failure is its word alone."""
    node = answer.metadata.src_node_id
    if registered := (registered_names() or {}).get(node):
        return registered
    content = answer.content if answer.has_content() else RecordDict()
    failure = Failure.from_records(content)
    claimed = failure.client if failure else ""
    is_name = re.fullmatch(NAME, claimed) and len(claimed) <= LONGEST_NAME
    return f"{claimed}@{node}" if is_name else f"node {node}"
