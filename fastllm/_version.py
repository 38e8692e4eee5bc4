"""The version, and the releases of PyTorch that it was tested with, in one place."""

__version__ = "0.1.0"
TESTED_TORCH = ("2.13", "2.13")  # the oldest and the newest; others that pyproject.toml allows may work as well
