"""`python -m rooftune`: the command line of that interpreter's installation, wherever its scripts are."""

import sys

from rooftune.bench import main

if __name__ == "__main__":
    sys.exit(main())
