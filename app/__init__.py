"""X-ray -> CT cascade: three 3D diffusion models trained one after another, coarse to fine."""

__version__ = "0.1.0"
