"""Methods that store a model in fewer bits: grids and codebooks, one file a method, and the storage layers."""
