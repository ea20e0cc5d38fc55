"""One module per op: argument checks, the choice of the backend, autograd and fake kernels."""
