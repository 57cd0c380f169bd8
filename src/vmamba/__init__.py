"""VMamba, the Visual State Space Model (arXiv 2401.10166)."""

from .models import VMamba, VMambaConfig, list_models

__version__ = "0.1.0"

__all__ = ["VMamba", "VMambaConfig", "__version__", "list_models"]
