"""Gradient caching: encode without a graph, then encode each chunk again with the gradients of its features.

The loss sees the features of the whole batch, so it keeps all contrastive negatives, unlike accumulation
(gradient caching: Gao, Zhang, Han and Callan, arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class ChunkedFeatures:
    """Features of `inputs` [B, ...], encoded in `count` chunks without a graph, and their backward pass.

    features: [B, D], a leaf. Once a loss's backward pass has filled its gradient, `backward()` encodes every chunk a
    second time, with a graph and the random state of the first time, and adds to the parameters' gradients. The random
    state then is as if every chunk had been encoded once. Exact if `encode` treats rows independently, which batch
    norms in training mode do not.

    backpropagate: adds the gradient of a scalar to the parameters'.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        inputs: Tensor,
        count: int,
        device: torch.device,
        backpropagate: Callable[[Tensor], None] = Tensor.backward,
    ) -> None:
        self.encode, self.chunks, self.device = encode, inputs.tensor_split(count), device
        self.backpropagate = backpropagate
        self.states: list[list[Tensor]] = []
        parts = []
        with torch.no_grad():
            for chunk in self.chunks:
                self.states.append(self._random_state())
                parts.append(encode(chunk))
        self.features = torch.cat(parts).requires_grad_()  # [B, D]

    def backward(self, before_last: Callable[[], object] = lambda: None) -> None:
        """Run the backward pass of every chunk. before_last: called before that of the last one."""
        assert self.features.grad is not None, "the loss's backward pass comes first"
        after = self._random_state()
        gradients = self.features.grad.tensor_split(len(self.chunks))
        for left, chunk, gradient, state in zip(
            reversed(range(len(self.chunks))), self.chunks, gradients, self.states, strict=True
        ):
            self._set_random_state(state)
            features = self.encode(chunk)
            if not features.requires_grad:  # a frozen tower
                break
            if left == 0:
                before_last()
            self.backpropagate((features * gradient).sum())
        self._set_random_state(after)

    def _random_state(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return states

    def _set_random_state(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self.device)
