"""rwkv-rev: pretrained RWKV-4/5 checkpoints as reversible cells, proven equal, trainable over very long contexts."""

__version__ = "0.1.0"
