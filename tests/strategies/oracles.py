"""Every method written from its paper's formula in dense float64, with a state of its own.

Nothing here calls the code under test. Factors are pairs (A, s B): scale 1. Best approximations
come from np.linalg.svd of the dense (m, n) matrix, least squares from np.linalg.lstsq on systems
written out in full.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np

from tests.dense_oracle import Deltas, Dense, double, leading, zero_deltas

Pair: TypeAlias = tuple[Dense, Dense]
Pairs: TypeAlias = dict[str, Pair]
Trained: TypeAlias = Mapping[str, Mapping[str, Pair]]
"""Client -> module -> (A, s B) after training."""
Shares: TypeAlias = Mapping[str, float]
"""Client -> p_k."""


class Oracle(Protocol):
    """A method: what a client of a rank begins from, and the global model after a round."""

    def sent(self, rank: int) -> Pairs | None:
        """Module -> at most `rank` directions to train, or None for fresh factors."""

    def round(self, trained: Trained, shares: Shares) -> None:
        """Aggregate."""

    def delta(self) -> Deltas:
        """The global model less W."""


def cut(pairs: Pairs, rank: int) -> Pairs:
    return {name: (a[:rank], b[:, :rank]) for name, (a, b) in pairs.items()}


def products(pairs: Pairs) -> Deltas:
    return {name: b @ a for name, (a, b) in pairs.items()}


def mean_delta(trained: Trained, shares: Shares, name: str) -> Dense:
    """sum_k p_k s_k B_k A_k."""
    return double(sum(p * trained[k][name][1] @ trained[k][name][0] for k, p in shares.items()))


def padded_means(trained: Trained, shares: Shares, like: Pairs) -> Pairs:
    """sum_k p_k pad(A_k) and sum_k p_k pad(s_k B_k), at the rank of `like`."""
    means = {name: (0.0 * a, 0.0 * b) for name, (a, b) in like.items()}
    for k, p in shares.items():
        for name, (a, b) in trained[k].items():
            means[name][0][: len(a)] += p * a
            means[name][1][:, : len(a)] += p * b
    return means


@dataclass
class Sum:
    """FLoRA, and the dense reference: W <- W + sum_k p_k s_k B_k A_k; every round begins anew."""

    fresh: Pairs
    held: Deltas = field(init=False)
    energy: float = 1.0
    """FLoRIST: of each round's sum the fewest singular directions with this share of energy."""

    def __post_init__(self) -> None:
        self.held = zero_deltas(self.fresh)

    def sent(self, rank: int) -> Pairs | None:
        return None

    def round(self, trained: Trained, shares: Shares) -> None:
        for name in self.held:
            found = mean_delta(trained, shares, name)
            self.held[name] = self.held[name] + thresholded(found, self.energy)

    def delta(self) -> Deltas:
        return self.held


def thresholded(delta: Dense, energy: float) -> Dense:
    """The fewest singular directions whose squares make up this share, counted one by one."""
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    kept, held = 0.0 * delta, 0.0
    for j in range(len(s)):
        if energy < 1.0 and held >= energy * (s**2).sum():
            break
        kept, held = kept + s[j] * np.outer(u[:, j], v[j]), held + s[j] ** 2
    return double(kept)


@dataclass
class Mean:
    """FedAvg and zero-padding: A <- sum p_k A_k, s B <- sum p_k s_k B_k."""

    start: Pairs

    def sent(self, rank: int) -> Pairs | None:
        return cut(self.start, rank)

    def round(self, trained: Trained, shares: Shares) -> None:
        self.start = padded_means(trained, shares, self.start)

    def delta(self) -> Deltas:
        return products(self.start)


@dataclass
class WeighedBySize(Mean):
    """HetLoRA: zero-padding, with weights p_k ||s_k B_k A_k||_F over all modules."""

    def round(self, trained: Trained, shares: Shares) -> None:
        sizes = {
            k: p * np.linalg.norm(np.concatenate([(b @ a).ravel() for a, b in trained[k].values()]))
            for k, p in shares.items()
        }
        weights = {k: float(size / sum(sizes.values())) for k, size in sizes.items()}
        super().round(trained, weights)


@dataclass
class DirectionByDirection(Mean):
    """RBLA: each direction is the mean over the clients that have it; else it stays."""

    def round(self, trained: Trained, shares: Shares) -> None:
        for name, (a, b) in self.start.items():
            for j in range(len(a)):
                having = [k for k in shares if len(trained[k][name][0]) > j]
                if having:
                    whole = sum(shares[k] for k in having)
                    a[j] = sum(shares[k] / whole * trained[k][name][0][j] for k in having)
                    b[:, j] = sum(shares[k] / whole * trained[k][name][1][:, j] for k in having)


@dataclass
class BestOfRank(Mean):
    """FlexLoRA: the first R singular directions of the dense mean, B = U S and A = V'."""

    def round(self, trained: Trained, shares: Shares) -> None:
        for name in self.start:
            u, s, v = leading(mean_delta(trained, shares, name), self.largest)
            self.start[name] = v, u * s

    def __post_init__(self) -> None:
        self.largest = max(len(a) for a, _ in self.start.values())


