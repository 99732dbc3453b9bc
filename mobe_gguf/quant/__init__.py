"""Quantization types: which type a tensor gets, and what that costs."""
