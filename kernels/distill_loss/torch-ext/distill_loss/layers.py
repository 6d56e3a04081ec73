"""No modules: a loss takes the place of no layer of a model. Call `distill_loss`."""
