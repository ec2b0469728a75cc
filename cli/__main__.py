"""``python -m rwkv_rev.cli`` is the same as ``rwkv-rev``."""

from rwkv_rev.cli import main

main()
