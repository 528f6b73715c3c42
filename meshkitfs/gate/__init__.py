"""THE open flow: ordered checks that end in a `Grant` or in a refusal with its reason.

Nobody else unwraps a capsule or mints a content key (an import contract in CI holds that), so no plaintext
exists that has not passed here. Read `_gate.Gate.open` from top to bottom: it is the security policy.
"""

from meshkitfs.gate._evidence import FRESH_S
from meshkitfs.gate._gate import QUARANTINED, Counters, Gate
from meshkitfs.gate._grant import Grant, HeadView
from meshkitfs.gate._owners import Owners
from meshkitfs.gate._trace import Step, Trace
from meshkitfs.gate._verdicts import ENDS, ends

__all__ = [
    "ENDS", "FRESH_S", "QUARANTINED", "Counters", "Gate", "Grant", "HeadView", "Owners", "Step", "Trace",
    "ends",
]  # fmt: skip
