"""The entry point of `latentctl`. The commands need more than the library's base install."""

import sys


def main() -> None:
    """Run `latentctl`; say how to get what it needs where only the library is installed."""
    try:
        from latentd_client.commands import app
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing.startswith("latentd"):
            raise
        print(f"latentctl needs {missing}: pip install 'latentd[cli]'", file=sys.stderr)
        sys.exit(2)
    app()


if __name__ == "__main__":
    main()
