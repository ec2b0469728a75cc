"""The code behind every figure in docs/benchmarks.md, run by ``rwkv-rev bench``; one file per kind of measurement."""
