"""The entry point of `latentd-train`, and what `torchrun -m latentd_trainer` starts."""

import sys


def main() -> None:
    """Run `latentd-train`; say how to get what it needs where only client or server are installed."""
    try:
        from latentd_trainer.cli import app

        app()
    except ModuleNotFoundError as error:
        if str(error.name).startswith("latentd"):
            raise
        print(f"latentd-train needs {error.name}: pip install 'latentd[train,cpu]'", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
