"""A LoRA adapter as a value, and what is added to the base in whichever form is the smaller.

    W (m, n)  frozen base matrix of one module
    A (r, n)  B (m, r)  scale s        the trained factors
    delta     s B A     (m, n)         what the adapter adds to W

The scale travels with its factors: an A and a B without it mean nothing. A sum of adapters has the
sum of their ranks; from rank mn/(m+n) on the matrix itself holds fewer values than the factors.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from core.errors import AdapterError, listing

FloatArray: TypeAlias = npt.NDArray[np.float32]
Shapes: TypeAlias = Mapping[str, tuple[int, int]]
"""Module name -> (m, n), the shape of its base matrix."""


@dataclass(frozen=True, eq=False)
class Factors:
    """The factors of one module, with delta s B A.

    a: (r, n) float32.  b: (m, r) float32.  scale: s, finite.  A rank of 0 is the zero delta.
    A is held by row and B by column, whatever comes in: each direction lies together in memory,
    stacking is a plain copy, and the same values always give the same rounding.

    Raises AdapterError when the shapes do not fit each other, the dtype is not float32 or the
    scale is not finite.

    >>> Factors(np.ones((2, 5), np.float32), np.ones((3, 2), np.float32), scale=0.5).shape
    (3, 5)
    """

    a: FloatArray
    b: FloatArray
    scale: float

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise AdapterError(
                "factors must be A (r, n) and B (m, r) with the same r; "
                f"got A {self.a.shape} and B {self.b.shape}"
            )
        if self.a.dtype != np.float32 or self.b.dtype != np.float32:
            raise AdapterError(
                f"factors are held in float32; got A {self.a.dtype} and B {self.b.dtype}"
            )
        if not np.isfinite(self.scale):
            raise AdapterError(f"the scale of factors must be finite; got {self.scale}")
        object.__setattr__(self, "a", np.ascontiguousarray(self.a))
        object.__setattr__(self, "b", np.asfortranarray(self.b))

    @property
    def rank(self) -> int:
        """r, the number of rows of A."""
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), the shape of the base matrix."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def num_values(self) -> int:
        """R (m + n), how many numbers these are."""
        return self.a.size + self.b.size


@dataclass(frozen=True, eq=False)
class Dense:
    """The delta of one module as the matrix itself: the cheaper form from rank mn/(m+n) on.

    values: (m, n) float32.

    >>> Dense(np.ones((3, 5), np.float32)).rank
    3
    """

    values: FloatArray

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.dtype != np.float32:
            raise AdapterError(
                "a dense delta is a float32 matrix (m, n); "
                f"got {self.values.dtype} of shape {self.values.shape}"
            )
        object.__setattr__(self, "values", np.ascontiguousarray(self.values))

    @property
    def rank(self) -> int:
        """min(m, n), the most that its rank can be."""
        return min(self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), the shape of the base matrix."""
        return self.values.shape

    @property
    def num_values(self) -> int:
        """M n, how many numbers these are."""
        return self.values.size


Form: TypeAlias = Factors | Dense
"""How the delta of one module is held."""
F_co = TypeVar("F_co", bound=Form, covariant=True)


class Modules(Mapping[str, F_co]):
    """The delta of every adapted module, by base-model name, in sorted order. Immutable."""

    __slots__ = ("_modules",)

    def __init__(self, modules: Mapping[str, F_co]) -> None:
        self._modules = {name: modules[name] for name in sorted(modules)}

    def __getitem__(self, name: str) -> F_co:
        return self._modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} modules, rank {self.rank}, "
            f"{self.num_parameters:,} parameters)"
        )

    @property
    def rank(self) -> int:
        """The largest rank of any module; 0 without modules."""
        return max((form.rank for form in self.values()), default=0)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module name -> (m, n)."""
        return {name: form.shape for name, form in self.items()}

    @property
    def num_parameters(self) -> int:
        """How many numbers these are: sum over modules of r (m + n), or of m n where dense."""
        return sum(form.num_values for form in self.values())


Delta: TypeAlias = Modules[Form]
"""What is added to the base: each module as factors or dense. An adapter is one."""


class Adapter(Modules[Factors]):
    """The factors of every adapted module, by base-model name, in sorted order. Immutable.

    >>> one = Factors(np.zeros((4, 6), np.float32), np.zeros((8, 4), np.float32), 2.0)
    >>> adapter = Adapter({"layers.0.v_proj": one, "layers.0.q_proj": one})
    >>> list(adapter), adapter.rank, adapter.num_parameters
    (['layers.0.q_proj', 'layers.0.v_proj'], 4, 112)
    """

    __slots__ = ()


def largest(values: FloatArray) -> float:
    """The largest |x|; 0 of nothing, NaN where any value is NaN. Makes no array of their size.

    >>> largest(np.array([1.0, -3.0], np.float32))
    3.0
    """
    if not values.size:
        return 0.0
    with np.errstate(invalid="ignore"):
        return float(max(values.max(), -values.min()))


def same_shapes(adapters: Sequence[Delta]) -> dict[str, tuple[int, int]]:
    """The shapes that all of these adapters share; AdapterError names what differs."""
    if not adapters:
        raise AdapterError("expected at least one adapter; got none")
    shapes = adapters[0].shapes
    for position, adapter in enumerate(adapters[1:], start=1):
        if adapter.shapes != shapes:
            odd = sorted(set(shapes.items()) ^ set(adapter.shapes.items()))
            raise AdapterError(
                "adapters combine only over the same modules with the same base shapes; "
                f"adapter {position} differs from adapter 0 in {listing(odd)}"
            )
    return shapes


def pays_dense(rank: int, shape: tuple[int, int]) -> bool:
    """Whether the matrix holds no more values than factors of this rank: r >= mn / (m + n).

    >>> [pays_dense(rank, (64, 64)) for rank in (31, 32)]
    [False, True]
    """
    m, n = shape
    return rank * (m + n) >= m * n


def draw(shapes: Shapes, rank: int, seed: int, scale: float) -> Adapter:
    """Fresh factors: A uniform in [-1/sqrt(n), 1/sqrt(n)], B zero, so that the delta is zero.

    The bound is that of PEFT's default (Kaiming uniform with a = sqrt(5)). The same seed gives the
    same factors on every platform, and each module its own stream, so that adding a module changes
    no other.

    >>> fresh = draw({"q": (3, 4)}, rank=2, seed=7, scale=1.0)
    >>> fresh["q"].a.shape, float(np.abs(fresh["q"].b).max())
    ((2, 4), 0.0)
    """
    modules = {}
    for name, (m, n) in shapes.items():
        stream = np.random.default_rng([seed, *name.encode()])
        a = (2.0 * stream.random((rank, n), dtype=np.float32) - 1.0) / np.float32(np.sqrt(n))
        modules[name] = Factors(a, np.zeros((m, rank), np.float32), scale)
    return Adapter(modules)
