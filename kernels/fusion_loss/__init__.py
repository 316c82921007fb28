"""The fused linear cross-entropy over sparse soft targets.

`passes` goes over the tokens in blocks and over the mesh; `terms` is the mathematics of one token; `xla` makes a
block's logits and their gradient; `reference` is the dense float64 definition that all of it is held to.
"""
