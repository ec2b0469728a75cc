"""Code of others inside a model whose context is cut into chunks: found, known, declared, or refused by name."""
