"""The definition of `route`."""

from torch import Tensor


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits (tokens, n_experts) -> probs, experts (tokens, top_k), counts, order."""
    probs = logits.float().softmax(-1)
    experts = probs.topk(top_k).indices
    flat = experts.flatten()
    return probs, experts, flat.bincount(minlength=logits.shape[1]), flat.argsort(stable=True)
