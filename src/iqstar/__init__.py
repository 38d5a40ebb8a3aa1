"""iqstar: Inverse-Q*, token-level alignment of language models without preference labels."""

__version__ = "0.1.0"
