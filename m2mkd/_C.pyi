"""Facts about how the m2mkd kernels were built."""

def build_info() -> dict[str, str]:
    """Compiler, flags, CUDA version and architectures, and the torch versions built for."""
