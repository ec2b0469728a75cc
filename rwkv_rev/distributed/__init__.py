"""Several processes at one context: their group, and how states go from one to the next."""
