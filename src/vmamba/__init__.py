"""VMamba, the Visual State Space Model (arXiv 2401.10166)."""

__version__ = "0.1.0"
