"""The entry point of `latentctl`. The commands need more than the library's base install."""

import sys


def main() -> None:
    """Run `latentctl`; say how to get what it needs if it is not there."""
    try:
        from latentd_client.commands import app
    except ModuleNotFoundError as error:
        sys.exit(f"latentctl needs {error.name}: pip install 'latentd[cli]'")
    app()


if __name__ == "__main__":
    main()
