"""Every op written in plain PyTorch, in the order of the maths: what all other backends are tested against."""
