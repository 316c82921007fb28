"""The fused linear cross-entropy over sparse soft targets.

`passes` goes over the tokens in blocks and over the mesh; `events` and `terms` are the mathematics of one token; `xla`
makes a block's logits and their gradient, and so do the Pallas kernels `tpu` and `gpu`; `reference` is the dense
float64 definition that all of it is held to.
"""
