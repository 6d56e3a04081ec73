"""No modules: this updates the weights of layers that stay as they are, and takes no layer's place."""
