"""No layers for `kernelize`: the modules that hold packed weights have tensors of their own and call the functions."""
