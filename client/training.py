"""Local training of one client in one round: AdamW over the factors of its adapter.

Everything random (order of batches, dropout) derives from the seed that came with the round, so
the result depends on nothing that this process did before.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from adapters.adapter import Adapter, FloatArray
from adapters.head import Head
from client.frozen import frozen_in_bfloat16
from core.errors import BouquetError
from models.tuned_model import TunedModel
from settings.run import LocalSettings
from tasks.encoding import Batch, Encoded, order_batches

Pair = tuple[torch.nn.Parameter, torch.nn.Parameter]
Penalty = Callable[[Sequence[Pair]], torch.Tensor]
Correction = Callable[[Mapping[str, Pair]], None]
StepObserver = Callable[[int, int], None]
_observer: ContextVar[StepObserver | None] = ContextVar("step observer", default=None)


@dataclass(frozen=True, eq=False)
class Trained:
    """What a client has after its round."""

    adapter: Adapter
    head: Head
    """What trained beside the factors; empty under most tasks."""
    moments: Mapping[str, FloatArray]
    """The optimizer's moments, for a client that keeps them; empty unless asked for."""
    loss: float
    """Mean loss per target token over the steps of this round, before each step."""
    tokens: int
    """Target tokens trained on."""
    examples: int
    """Examples trained on, each as often as it was in a batch."""
    steps: int
    seconds: float
    peak_bytes: int
    """Most memory held on the GPU; 0 on the CPU."""


@contextmanager
def observe_steps(observer: StepObserver) -> Iterator[None]:
    """Call `observer(step, steps)` after every optimizer step within this context."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def plan_steps(examples: int, local: LocalSettings) -> int:
    """Optimizer steps of a round: the epochs, but at most max_steps.

    >>> from settings.run import run_settings
    >>> plan_steps(100, run_settings({"local.epochs": 2, "local.max-steps": 0}).local)
    14
    """
    batches = math.ceil(examples / local.batch_size)
    steps = local.epochs * math.ceil(batches / local.accumulation)
    return min(steps, local.max_steps) if local.max_steps else steps


def learning_rate(step: int, steps: int, local: LocalSettings) -> float:
    """The rate at a step, counted from 0: a linear rise over the warm-up, then the schedule to 0.

    >>> from settings.run import run_settings
    >>> local = run_settings({"local.warmup": 0.5, "local.learning-rate": 1.0}).local
    >>> [round(learning_rate(step, 4, local), 3) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    warm = int(local.warmup * steps)
    if step < warm:
        return local.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    factor = {
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        "linear": 1.0 - done,
        "constant": 1.0,
    }
    return local.learning_rate * factor[local.schedule]


def train(
    tuned: TunedModel,
    examples: Sequence[Encoded],
    start: Adapter,
    local: LocalSettings,
    seed: int,
    trains: str = "both",
    dropout: float = 0.0,
    head: Head | None = None,
    penalties: Sequence[Penalty] = (),
    correct: Correction | None = None,
    moments: Mapping[str, FloatArray] | None = None,
) -> Trained:
    """Train `start` on the examples, over the merged base, and return it as a new adapter.

    Each step minimises the mean loss per target token of its `batch_size * accumulation` examples.
    trains: which factors, `A`, `B` or `both`; the head trains always.
    penalties: what the loss holds besides, of the factors.
    correct: what becomes of the gradients of the factors after each backward pass.
    moments: the optimizer's of an earlier round (empty: none yet), where they are kept.
    Raises BouquetError when the loss is no longer a finite number.
    """
    began = time.perf_counter()
    device = tuned.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steps = plan_steps(len(examples), local)
    groups = _groups(examples, local, seed)
    bfloat16 = computes_in_bfloat16(local.precision, device, tuned.dtype)
    total_loss, total_tokens, total_examples = 0.0, 0, 0
    observer = _observer.get()
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        tuned.adapted(start, dropout, head) as slot,
    ):
        assert slot is not None
        torch.manual_seed(seed)
        parameters = slot.parameters(trains)
        optimizer = torch.optim.AdamW(
            parameters, lr=local.learning_rate, weight_decay=local.weight_decay, fused=True
        )
        _restore_moments(optimizer, parameters, moments or {})
        tuned.model.train()
        with (
            frozen_in_bfloat16(tuned.model, bfloat16),
            tuned.checkpointed(local.checkpointing),
        ):
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = learning_rate(step, steps, local)
                group = next(groups)
                batches = [tuned.batch([examples[i] for i in batch]) for batch in group]
                tokens = sum(batch.targets for batch in batches)
                loss = _backward(tuned, batches, tokens, bfloat16, parameters)
                if not math.isfinite(loss):
                    raise BouquetError(
                        f"the training loss became {loss} at step {step + 1} of {steps}: lower "
                        f"local.learning-rate (now {local.learning_rate:g}) or "
                        "local.max-grad-norm, or look for damaged examples"
                    )
                if correct is not None:
                    correct(dict(zip(slot.layers, slot.factors(), strict=True)))
                for penalty in penalties:
                    penalty(slot.factors()).backward()  # type: ignore[no-untyped-call]
                if local.max_grad_norm:
                    torch.nn.utils.clip_grad_norm_(parameters, local.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                total_loss += loss * tokens
                total_tokens += tokens
                total_examples += sum(map(len, group))
                if observer is not None:
                    observer(step + 1, steps)
        tuned.model.eval()
        adapter, trained_head = slot.read(), slot.read_head()
        kept = _read_moments(optimizer, parameters) if moments is not None else {}
    return Trained(
        adapter,
        trained_head,
        kept,
        loss=total_loss / total_tokens,
        tokens=total_tokens,
        examples=total_examples,
        steps=steps,
        seconds=time.perf_counter() - began,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    )


def _read_moments(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter]
) -> dict[str, FloatArray]:
    """Both moments and the number of steps of each parameter, by its place."""
    return {
        f"{place:05d}.{name}": value.detach().float().cpu().numpy().copy()
        for place, parameter in enumerate(parameters)
        for name, value in optimizer.state[parameter].items()
    }


