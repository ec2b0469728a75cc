"""transformers' common tests over our tokenizers; run by ``run.py``."""

import tempfile
import unittest

from peer_transformers.test_tokenization_common import TokenizerTesterMixin

from rwkv_rev.tokenization import RwkvByteTokenizer, RwkvWorldTokenizer


class TokenizerSuite(TokenizerTesterMixin):
    """The common tests on a tokenizer that its class makes without files."""

    test_tokenizer_from_extractor = False
    test_seq2seq = False

    @classmethod
    def setUpClass(cls) -> None:
        folder = tempfile.mkdtemp()
        cls.tokenizer_class().save_pretrained(folder)
        cls.from_pretrained_id = folder
        super().setUpClass()


class ByteTokenizationTest(TokenizerSuite, unittest.TestCase):
    tokenizer_class = RwkvByteTokenizer


class WorldTokenizationTest(TokenizerSuite, unittest.TestCase):
    tokenizer_class = RwkvWorldTokenizer


del TokenizerSuite, TokenizerTesterMixin
