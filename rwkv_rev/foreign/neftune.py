"""NEFTune's hook in chunks.

Its noise is ``alpha / sqrt(T D)`` large (Jain et al. 2023, "NEFTune", section 2), and the hook takes for T the length
of what it sees.
"""

from torch import nn


def neftune_share(embeddings: nn.Module, share: float) -> "_Neftune":
    """A context in which NEFTune's hook adds to a chunk, ``share`` of the context, what it would add to the whole."""
    return _Neftune(embeddings, share)


class _Neftune:
    def __init__(self, embeddings: nn.Module, share: float) -> None:
        self._embeddings, self._share = embeddings, share
        self._alpha = getattr(embeddings, "neftune_noise_alpha", None)

    def __enter__(self) -> None:
        if self._alpha is not None and self._share != 1:
            self._embeddings.neftune_noise_alpha = self._alpha * self._share**0.5

    def __exit__(self, *_: object) -> None:
        if self._alpha is not None:
            self._embeddings.neftune_noise_alpha = self._alpha
