"""No modules: verification stands in no layer of a model, `generate` calls it between two forward passes."""
