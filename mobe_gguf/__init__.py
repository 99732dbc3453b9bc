"""mobe-gguf: Mixture-of-Basis-Experts (arXiv 2508.05257) for llama.cpp."""

__version__ = "0.1.0"
