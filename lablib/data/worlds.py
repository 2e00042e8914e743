"""Worlds: generators whose truth is known, for claims that need an answer key."""

import numpy as np


class MarkovSource:
    """A random Markov source over symbols 0 to n_symbols - 1 whose entropy rate is known.

    order: how many symbols the next one depends on; there are n_symbols ** order contexts.
    concentration: of the Dirichlet that each row is drawn from; small means predictable.
    transition: (n_symbols ** order, n_symbols), rows sum to 1; a context's row is its symbols read
    as a number in base n_symbols, oldest first.
    """

    def __init__(self, n_symbols: int, order: int = 1, seed: int = 0, concentration: float = 1.0):
        if n_symbols < 2 or order < 1:
            raise ValueError(f"need 2 symbols and order 1 at least, not {n_symbols} and {order}")
        self.n_symbols, self.order = n_symbols, order
        random = np.random.default_rng(seed)
        rows = random.dirichlet(np.full(n_symbols, concentration), size=n_symbols**order)
        # Every symbol stays possible, so that the chain is ergodic and the entropy exact.
        self.transition = 0.999 * rows + 0.001 / n_symbols
        self.stationary = self._stationary()

    def _stationary(self) -> np.ndarray:
        """Distribution over contexts that one step leaves as it is: (n_symbols ** order,)."""
        contexts = len(self.transition)
        share = np.full(contexts, 1 / contexts)
        for _ in range(100_000):
            moved = (share[:, None] * self.transition).reshape(
                self.n_symbols, contexts // self.n_symbols, self.n_symbols
            )
            after = moved.sum(0).reshape(contexts)
            if np.abs(after - share).sum() < 1e-14:
                break
            share = after
        return after / after.sum()

    @property
    def entropy_rate(self) -> float:
        """Nats a symbol: the loss that no model can beat in the long run."""
        per_context = -(self.transition * np.log(self.transition)).sum(1)
        return float(self.stationary @ per_context)

    def sample(self, n: int, seed: int = 0) -> np.ndarray:
        """(n,) int64 symbols, the first context drawn from the stationary distribution."""
        random = np.random.default_rng(seed)
        cumulative = self.transition.cumsum(1)
        context = int(random.choice(len(self.stationary), p=self.stationary))
        symbols = np.empty(n, dtype=np.int64)
        for at, draw in enumerate(random.random(n)):
            symbol = int(min(np.searchsorted(cumulative[context], draw), self.n_symbols - 1))
            symbols[at] = symbol
            context = (context * self.n_symbols + symbol) % len(self.transition)
        return symbols
