"""`python -m litft`, also under torchrun."""

import os
import sys

# Python puts the current folder first for `-m`. A json.py or torch.py that lies there, among somebody's data, would be
# imported in place of the real one. Whoever wants classes from there puts the folder on PYTHONPATH.
if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
    del sys.path[0]

from litft.cli.main import entry

if __name__ == "__main__":
    entry()
