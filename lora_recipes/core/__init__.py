"""What every room needs: errors that teach, YAML with line numbers, files moved into place, run, adapter and
checkpoint folders, safetensors headers.

Nothing that knows what a recipe may say, and no torch.
"""
