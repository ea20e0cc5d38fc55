"""The definition of every op in plain PyTorch: documentation, fallback and oracle in one."""
