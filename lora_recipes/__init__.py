"""One YAML recipe in; a checked plan and a trained adapter out. docs/contributing.md shows the rooms."""

__version__ = "0.1.0"
