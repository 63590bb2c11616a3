"""Run a command line and turn errors into exit codes and one `error:` line."""

import os
import sys
from typing import TYPE_CHECKING

from teachercache.core.errors import UserError
from teachercache.core.process import Terminated

if TYPE_CHECKING:
    import click


# Exit codes
OURS, MISTAKE, UNFINISHED, MACHINE = 1, 2, 3, 75  # 75 is EX_TEMPFAIL of sysexits.h: try again later


def run_command(group: "click.Group", args: list[str] | None = None) -> int:
    """Run a click group and return its exit code.

    One `error:` line and 2 for a mistake of the user (a UserError, a wrong option, a path that does not exist), 75
    for an error of the machine (a full disk, a mount that is away, too little memory), after which the same command
    goes on, and 1 for any other error, which is ours: --debug anywhere in the command shows its traceback. Ctrl-C
    returns 130, SIGTERM 143.
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
