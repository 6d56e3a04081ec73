"""Faster and smaller text generation."""
