"""How a run is spread over processes: the kinds of layout that recipes can be trained under. Imports no
torch."""

from dataclasses import dataclass

ONE, DDP, FSDP2, ZERO2, ZERO3 = "one process", "DDP", "FSDP2", "ZeRO-2", "ZeRO-3"


@dataclass(frozen=True)
class Layout:
    """`processes`, one a device, and their `kind`: ONE, DDP, FSDP2, ZERO2 or ZERO3, else as accelerate calls
    it.
    """

    kind: str = ONE
    processes: int = 1

    @property
    def sharded(self) -> bool:
        """Are the weights themselves divided?"""
        return self.kind in (FSDP2, ZERO3)

    def __str__(self) -> str:
        """In words."""
        return (
            self.kind
            if self.processes == 1 and self.kind == ONE
            else f"{self.kind}, {self.processes} processes"
        )


SINGLE = Layout()


def of(processes: int, kind: str = DDP) -> Layout:
    """`processes` under `kind`; one process that divides nothing is ONE."""
    return Layout(ONE if processes == 1 and kind == DDP else kind, processes)
