"""What holds a client near the others: FedProx's pull, and SCAFFOLD's control variates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from adapters.adapter import Adapter, Factors, FloatArray

Pairs = Mapping[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]
"""Module -> its A and B while they train."""


@dataclass
class Proximal:
    """weight / 2 ||theta - theta_start||^2 over all factors, differentiable.

    Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, arXiv 1812.06127.
    """

    weight: float
    _began: list[torch.Tensor] = field(default_factory=list)

    def __call__(
        self, factors: Sequence[tuple[torch.nn.Parameter, torch.nn.Parameter]]
    ) -> torch.Tensor:
        """The first call says where they began."""
        flat = [factor for pair in factors for factor in pair]
        if not self._began:
            self._began = [factor.detach().clone() for factor in flat]
        apart = [(f - b).square().sum() for f, b in zip(flat, self._began, strict=True)]
        return 0.5 * self.weight * torch.stack(apart).sum()


class ControlVariates:
    """Each gradient g becomes g - c_k + c; the mean of the g is the client's next c_k.

    Karimireddy et al., "SCAFFOLD", ICML 2020, arXiv 1910.06378.
    """

    def __init__(self, server: Adapter | None, own: Adapter | None) -> None:
        """server, own: c and c_k, the gradients of A and of B; None: zero."""
        self._correction: dict[str, tuple[FloatArray, FloatArray]] = {}
        for sign, control in ((1, server), (-1, own)):
            for name, f in ({} if control is None else control).items():
                a, b = self._correction.get(name, (0, 0))
                self._correction[name] = a + sign * f.a, b + sign * f.b
        self._sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._steps = 0

    def __call__(self, pairs: Pairs) -> None:
        """Correct the gradients of one step."""
        self._steps += 1
        for name, pair in pairs.items():
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in pair]
            a, b = (gradient.detach().clone() for gradient in gradients)
            before = self._sums.get(name)
            self._sums[name] = (a, b) if before is None else (before[0] + a, before[1] + b)
            for place, parameter in enumerate(pair):
                if name in self._correction and parameter.grad is not None:
                    parameter.grad += torch.from_numpy(self._correction[name][place]).to(parameter)

    def mean(self) -> Adapter:
        """The mean gradient of the steps, at scale 1."""
        modules = {}
        for name, sums in self._sums.items():
            a, b = ((total / max(self._steps, 1)).float().cpu().numpy() for total in sums)
            modules[name] = Factors(a, b, 1.0)
        return Adapter(modules)
