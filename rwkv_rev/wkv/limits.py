"""What GPU kernels cannot take: asked where they are chosen, without importing them, and by themselves."""

LARGEST_TRITON_HEAD = 128
"""N, numbers of a head's keys."""
