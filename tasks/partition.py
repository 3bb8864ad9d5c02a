"""Who holds which example: a global held-out part, and one part for each client."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from adapters.errors import UsageError, listing
from settings.run import DataSettings
from settings.site import client_name
from tasks.examples import Example, choose, read_examples

DRAWS = 1000


@dataclass(frozen=True)
class Part:
    """One client's examples: what it trains on, and what it keeps for evaluation."""

    train: list[Example]
    held_out: list[Example]


@dataclass(frozen=True)
class Federation:
    """All the data of a simulation: the clients' parts, and what no client ever sees."""

    parts: list[Part]
    held_out: list[Example]


@lru_cache(maxsize=2)
def federate(data: DataSettings, clients: int, seed: int, task: str = "causal") -> Federation:
    """Read, hold out, and deal to the clients. The same arguments give the same federation.

    Raises UsageError that names the clients which would be left without an example to train on.
    """
    examples = choose(read_examples(data, task=task), data.max_examples, seed)
    rest, held_out = hold_out(examples, data.held_out_share(), seed)
    owner = DEALERS[data.partition](rest, clients, data, np.random.default_rng([seed, 2]))
    parts: list[list[Example]] = [[] for _ in range(clients)]
    for example, client in zip(rest, owner, strict=True):
        parts[client].append(example)
    split = [Part(*hold_out(part, data.client_held_out_share(), seed)) for part in parts]
    if empty := [client_name(k) for k, part in enumerate(split) if not part.train]:
        raise UsageError(
            f"{len(empty)} of {clients} clients have no examples to train on: {listing(empty)}. "
            f"{len(rest)} examples are dealt by data.partition={data.partition}: take fewer "
            "clients, more data, a larger data.dirichlet-alpha, or data.partition=iid."
        )
    return Federation(split, held_out)


@lru_cache(maxsize=2)
def global_held_out(
    data: DataSettings, clients: int, seed: int, limit: int, task: str = "causal"
) -> list[Example]:
    """At most `limit` (0: all) of the examples that no client trains on."""
    held_out = federate(data, clients, seed, task).held_out
    if not held_out:
        raise UsageError("no example is held out for the global model: raise data.held-out")
    return choose(held_out, limit, seed)


@lru_cache(maxsize=2)
def own_part(data: DataSettings, path: str, seed: int, task: str = "causal") -> Part:
    """A site's own data, of which it holds out its share; nothing is dealt.

    So the field that a partition goes by need not be there.
    """
    examples = read_examples(replace(data, partition="iid"), path, task)
    chosen = choose(examples, data.max_examples, seed)
    return Part(*hold_out(chosen, data.client_held_out_share(), seed))


def hold_out(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Split off a share of the distinct examples; copies of a held-out example go with it.

    At least one example is held out where share is above 0 and two distinct ones exist.
    """
    distinct = sorted({(example.prompt, example.response) for example in examples})
    count = round(share * len(distinct))
    if share > 0 and len(distinct) > 1:
        count = min(max(count, 1), len(distinct) - 1)
    order = np.random.default_rng([seed, 3]).permutation(len(distinct))[:count]
    chosen = {distinct[index] for index in order}
    rest = [example for example in examples if (example.prompt, example.response) not in chosen]
    held = [example for example in examples if (example.prompt, example.response) in chosen]
    return rest, held


def _deal_iid(
    examples: Sequence[Example], clients: int, data: DataSettings, rng: np.random.Generator
) -> list[int]:
    """Shuffled, then dealt in turn: sizes differ by at most one."""
    owner = np.arange(len(examples)) % clients
    return [int(client) for client in rng.permutation(owner)]


def _deal_dirichlet(
    examples: Sequence[Example], clients: int, data: DataSettings, rng: np.random.Generator
) -> list[int]:
    """For each label, clients' shares from Dirichlet(alpha) (Hsu et al., arXiv 1909.06335).

    Drawn again, up to DRAWS times, until every client has data.min-examples.
    """
    for _ in range(DRAWS):
        owner = [0] * len(examples)
        for label in sorted({example.group for example in examples}):
            members = [index for index, example in enumerate(examples) if example.group == label]
            shares = rng.dirichlet([data.dirichlet_alpha] * clients)
            bounds = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
            for client, chunk in enumerate(np.split(rng.permutation(members), bounds)):
                for index in chunk:
                    owner[int(index)] = client
        if np.bincount(owner, minlength=clients).min() >= data.min_examples:
            return owner
    raise UsageError(
        f"in {DRAWS} draws of Dirichlet({data.dirichlet_alpha:g}) some of {clients} clients "
        f"always had fewer than data.min-examples={data.min_examples} of {len(examples)} examples: "
        "take fewer clients, more data, a larger data.dirichlet-alpha, or data.partition=iid"
    )


def _deal_natural(
    examples: Sequence[Example], clients: int, data: DataSettings, rng: np.random.Generator
) -> list[int]:
    """Whole groups, the largest first, each to the client with the fewest examples so far."""
    sizes: dict[str, int] = {}
    for example in examples:
        sizes[example.group] = sizes.get(example.group, 0) + 1
    if len(sizes) < clients:
        raise UsageError(
            f"data.partition=natural deals whole groups of {data.field!r}: {len(sizes)} groups are "
            f"not enough for {clients} clients. Take fewer clients, another data.field, or "
            "data.partition=iid."
        )
    held = [0] * clients
    home: dict[str, int] = {}
    for group in sorted(sizes, key=lambda name: (-sizes[name], name)):
        home[group] = held.index(min(held))
        held[home[group]] += sizes[group]
    return [home[example.group] for example in examples]


def _deal_files(
    examples: Sequence[Example], clients: int, data: DataSettings, rng: np.random.Generator
) -> list[int]:
    """One file for each client, in the order the files were named."""
    files = list(dict.fromkeys(example.group for example in examples))
    if len(files) != clients:
        raise UsageError(
            f"data.partition=files needs one file for each of {clients} clients; data.path names "
            f"{len(files)}: {listing(files)}"
        )
    return [files.index(example.group) for example in examples]


DEALERS = {
    "iid": _deal_iid,
    "dirichlet": _deal_dirichlet,
    "natural": _deal_natural,
    "files": _deal_files,
}