def _restore_moments(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    moments: Mapping[str, FloatArray],
) -> None:
    """Put them back where the shapes still fit; a parameter that changed begins afresh."""
    for place, parameter in enumerate(parameters):
        found = {
            name.partition(".")[2]: torch.from_numpy(value).to(parameter.device)
            for name, value in moments.items()
            if name.startswith(f"{place:05d}.")
        }
        if found and found["exp_avg"].shape == parameter.shape:
            optimizer.state[parameter] = found


def computes_in_bfloat16(
    precision: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> bool:
    """Whether forward passes run in bfloat16: as told, or where the device has it in hardware.

    dtype: of the base; left to itself, one in float16 computes in float16, for bfloat16 would round
    its weights.
    """
    if precision != "auto":
        return precision == "bfloat16"
    if dtype == torch.float16:
        return False
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return device.type == "cpu" and bool(supported())


def _groups(
    examples: Sequence[Encoded], local: LocalSettings, seed: int
) -> Iterator[list[list[int]]]:
    """The batches of each optimizer step, epoch after epoch."""
    lengths = [len(example.ids) for example in examples]
    for epoch in range(local.epochs):
        batches = order_batches(lengths, local.batch_size, seed + epoch)
        for at in range(0, len(batches), local.accumulation):
            yield batches[at : at + local.accumulation]


def _backward(
    tuned: TunedModel,
    batches: Sequence[Batch],
    tokens: int,
    bfloat16: bool,
    parameters: Sequence[torch.nn.Parameter],
) -> float:
    """Accumulate the gradient of the mean loss over all batches of a step; return that mean."""
    half = tuned.dtype == torch.float16 and not bfloat16
    # In float16 the gradient of a mean over many tokens would vanish on its way down.
    enlarged = 2.0 ** round(math.log2(tokens)) if half else 1.0
    total = torch.zeros((), device=tuned.device)
    for batch in batches:
        with torch.autocast(tuned.device.type, torch.bfloat16, enabled=bfloat16):
            loss = tuned.loss_sum(batch) / tokens
        (loss * enlarged if half else loss).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    if half:
        _reduce(parameters, enlarged)
    return float(total)


def _reduce(parameters: Sequence[torch.nn.Parameter], enlarged: float) -> None:
    """Gradients back to their size; BouquetError where one overflowed on its way."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        raise BouquetError("a gradient overflowed in float16: take model.dtype=bfloat16 or float32")
    for gradient in gradients:
        gradient /= enlarged
