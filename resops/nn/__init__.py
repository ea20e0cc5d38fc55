"""Layers made of the fused ops, with the names and signatures of torch, torchvision and timm."""
