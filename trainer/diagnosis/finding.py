"""What one check has found.

Finding("memory", "warning", "0.5 GB are free", "Use fewer examples.")
"""

import dataclasses
from typing import Literal

Status = Literal["ok", "warning", "error"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of a diagnosis.

    Attributes:
        check: What was looked at.
        status: ``error``: a run would fail; ``warning``: it may fail, or run otherwise than
            expected.
        seen: What was found.
        remedy: What to do about it; empty where there is nothing to do, or ``seen`` ends with it,
            as the error of a run does.
    """

    check: str
    status: Status
    seen: str
    remedy: str = ""