@dataclass
class OneFactor(Mean):
    """FFA-LoRA and RoLoRA: only the factor in turn is averaged, the other is what was sent."""

    turns: tuple[str, ...] = ("B",)
    rounds: int = 0

    @property
    def turn(self) -> str:
        return self.turns[self.rounds % len(self.turns)]

    def round(self, trained: Trained, shares: Shares) -> None:
        for name, (a, b) in self.start.items():
            new = [sum(p * trained[k][name][i] for k, p in shares.items()) for i in (0, 1)]
            self.start[name] = (double(new[0]), b) if self.turn == "A" else (a, double(new[1]))
        self.rounds += 1


@dataclass
class MeanAndResidual(Mean):
    """FedEx-LoRA: FedAvg, and sum_k p_k s_k B_k A_k less its product is added to the base."""

    def __post_init__(self) -> None:
        self.base = zero_deltas(self.start)

    def round(self, trained: Trained, shares: Shares) -> None:
        super().round(trained, shares)
        for name, (a, b) in self.start.items():
            self.base[name] = self.base[name] + mean_delta(trained, shares, name) - b @ a

    def delta(self) -> Deltas:
        return {name: self.base[name] + b @ a for name, (a, b) in self.start.items()}


@dataclass
class Corrected(Mean):
    """LoRA-FAIR: FedAvg's A; B' + C, with C the ridge solution of C A ~ T - B' A.

    [A' ; sqrt(l) I] C' ~ [(T - B' A)' ; 0] written out and solved by least squares.
    """

    ridge: float = 0.01

    def round(self, trained: Trained, shares: Shares) -> None:
        super().round(trained, shares)
        for name, (a, b) in self.start.items():
            penalty = self.ridge * float((a**2).sum()) / len(a)
            system = np.vstack([a.T, penalty**0.5 * np.eye(len(a))])
            short = mean_delta(trained, shares, name) - b @ a
            wanted = np.vstack([short.T, np.zeros((len(a), len(b)))])
            self.start[name] = a, b + np.linalg.lstsq(system, wanted, rcond=None)[0].T


@dataclass
class Residual(Mean):
    """FRLoRA: W <- W + B' A' - B_0 A_0, and every round begins from A_0, B_0 again."""

    def __post_init__(self) -> None:
        self.held = zero_deltas(self.start)

    def round(self, trained: Trained, shares: Shares) -> None:
        for name, (a, b) in padded_means(trained, shares, self.start).items():
            self.held[name] = self.held[name] + b @ a - self.start[name][1] @ self.start[name][0]

    def delta(self) -> Deltas:
        return self.held


@dataclass
class Mixtures(Mean):
    """FLoRA-NA: B = sum x_k s_k B_k and A = sum y_k A_k, x and y by turns by least squares.

    The unknowns are the coefficients of whole dense matrices, written as long vectors.
    """

    sweeps: int = 10

    def round(self, trained: Trained, shares: Shares) -> None:
        for name in self.start:
            pairs = [trained[k][name] for k in shares]
            wanted = mean_delta(trained, shares, name).ravel()
            x = y = np.array(list(shares.values()))
            for _ in range(self.sweeps):
                a = sum(c * pair[0] for c, pair in zip(y, pairs, strict=True))
                columns = np.stack([(b @ a).ravel() for _, b in pairs], axis=1)
                x = np.linalg.lstsq(columns, wanted, rcond=None)[0]
                b = sum(c * pair[1] for c, pair in zip(x, pairs, strict=True))
                columns = np.stack([(b @ a).ravel() for a, _ in pairs], axis=1)
                y = np.linalg.lstsq(columns, wanted, rcond=None)[0]
            self.start[name] = (
                double(sum(c * pair[0] for c, pair in zip(y, pairs, strict=True))),
                double(sum(c * pair[1] for c, pair in zip(x, pairs, strict=True))),
            )


@dataclass
class Warm:
    """FLoRA and FLoRIST with a warm start; clients keep the directions beyond their rank frozen.

    G <- G + sum_k p_k (delta_k after training - delta_k before), FLoRIST's sum thresholded; then
    the first r singular directions of the increment or of G are what is trained next.
    """

    fresh: Pairs
    policy: str
    energy: float = 1.0
    start: Pairs | None = None

    def __post_init__(self) -> None:
        self.held = zero_deltas(self.fresh)

    def sent(self, rank: int) -> Pairs | None:
        return None if self.start is None else cut(self.start, rank)

    def round(self, trained: Trained, shares: Shares) -> None:
        start: Pairs = {}
        for name, (fresh, _) in self.fresh.items():
            moved = zero_deltas(self.fresh)[name]
            for k, p in shares.items():
                a, b = trained[k][name]
                before = 0.0 if self.start is None else self._trained_part(name, len(a))
                moved = moved + p * (b @ a - before)
            moved = thresholded(moved, self.energy)
            self.held[name] = self.held[name] + moved
            source = self.held[name] if self.policy == "global" else moved
            u, s, v = leading(source, len(fresh))
            kept = 0.0 if self.policy == "keep-a" else 1.0
            start[name] = v / 3**0.5, kept * u * s * 3**0.5  # rows as long as freshly drawn ones
        self.start = start

    def _trained_part(self, name: str, rank: int) -> Dense:
        assert self.start is not None
        a, b = self.start[name]
        return double(b[:, :rank] @ a[:rank])

    def delta(self) -> Deltas:
        return self.held


