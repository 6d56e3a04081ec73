"""No layers: a rotation is a step inside of others, and no module of a model is one by itself."""
