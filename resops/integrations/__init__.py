"""Layers for other packages: ``resops.integrations.timm``, ``.monai`` and ``.nnunet``.

Each module can be imported where its package is installed, and is imported by nothing else.
"""
