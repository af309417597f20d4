"""CLIP's vision tower, used inside multimodal families."""
