"""What each generation of RWKV is: a file for each, and the registry of them."""
