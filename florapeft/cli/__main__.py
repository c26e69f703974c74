"""`python -m florapeft.cli`, for `torchrun -m florapeft.cli train job.yaml`."""

from florapeft.cli import main

if __name__ == "__main__":
    main()
