"""One site in one run: its settings, its model, its data, made from Flower's context."""

from dataclasses import dataclass

import numpy as np
from flwr.app import Context

from adapters.adapter import Adapter, Factors, draw
from adapters.algebra import rescale, truncate
from adapters.errors import UsageError
from settings.run import LoraSettings, RunSettings, run_settings
from settings.site import Site, parse_site
from tasks.encoding import Encoded
from tasks.partition import Part, federate, own_part
from tasks.tuned_model import TunedModel, resident_model


@dataclass(frozen=True, eq=False)
class Workplace:
    """What a client needs to answer any message."""

    site: Site
    settings: RunSettings
    tuned: TunedModel
    part: Part
    rank: int

    def training_examples(self) -> list[Encoded]:
        """The client's encoded training examples."""
        return self.tuned.encode(self.part.train, self.settings.data).examples

    def held_out_examples(self) -> list[Encoded]:
        """The client's own held-out examples; UsageError where it holds out none."""
        if not self.part.held_out:
            raise UsageError(f"{self.site.name} holds out no examples: raise data.client-held-out")
        return self.tuned.encode(self.part.held_out, self.settings.data).examples


def open_workplace(context: Context, lora: LoraSettings | None = None) -> Workplace:
    """The site that this context describes.

    lora: the adapter's shape as the server's message gives it; by default the run's.
    """
    settings = run_settings(context.run_config)
    lora = lora or settings.lora
    site = parse_site(context.node_config)
    tuned = resident_model(settings.model, lora, site)
    rank = site.rank or lora.rank_of(site.number)
    tuned.check_rank(rank)
    if site.data_path is not None:
        part = own_part(settings.data, site.data_path, settings.seed)
    else:
        clients = int(context.node_config.get("num-partitions", settings.clients.count))
        parts = federate(settings.data, clients, settings.seed).parts
        if site.number >= len(parts):
            raise UsageError(f"partition-id {site.number} does not exist among {len(parts)} parts")
        part = parts[site.number]
    return Workplace(site, settings, tuned, part, rank)


def starting_factors(
    start: Adapter | None, shapes: dict[str, tuple[int, int]], rank: int, scale: float, seed: int
) -> Adapter:
    """What a client of this rank trains from, at its own scale.

    The first `rank` rows of A and columns of B of `start`; what is missing up to its rank, or
    everything where there is no start, is fresh (A random from the seed, B zero), so that the delta
    is that of the truncated start.
    """
    fresh = draw(shapes, rank, seed, scale)
    if start is None:
        return fresh
    modules = {}
    for name, own in rescale(truncate(start, rank), scale).items():
        rest = fresh[name]
        modules[name] = Factors(
            np.concatenate([own.a, rest.a[own.rank :]]),
            np.concatenate([own.b, rest.b[:, own.rank :]], axis=1),
            scale,
        )
    return Adapter(modules)
