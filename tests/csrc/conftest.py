"""Lets tests import emulation.py and those of the ops: importlib mode leaves sys.path alone."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "ops")]
