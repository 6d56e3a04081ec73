"""No layers: what a packed layer is called and which tensors it has is up to who made it; call the functions."""
