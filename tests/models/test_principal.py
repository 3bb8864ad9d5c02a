"""The leading directions of the base weights against numpy's dense decomposition in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.principal import principal_factors
from tests.dense_oracle import dense
from tools.rehearsal.tiny_models import open_model, random_adapter
from wire.codec import pack


@pytest.mark.parametrize("rank", [1, 5, 100])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_it_is_the_best_approximation_of_each_weight(
    model: str, rank: int, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(f"{model}_folder")
    tuned = open_model(folder)
    tuned.merge(random_adapter(tuned, 3))  # what is merged is not part of the base
    weights = open_model(folder).model.state_dict()
    for name, factors in principal_factors(tuned, rank).items():
        weight = weights[f"{name}.weight"].double().numpy()
        weight = weight.T if model == "gpt2" else weight
        left, values, right = np.linalg.svd(weight, full_matrices=False)
        keep = min(rank, len(values))
        best = (left[:, :keep] * values[:keep]) @ right[:keep]
        assert factors.rank == keep
        assert np.linalg.norm(dense(factors) - best) <= 1e-5 * np.linalg.norm(weight)
        rows = np.linalg.norm(factors.a.astype(np.float64), axis=1)
        assert np.allclose(rows, np.sqrt(values[:keep]), rtol=1e-4)


def test_every_site_computes_the_same(llama_folder: Path) -> None:
    one, other = (principal_factors(open_model(llama_folder), 4) for _ in range(2))
    assert pack(one) == pack(other)
    for factors in one.values():
        largest = torch.from_numpy(factors.a).abs().argmax(dim=1)
        assert (factors.a[np.arange(4), largest.numpy()] > 0.0).all()
