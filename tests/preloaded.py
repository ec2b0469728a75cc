"""What the server of :mod:`processes` imports before it forks: every library that a command imports sooner or later.

Imports, and a table of patterns. Whatever computes may start threads, which do not live on in what is forked.
"""
# ruff: noqa: F401

import gc
from importlib.util import find_spec

import accelerate
import datasets
import matplotlib.backends.backend_agg
import matplotlib.figure
import peft
import PIL.Image
import torch.distributed.fsdp
import torch.distributed.run
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import rwkv_rev.cli
import rwkv_rev.modeling
import rwkv_rev.training.finetune

if find_spec("pydantic"):  # newer typers bring and import it
    import pydantic

get_checkpoint_conversion_mapping("")  # compiles patterns of all models, which loading any of them asks for
PIL.Image.init()  # imports its file formats
gc.freeze()  # what is forked need not look here for garbage
