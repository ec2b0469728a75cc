"""What is forecast and what is reported mean the same: the peak beyond the loaded program."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from finetune_cases import counting_text, environment, settings
from processes import run_command

from rwkv_rev.training.finetune import plan
