"""Run a command: exit codes, and one `error:` line instead of a traceback."""

import os
import sys
from typing import Any

from teachercache.core.errors import UserError
from teachercache.core.process import Terminated


def run_command(group: Any, args: list[str] | None = None) -> int:
    """Run a click group; one `error:` line and exit 2 for what a user can mend, no traceback."""
    import click

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve the decoders (LOG.md)
    try:
        result = group.main(args=args, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as help_text:
        print(help_text.format_message(), file=sys.stderr)
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context else ""
        message = f"{error.format_message()}{hint}"
    except UserError as error:
        message = str(error).rsplit("UserError: ")[-1]  # from a worker it comes with its traceback
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        message = f"{error.strerror or error}{where}"
    except (KeyboardInterrupt, click.Abort) as stopped:
        print(
            str(stopped.__cause__ or "") or "stopped; the same command goes on where it left off",
            file=sys.stderr,
        )
        return 143 if isinstance(stopped.__cause__, Terminated) else 130
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
