"""What a server imports before it forks the processes that train: quietly, and once for all of them."""

from lora_recipes.core import cli

cli.quiet()

with cli.importing():
    from lora_recipes.training import train  # noqa: F401
