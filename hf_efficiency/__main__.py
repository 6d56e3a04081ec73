"""`python -m hf_efficiency` is the command `hf-efficiency`."""

import sys

from hf_efficiency.cli import main

if __name__ == "__main__":
    sys.exit(main())
