"""Layers for other packages: ``resops.integrations.timm`` and ``resops.integrations.monai``.

Each module can be imported where its package is installed, and is imported by nothing else.
"""
