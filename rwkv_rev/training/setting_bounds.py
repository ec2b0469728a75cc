"""The least and the most that settings of a fine-tuning run may be."""

from collections.abc import Mapping

LEAST: Mapping[str, int] = {
    "context_length": 2,
    "chunk_length": 1,
    "batch_size": 1,
    "grad_accum": 1,
    "context_parallel": 1,
    "max_steps": 1,
    "warmup": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "lora_rank": 1,
    "eval_every": 0,
    "eval_tokens": 0,
    "save_every": 0,
    "save_total": 1,
    "patience": 1,
    "min_delta": 0,
    "sample_tokens": 1,
    "log_every": 1,
    "num_workers": 1,
    "seed": 0,
}
MOST: Mapping[str, int] = {
    "context_length": 2**40,
    "chunk_length": 2**40,
    "batch_size": 2**20,
    "grad_accum": 2**40,
    "context_parallel": 2**20,
    "max_steps": 2**40,
    "warmup": 2**40,
    "epochs": 2**20,
    "lora_rank": 2**20,
    "sample_tokens": 2**20,
    "num_workers": 61,
    "seed": 2**32 - 1,
}
"""A trillion tokens are more than any data holds; numpy's generators take seeds of 32 bits, Windows 61 processes."""
