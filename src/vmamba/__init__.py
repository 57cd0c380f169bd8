"""VMamba, the Visual State Space Model (arXiv 2401.10166)."""

from .models import (
    FeatureGetter,
    UPerNet,
    VMamba,
    VMambaConfig,
    convert,
    create_upernet,
    from_official,
    list_models,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    upernet_from_checkpoint,
)

__version__ = "0.1.0"

__all__ = [
    "FeatureGetter",
    "UPerNet",
    "VMamba",
    "VMambaConfig",
    "__version__",
    "convert",
    "create_upernet",
    "from_official",
    "list_models",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
    "upernet_from_checkpoint",
]
