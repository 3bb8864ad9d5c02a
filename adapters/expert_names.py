"""The names of experts' matrices, and of the factors that PEFT keeps for all experts at once.

Bouquet adapts each expert's matrix like any other:

    model.layers.0.mlp.experts.matrices.0.gate_up_proj.3     delta s B A (m, n) of expert 3

PEFT adapts `model.layers.0.mlp.experts.gate_up_proj`, of E experts, whole and at one rank r:

    lora_A (E r, n)    expert e has rows e r to (e + 1) r
    lora_B (m, r E)    expert e has columns e, E + e, 2 E + e, ...

Where several parameters of one module are adapted, PEFT wraps them one around the other, in the
order in which the module has them; the outermost, which is the last, is named like a module's own
factors, each further in has `base_layer.` once more.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adapters.adapter import Factors, FloatArray

MATRICES = "matrices"
NAME = re.compile(rf"(?P<module>.+)\.{MATRICES}\.(?P<place>\d+)\.(?P<name>[^.]+)\.(?P<expert>\d+)")


@dataclass(frozen=True)
class ExpertParameter:
    """A parameter of a module that holds one matrix for each expert."""

    module: str
    place: int
    """Its number among such parameters of the module."""
    name: str

    @property
    def full_name(self) -> str:
        """As `named_parameters` and PEFT's `target_parameters` call it."""
        return f"{self.module}.{self.name}"


def matrix_name(module: str, place: int, name: str, expert: int) -> str:
    """How Bouquet calls one expert's matrix.

    >>> matrix_name("mlp.experts", 0, "gate_up_proj", 3)
    'mlp.experts.matrices.0.gate_up_proj.3'
    """
    return f"{module}.{MATRICES}.{place}.{name}.{expert}"


def expert_parameters(names: Sequence[str]) -> dict[ExpertParameter, list[str]]:
    """Parameter -> the names of its matrices, by the number of the expert.

    >>> found = expert_parameters(["e.matrices.0.up.1", "q_proj", "e.matrices.0.up.0"])
    >>> [(p.full_name, matrices) for p, matrices in found.items()]
    [('e.up', ['e.matrices.0.up.0', 'e.matrices.0.up.1'])]
    """
    numbered: dict[ExpertParameter, dict[int, str]] = {}
    for name in sorted(names):
        if found := NAME.fullmatch(name):
            parameter = ExpertParameter(found["module"], int(found["place"]), found["name"])
            numbered.setdefault(parameter, {})[int(found["expert"])] = name
    return {p: [experts[e] for e in sorted(experts)] for p, experts in numbered.items()}


def peft_names(parameters: Sequence[ExpertParameter]) -> dict[ExpertParameter, str]:
    """Parameter -> what PEFT's names of its factors begin with.

    >>> up, down = ExpertParameter("e", 0, "up"), ExpertParameter("e", 1, "down")
    >>> peft_names([up, down]) == {up: "e.base_layer", down: "e"}
    True
    """
    names = {}
    for module in {parameter.module for parameter in parameters}:
        own = sorted((p for p in parameters if p.module == module), key=lambda p: p.place)
        for depth, parameter in enumerate(reversed(own)):
            names[parameter] = module + ".base_layer" * depth
    return names


def joined(factors: Sequence[Factors], rank: int) -> tuple[FloatArray, FloatArray]:
    """PEFT's two factors of all experts, at this rank and at scale 1: (E r, n) and (m, r E)."""
    (m, n), experts = factors[0].shape, len(factors)
    a, b = np.zeros((experts, rank, n), np.float32), np.zeros((m, rank, experts), np.float32)
    for expert, f in enumerate(factors):
        a[expert, : f.rank] = f.a
        b[:, : f.rank, expert] = f.b * np.float32(f.scale)
    return a.reshape(experts * rank, n), b.reshape(m, rank * experts)


def parted(a: FloatArray, b: FloatArray, experts: int, scale: float) -> list[Factors]:
    """The factors of each expert from PEFT's two of all experts.

    >>> one = Factors(np.ones((2, 4), np.float32), np.ones((3, 2), np.float32), 1.0)
    >>> [f.shape for f in parted(*joined([one, one], 2), experts=2, scale=0.5)]
    [(3, 4), (3, 4)]
    """
    rank = len(a) // experts
    rows, columns = a.reshape(experts, rank, -1), b.reshape(len(b), rank, experts)
    return [Factors(rows[e].copy(), columns[:, :, e].copy(), scale) for e in range(experts)]


def plain_and_experts(
    adapter: Mapping[str, Factors],
) -> tuple[dict[str, Factors], dict[ExpertParameter, list[Factors]]]:
    """The modules that are layers of their own, and the experts' matrices by parameter."""
    groups = expert_parameters(list(adapter))
    matrices = {name for names in groups.values() for name in names}
    plain = {name: factors for name, factors in adapter.items() if name not in matrices}
    return plain, {p: [adapter[name] for name in names] for p, names in groups.items()}
