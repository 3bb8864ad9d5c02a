"""Checks of what a site brings: device, base model, data, rank, memory and disk.

The model is loaded and the data encoded as the ClientApp will do it, so that what cannot work says
so here and not in round one.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.errors import BouquetError
from core.units import human_bytes
from deployment.findings import Finding, fine, mend, note
from deployment.machine import free_disk, free_memory, nearest_folder
from deployment.memory import MemoryEstimate, estimate_memory
from settings.run import EMBEDDED, RunSettings
from settings.site import Site

PACKED = {"none": 1, "int8": 4, "nf4": 8}
"""How many times smaller quantized weights may be than the files that they come from."""
TunedModel = Any
"""models.tuned_model.TunedModel, which loads torch and is imported only when it is needed."""


def check_site(site: Site, settings: RunSettings, identity: str = "") -> Iterator[Finding]:
    """Everything but the way to the SuperLink.

    identity: of the base model, as the coordinator announced it; empty: not compared.
    """
    device = site.device or settings.model.device
    try:
        free, found = _device(device)
    except BouquetError as error:
        yield mend("device", str(error))
        return
    yield fine("device", found)
    path = Path(site.model_path or settings.model.path)
    weights = _weights_on_disk(path) // PACKED[settings.model.quantization]
    if free is not None and weights > free:
        yield mend(
            "memory",
            f"the weights alone take {human_bytes(weights)}, {human_bytes(free)} are free: use "
            "another device, a smaller base model, model.dtype=bfloat16 or model.quantization=nf4",
        )
        return
    try:
        tuned = _load(site, settings)
    except BouquetError as error:
        yield mend("base model", str(error))
        return
    yield _identity(tuned, identity)
    rank = site.rank or settings.lora.rank_of(site.number)
    yield from _data(site, settings, tuned)
    yield from _rank_and_memory(tuned, settings, rank, free)
    if site.cache_path is not None:
        yield _disk(Path(site.cache_path), tuned, rank)


def _device(name: str) -> tuple[int | None, str]:
    """Free bytes of the device that trains, and what to say of it."""
    import torch

    from models.base_model import choose_device

    device = choose_device(name)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        card = torch.cuda.get_device_name(device)
        return free, f"{device}: {card}, {human_bytes(free)} of {human_bytes(total)} free"
    return free_memory(), f"{device}, threads: {torch.get_num_threads()}"


def _weights_on_disk(path: Path) -> int:
    """Bytes of a model folder's weights; 0 where it is no folder."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.is_dir() else 0


def _load(site: Site, settings: RunSettings) -> TunedModel:
    from models.tuned_model import resident_model
    from tasks.labels import label_names

    path = site.model_path
    if path is not None and path != EMBEDDED and not Path(path).is_dir():
        raise BouquetError(f"there is no folder {path}: set model-path in site.toml")
    labels = label_names(settings.data, settings.task, site.data_path, settings.seed)
    return resident_model(settings.model, settings.lora, site, labels)


def _identity(tuned: TunedModel, wanted: str) -> Finding:
    found = tuned.base.identity
    if not wanted:
        return note("base model", f"loads; identity {found}: compare it with the coordinator's")
    if found != wanted:
        return mend(
            "base model",
            f"identity {found}, the coordinator's is {wanted}: other weights or tokenizer, another "
            "model.dtype or other data.labels; get the model from the same place",
        )
    return fine("base model", f"loads, identity {found} as announced")


def _data(site: Site, settings: RunSettings, tuned: TunedModel) -> Iterator[Finding]:
    from tasks.partition import own_part
    from tasks.reasons import count_lines

    if site.data_path is None:
        yield mend("data", "site.toml names no data-path")
        return
    try:
        part = own_part(
            settings.data, site.data_path, settings.seed, settings.task, site.evaluation_path
        )
        encoding = tuned.encode(part.train, settings.data)
        if part.held_out:
            tuned.encode(part.held_out, settings.data)
    except BouquetError as error:
        yield mend("data", str(error))
        return
    count, batch = len(encoding.examples), settings.local.batch_size
    held = "to test" if site.evaluation_path else "held out"
    counts = Counter(part.counts) + Counter(encoding.counts)
    words = "; ".join(
        [
            f"{count:,} examples to train on, {len(part.held_out):,} {held}",
            *count_lines(counts, settings.data),
            *(f"to test: {line}" for line in count_lines(part.test_counts, settings.data)),
        ]
    )
    if count < batch:
        yield note("data", f"{words}: less than one batch of {batch} (local.batch-size)")
    else:
        yield fine("data", words)


def _rank_and_memory(
    tuned: TunedModel, settings: RunSettings, rank: int, free: int | None
) -> Iterator[Finding]:
    try:
        tuned.check_rank(rank)
    except BouquetError as error:
        yield mend("rank", str(error))
        return
    yield fine("rank", f"{rank} on {len(tuned.targets)} modules")
    needed = estimate_for(tuned, settings, rank)
    words = (
        f"about {human_bytes(needed.total)} needed (weights {human_bytes(needed.weights)}, adapter "
        f"{human_bytes(needed.adapter)}, activations {human_bytes(needed.activations)})"
    )
    if free is None:
        yield note("memory", f"{words}; this system does not say what is free")
    elif needed.total > free:
        yield mend(
            "memory",
            f"{words}, {human_bytes(free)} free: lower rank in site.toml, or ask for a smaller "
            "local.batch-size (with more local.accumulation) or data.context, or for "
            "local.checkpointing",
        )
    else:
        yield fine("memory", f"{words}, {human_bytes(free)} free")


def estimate_for(tuned: TunedModel, settings: RunSettings, rank: int) -> MemoryEstimate:
    """The estimate for this model and the run's batches."""
    parameters = list(tuned.model.parameters())
    tokens = settings.local.batch_size * min(settings.data.context, tuned.base.context)
    return estimate_memory(
        tuned.shapes,
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        value_bytes=parameters[0].element_size(),
        logits=tuned.most_logits(tokens),
        rank=rank,
        tokens=tokens,
        beside=0 if tuned.writes_base else settings.rounds * sum(settings.ranks()),
    )


def _disk(cache: Path, tuned: TunedModel, rank: int) -> Finding:
    parent = nearest_folder(cache)
    try:
        probe = parent / ".bouquet-check"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return mend("disk", f"{parent} cannot be written: {error.strerror} (cache-path)")
    free = free_disk(cache)
    adapter = 4 * rank * sum(m + n for m, n in tuned.shapes.values())
    most = 4 * sum(min(m, n) * (m + n) for m, n in tuned.shapes.values())
    words = f"{human_bytes(free)} free for the cache, which takes at most {human_bytes(most)}"
    if free < adapter:
        return mend("disk", f"{words}: make room, or name another cache-path in site.toml")
    return fine("disk", words) if free > most else note("disk", words)
