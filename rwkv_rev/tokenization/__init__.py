"""Tokenizers of RWKV checkpoints: world (greedy trie on bytes), byte (ids are bytes), GPT-NeoX (pile models).

``AutoTokenizer`` finds the first two in a converted directory (:mod:`rwkv_rev.registration`).
"""

from rwkv_rev.tokenization.byte_level import RwkvByteTokenizer
from rwkv_rev.tokenization.choice import choose_tokenizer
from rwkv_rev.tokenization.world import RwkvWorldTokenizer

__all__ = ["RwkvByteTokenizer", "RwkvWorldTokenizer", "choose_tokenizer"]
