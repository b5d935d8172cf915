"""The door to transformers, through which one thread goes at a time.

Its modules are made when their names are first asked for, and a thread that asks meanwhile finds them half made.
"""

from __future__ import annotations

import threading

importing = threading.RLock()
"""``with importing: from transformers import ...``"""
