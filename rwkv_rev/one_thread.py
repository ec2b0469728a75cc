"""What belongs to the whole process or to a model, and is changed while a loss is computed: in one thread at a time."""

import threading

one_thread = threading.RLock()
"""Held for the length of a loss's sweeps."""
