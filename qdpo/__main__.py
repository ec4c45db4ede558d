"""`python -m qdpo`, for torchrun and accelerate."""

from qdpo.cli.main import main

if __name__ == "__main__":
    main()
