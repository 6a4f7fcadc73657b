"""Module-to-module knowledge distillation (m2mKD, arXiv 2402.16918) for vision transformers."""

__version__ = "0.1.0"
