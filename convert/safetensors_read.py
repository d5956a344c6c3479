"""Where `hotcold.safetensors_read` was before predictor bundles were read with it too."""

from hotcold.safetensors_read import SafetensorsFile, read_json

__all__ = ["SafetensorsFile", "read_json"]
