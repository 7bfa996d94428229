"""One YAML recipe in; a checked plan and a trained adapter out. README.md holds the map."""

__version__ = "0.1.0"