@dataclass
class LevelByLevel(BestOfRank):
    """raFLoRA: summed direction by direction, each over those who have it; then as FlexLoRA."""

    def round(self, trained: Trained, shares: Shares) -> None:
        for name, (a, b) in self.start.items():
            total = np.zeros((len(b), a.shape[1]))
            for j in range(max(len(trained[k][name][0]) for k in shares)):
                having = [k for k in shares if len(trained[k][name][0]) > j]
                whole = sum(shares[k] for k in having)
                for k in having:
                    own_a, own_b = trained[k][name]
                    total += shares[k] / whole * np.outer(own_b[:, j], own_a[j])
            u, s, v = leading(total, self.largest)
            self.start[name] = v, u * s


@dataclass
class Decomposed(Mean):
    """FedSVD: the mean of B; every so many rounds (V', U S) of the dense B A, of the same rank."""

    every: int = 1
    rounds: int = 0

    def round(self, trained: Trained, shares: Shares) -> None:
        self.rounds += 1
        for name, (a, _) in self.start.items():
            b = double(sum(p * trained[k][name][1] for k, p in shares.items()))
            if self.rounds % self.every == 0:
                u, s, v = np.linalg.svd(b @ a, full_matrices=False)
                a, b = v[: len(a)], u[:, : len(a)] * s[: len(a)]
            self.start[name] = a, b


@dataclass
class Turned(Mean):
    """FedRot-LoRA: R by Procrustes from the start of this round, A in one round and B in the next.

    The orthogonal matrix nearest to M is M (M' M)^(-1/2), here from an eigendecomposition.
    """

    rounds: int = 0

    def round(self, trained: Trained, shares: Shares) -> None:
        before = {name: (a.copy(), b.copy()) for name, (a, b) in self.start.items()}
        after = {name: (0.0 * a, 0.0 * b) for name, (a, b) in before.items()}
        for k, p in shares.items():
            for name, (a, b) in trained[k].items():
                m = a @ before[name][0].T if self.rounds % 2 == 0 else b.T @ before[name][1]
                values, vectors = np.linalg.eigh(m.T @ m)
                r = m @ vectors @ np.diag(values**-0.5) @ vectors.T
                after[name] = after[name][0] + p * r.T @ a, after[name][1] + p * b @ r
        self.start = after
        self.rounds += 1


Step: TypeAlias = Callable[[Dense, dict[str, Dense]], Dense]


def momentum(beta: float, rate: float) -> Step:
    """FedAvgM, arXiv 1909.06335: m <- beta m + d."""

    def step(d: Dense, held: dict[str, Dense]) -> Dense:
        held["m"] = double(beta * held.get("m", 0.0 * d) + d)
        return double(rate * held["m"])

    return step


def adaptive(kind: str, rate: float) -> Step:
    """FedAdam and FedYogi, arXiv 2003.00295, algorithm 2, value by value, with v_0 = tau^2."""
    beta1, beta2, tau = 0.9, 0.99, 1e-3

    def step(d: Dense, held: dict[str, Dense]) -> Dense:
        m, v = held.get("m", 0.0 * d), held.get("v", 0.0 * d + tau**2)
        found = 0.0 * d
        for place, delta in np.ndenumerate(d):
            m[place] = beta1 * m[place] + (1 - beta1) * delta
            square = delta * delta
            if kind == "adam":
                v[place] = beta2 * v[place] + (1 - beta2) * square
            elif v[place] > square:
                v[place] -= (1 - beta2) * square
            elif v[place] < square:
                v[place] += (1 - beta2) * square
            found[place] = rate * m[place] / (v[place] ** 0.5 + tau)
        held["m"], held["v"] = m, v
        return double(found)

    return step


@dataclass
class Stepping(Mean):
    """A step of the server's from the start towards the padded means, factor by factor."""

    step: Step
    turns: tuple[str, ...] = ("both",)
    """The factors that train, round by round; the others rest."""
    rounds: int = 0
    held: dict[tuple[str, int], dict[str, Dense]] = field(default_factory=dict)

    def round(self, trained: Trained, shares: Shares) -> None:
        means = padded_means(trained, shares, self.start)
        turn = self.turns[self.rounds % len(self.turns)]
        self.rounds += 1
        for name, pair in self.start.items():
            parts = list(pair)
            for place, factor in enumerate("AB"):
                if turn in (factor, "both"):
                    held = self.held.setdefault((name, place), {})
                    parts[place] = parts[place] + self.step(means[name][place] - pair[place], held)
            self.start[name] = parts[0], parts[1]
