"""`python -m relstream.bench`."""

import sys

try:
    from relstream.bench.cli import main
except ModuleNotFoundError as missing:
    if (missing.name or "").startswith("relstream"):
        raise
    sys.exit(f"relstream.bench: {missing}; pip install 'relstream[bench,embedded,peers]'")

if __name__ == "__main__":
    sys.exit(main())
