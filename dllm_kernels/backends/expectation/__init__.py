"""The mean of an embedding's rows under a head's distribution, slab by slab: the vendor's products, and passes over logits.

`walk` makes the logits and multiplies what becomes of them; what happens in between, element by element, are the three functions
that `reference` specifies, in C++ (`engine`), in Triton (`backends.triton.expectation`) or in PyTorch.
"""
