"""Exact reversal of decaying states: fixed point, packed remnants, fingerprints, and the tape that holds them.

Terms: ``docs/terms.md``.
"""
