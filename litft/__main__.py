"""`python -m litft`, also under torchrun."""

from litft.cli.main import entry

entry()
