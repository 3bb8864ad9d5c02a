"""The leading singular directions of the base weights, which some methods begin from."""

import numpy as np
import torch

from adapters.adapter import Adapter, Factors
from models.tuned_model import TunedModel


def principal_factors(tuned: TunedModel, rank: int) -> Adapter:
    """Module -> the best rank-r approximation of its base weight W = U S V'.

    B = (U sqrt(S))[:, :r], A = (sqrt(S) V')[:r], scale 1; at most min(m, n) directions. Signs are
    fixed by the largest entry of each row of A, so that every site computes the same.
    """
    modules = {}
    for name in tuned.shapes:
        weight = tuned.pristine_weight(name).double()  # (m, n)
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        keep = min(rank, len(values))
        root = values[:keep].sqrt()
        a, b = root[:, None] * right[:keep], left[:, :keep] * root
        largest = a.gather(1, a.abs().argmax(dim=1, keepdim=True))[:, 0]
        sign = torch.where(largest < 0, -1.0, 1.0)
        modules[name] = Factors(
            np.asarray((sign[:, None] * a).cpu().numpy(), np.float32),
            np.asarray((b * sign).cpu().numpy(), np.float32),
            1.0,
        )
    return Adapter(modules)
