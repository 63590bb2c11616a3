"""Run a command line and turn errors into exit codes and one `error:` line."""

import os
import sys
from typing import TYPE_CHECKING

from teachercache.core.errors import UserError
from teachercache.core.process import Terminated

if TYPE_CHECKING:
    import click


def run_command(group: "click.Group", args: list[str] | None = None) -> int:
    """Run a click group and return its exit code.

    A UserError, an OSError or a wrong option prints one `error:` line and returns 2. Ctrl-C returns 130,
    SIGTERM 143.
    """
    import click

    os.environ.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # threads that spin starve the decoding processes (LOG.md)
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
        message = str(error).rsplit("UserError: ")[-1]  # from a worker process it arrives with its traceback
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        message = f"{error.strerror or error}{where}"
    except (KeyboardInterrupt, click.Abort) as stopped:
        print(
            str(stopped.__cause__ or "") or "stopped; run the same command to resume",
            file=sys.stderr,
        )
        return 143 if isinstance(stopped.__cause__, Terminated) else 130
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
