"""The divergence of two heads over one vocabulary, slab by slab: the vendor's products, and passes over two slabs of logits.

`walk` makes the logits and multiplies the operands; what happens in between, element by element, are the four functions that
`reference` specifies, in C++ (`engine`), in Triton (`backends.triton.divergence`) or in PyTorch.
"""
