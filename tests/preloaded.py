"""What the server of :mod:`processes` imports before it forks: every library that a command imports sooner or later.

Imports, and tables that they make. Whatever computes may start threads, which do not live on in what is forked.
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
import rich.table  # what shows results
import torch.distributed.algorithms.ddp_comm_hooks
import torch.distributed.fsdp
import torch.distributed.run
import torch.utils.serialization.config
import typer.main
from bptt_cases import tiny_model  # what ranks compute, and pytest with it
from processes import run_command  # what every process begins with
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import rwkv_rev.cli
import rwkv_rev.distributed.sharded_blocks
import rwkv_rev.modeling
import rwkv_rev.token_fields
import rwkv_rev.training.finetune

if find_spec("pydantic"):  # newer typers bring and import it
    import pydantic
if find_spec("torch.profiler._cupti_monitor"):  # what steps of an optimizer look for, in some versions
    import torch.profiler._cupti_monitor

get_checkpoint_conversion_mapping("")  # compiles patterns of all models, which loading any of them asks for
PIL.Image.init()  # imports its file formats
commands = typer.main.get_command(rwkv_rev.cli.build_app()).commands  # imports them
given = ["model", "--data", "data", "--output", "output"]
commands["finetune"].make_context("", given)  # imports what reads options
gc.set_threshold(10_000, 10, 10)  # as in conftest.py
gc.freeze()  # what is forked need not look here for garbage
