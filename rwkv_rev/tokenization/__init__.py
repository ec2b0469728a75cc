"""Tokenizers of RWKV checkpoints: world (greedy trie on bytes), byte (ids are bytes), GPT-NeoX (pile models).

Importing this package registers the first two with :class:`transformers.AutoTokenizer`, so that a converted
directory loads with ``AutoTokenizer.from_pretrained``.
"""

from transformers import AutoTokenizer

from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.tokenization.byte_level import RwkvByteTokenizer
from rwkv_rev.tokenization.choice import choose_tokenizer
from rwkv_rev.tokenization.world import RwkvWorldTokenizer

# The registry keeps every class by name and, per config, the last one as the default.
for _tokenizer_class in (RwkvByteTokenizer, RwkvWorldTokenizer):
    AutoTokenizer.register(RwkvRevConfig, tokenizer_class=_tokenizer_class, exist_ok=True)

__all__ = ["RwkvByteTokenizer", "RwkvWorldTokenizer", "choose_tokenizer"]
