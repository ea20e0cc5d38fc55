"""Models made of the fused layers."""
