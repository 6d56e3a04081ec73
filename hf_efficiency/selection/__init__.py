"""Choosing, cleaning, ordering and mixing training data: one file a method, and `select` in front of them."""
