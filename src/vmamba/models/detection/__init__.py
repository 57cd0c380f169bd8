"""Object detection and instance segmentation: Mask R-CNN on a feature pyramid, on torchvision's detection library."""

from .mask_rcnn import MaskRCNN, mask_rcnn

__all__ = ["MaskRCNN", "mask_rcnn"]
