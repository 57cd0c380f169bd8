"""VMamba, the Visual State Space Model (arXiv 2401.10166)."""

from .models import (
    FeatureGetter,
    VMamba,
    VMambaConfig,
    convert,
    from_official,
    list_models,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)

__version__ = "0.1.0"

__all__ = [
    "FeatureGetter",
    "VMamba",
    "VMambaConfig",
    "__version__",
    "convert",
    "from_official",
    "list_models",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
]
