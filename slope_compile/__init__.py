"""SLoPe for ``torch.compile``: N:M sparse weights with lazy low-rank adapters, as a graph rewrite.

See the README for the three ways in.  Importing this package compiles, probes and launches nothing.
"""

from __future__ import annotations

__version__ = "0.1.0"
