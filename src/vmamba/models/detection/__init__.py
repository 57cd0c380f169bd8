"""Object detection and instance segmentation: Mask R-CNN on a feature pyramid, on torchvision's detection library."""

from .loading import load_detector
from .mask_rcnn import MaskRCNN, mask_rcnn

__all__ = ["MaskRCNN", "load_detector", "mask_rcnn"]
