"""The position of a run between two steps: the loop's counters, which a checkpoint stores."""

import dataclasses


@dataclasses.dataclass
class Position:
    """A position of a run, between two steps.

    Attributes:
        epoch: The current epoch, counted from 0.
        step: Number of steps of that epoch that are done.
        steps: Number of steps of the whole run that are done.
        totals: Sums over the steps of the epoch: of the sample weights, then of each function of
            ``loop.fit``.
        logs: What callbacks were told of the epoch so far.
        state: That of the objective, as ``Objective.state`` returns it.
        seconds: Duration of the epoch so far.
        history: The epochs before, as ``loop.fit`` returns them.
    """

    epoch: int = 0
    step: int = 0
    steps: int = 0
    totals: list[float] = dataclasses.field(default_factory=list)
    logs: dict[str, float] = dataclasses.field(default_factory=dict)
    state: list = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    history: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"epoch {self.epoch + 1}, step {self.step}"
