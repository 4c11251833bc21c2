"""How far one distribution over tokens lies from another. Knows nothing of models."""

import torch
from torch import Tensor


def divergence(reference: Tensor, other: Tensor) -> float:
    """KL(reference || other) in nats, summed over rows, of log-probabilities (m, V); the sum is float64."""
    return float((reference.exp() * (reference - other)).sum(dtype=torch.float64))
