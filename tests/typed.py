"""What a test knows to be there, as a type checker needs to know it too."""

from typing import TypeVar

T = TypeVar("T")


def there(value: T | None) -> T:
    """`value`, which is not None: an adapter of a recipe with `lora:`, the memory of a plan that has it."""
    assert value is not None
    return value
