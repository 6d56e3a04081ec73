"""Smaller key-value caches: what to keep, how to store it, and how layers share a budget. Plain PyTorch."""
