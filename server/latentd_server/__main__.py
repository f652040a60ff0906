"""The command `latentd`. Exits 0 after an orderly end, 1 if it cannot serve (any more), 2 if its settings are wrong."""

import os
import sys

from latentd_server import config as settings
from latentd_server import logs


def main() -> None:
    """Read the settings and serve."""
    try:
        config = settings.read(sys.argv[1:], os.environ)
    except settings.ConfigError as error:
        count = len(error.problems)
        print(f"latentd: {count} problem{'s' * (count > 1)} with the settings", file=sys.stderr)
        for problem in error.problems:
            print(f"  {problem}", file=sys.stderr)
        sys.exit(2)
    logs.configure(config.log_level, config.log_format)
    # Here, so that --help and wrong settings need not wait for ONNX Runtime.
    from latentd_server import app
    from latentd_server.runtime import DeviceError

    try:
        app.run(config)
    except (app.BindError, app.EngineError, DeviceError) as error:
        print(f"latentd: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
