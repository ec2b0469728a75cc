"""What the layouts of flash-linear-attention (https://github.com/fla-org) share, for RWKV-6 and RWKV-7.

Its classes are made of ``config.json`` alone, and its own code refuses weights of other sizes: a file whose tensors
contradict its configuration is damaged, or of another model.
"""

FLA = "fla"
SIZES = {
    "hidden_size": ("D", "model.embeddings.weight"),
    "vocab_size": ("V", "model.embeddings.weight"),
    "intermediate_size": ("F", "channel_mix.key.weight"),
}
"""Fields of a configuration: a letter, and a tensor that has it."""
MULTIPLE = 32
"""Of which its channel mix is made as wide as ``hidden_ratio`` says, or wider, where no width is given."""


def channel_mix_sizes(hidden_size: int, ratio: float) -> tuple[int, int]:
    """F by ``hidden_ratio``: as it is, which our exports may say, and as it would be rounded."""
    exact = int(hidden_size * ratio)
    return exact, -(-exact // MULTIPLE) * MULTIPLE
