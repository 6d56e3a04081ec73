"""Parameter-efficient fine-tuning methods, in plain PyTorch.

A method is a subclass of `LinearAdapter`: the parameters that it adds to one linear layer, and what they change. The
glue that puts it into PEFT is in `hf_efficiency.integrations.peft`.
"""
