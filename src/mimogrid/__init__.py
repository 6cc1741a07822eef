"""mimogrid: every module of a multimodal model on its own grid of ranks, trained as one pipeline."""

from mimogrid.former_names import install as _install


_install()

__version__ = "0.1.0"
