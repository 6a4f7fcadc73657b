"""m2mkd: module-to-module knowledge distillation for modular vision transformers (arXiv 2402.16918)."""

__version__ = "0.1.0"
