"""What PyTorch's autograd is asked and told where a gradient is put together of the parts of chunks."""
