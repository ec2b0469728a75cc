"""Several processes at one context, or with a part of the weights each: who they are, and what goes between them."""
