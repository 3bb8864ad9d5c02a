"""One site in one run: its settings, its model, its data, made from Flower's context."""

from dataclasses import dataclass

from flwr.app import Context

from core.errors import UsageError
from core.units import counted
from models.tuned_model import TunedModel, resident_model
from settings.run import LoraSettings, RunSettings, run_settings
from settings.site import Site, parse_site
from tasks.encoding import Encoded
from tasks.labels import label_names
from tasks.partition import Part, federate, own_part


@dataclass(frozen=True, eq=False)
class Workplace:
    """What a client needs to answer any message."""

    site: Site
    settings: RunSettings
    tuned: TunedModel
    part: Part
    rank: int

    def training_examples(self) -> list[Encoded]:
        """The client's encoded training examples; UsageError where there are too few to hide in.

        An adapter after one example is that example's record: who reads the one knows the other.
        """
        examples = self.tuned.encode(self.part.train, self.settings.data).examples
        least = max(self.settings.clients.min_examples, self.site.min_examples)
        if len(examples) < least:
            raise UsageError(
                f"{self.site.name} has {counted(len(examples), 'training example')}, and of fewer "
                f"than {least} an adapter would be their record: it does not train. Where that "
                "harms nobody, set clients.min-examples lower"
            )
        return examples

    def held_out_examples(self) -> list[Encoded]:
        """The client's own held-out examples; UsageError where it holds out none."""
        if not self.part.held_out:
            few = len({example.content for example in self.part.train}) < 2
            raise UsageError(
                f"{self.site.name} holds out no examples: "
                + (
                    "it has one only, and trains on it"
                    if few
                    else "raise data.client-held-out, or name a test set with evaluation-path"
                )
            )
        return self.tuned.encode(self.part.held_out, self.settings.data).examples


def open_workplace(context: Context, lora: LoraSettings | None = None) -> Workplace:
    """The site that this context describes.

    lora: the adapter's shape as the server's message gives it; by default the run's.
    """
    settings = run_settings(context.run_config)
    lora = lora or settings.lora
    site = parse_site(context.node_config)
    labels = label_names(settings.data, settings.task, site.data_path, settings.seed)
    tuned = resident_model(settings.model, lora, site, labels)
    rank = site.rank or lora.rank_of(site.number)
    tuned.check_rank(rank)
    if site.data_path is not None:
        part = own_part(
            settings.data, site.data_path, settings.seed, settings.task, site.evaluation_path
        )
    else:
        clients = int(context.node_config.get("num-partitions", settings.clients.count))
        parts = federate(settings.data, clients, settings.seed, settings.task).parts
        if site.number >= len(parts):
            raise UsageError(f"partition-id {site.number} does not exist among {len(parts)} parts")
        part = parts[site.number]
    return Workplace(site, settings, tuned, part, rank)
