"""Models and tokenizers: loading, adapters, and checks at start."""
