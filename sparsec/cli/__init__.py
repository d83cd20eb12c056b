"""The command line. Verbs parse their options, call the Python API and print; results on stdout, the rest on stderr.

A verb is a click command in a file of this folder and one line in `VERBS`. Everything heavy is imported inside the verbs:
`sparsec --help` waits for nothing.

Exit codes: 0 success, 1 a check failed, 2 usage or bad input, 3 the environment lacks something, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence

import click

from sparsec.cli.compiling import compile_verb, rewrite_verb
from sparsec.cli.listings import kernels_verb, models_verb, passes_verb, targets_verb
from sparsec.cli.masks import mask_verb, soup_verb
from sparsec.cli.serving import serve_verb
from sparsec.cli.tuning import tune_verb
from sparsec.cli.using import bench_verb, inspect_verb, run_verb, verify_verb
from sparsec.errors import SparsecError, UsageError
from sparsec.terminal import print_json

VERBS: tuple[click.Command, ...] = (
    compile_verb,
    rewrite_verb,
    inspect_verb,
    verify_verb,
    bench_verb,
    tune_verb,
    mask_verb,
    soup_verb,
    run_verb,
    serve_verb,
    models_verb,
    passes_verb,
    targets_verb,
    kernels_verb,
)


class Verbs(click.Group):
    """A group that suggests the nearest verb for an unknown one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from sparsec.targets import suggest

        name = args[0].replace("_", "-")
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            raise UsageError(f"unknown verb {args[0]!r}{suggest(name, self.list_commands(ctx))}", "sparsec")
        return super().resolve_command(ctx, args)


def _underscores(name: str) -> str:
    """`_` stands for `-` in options and verbs."""
    return name.replace("_", "-")


SETTINGS = {"token_normalize_func": _underscores, "help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(cls=Verbs, commands=VERBS, context_settings=SETTINGS)
@click.version_option(package_name="sparsec", prog_name="sparsec", message="%(prog)s %(version)s")
def cli() -> None:
    """Compile ONNX models into small, fast artifacts for phones, boards and servers, and prove the result."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; every error becomes one line, or one JSON object with --json."""
    as_json = "--json" in arguments
    verbose = "-v" in arguments or "--verbose" in arguments
    try:
        with cli.make_context("sparsec", list(arguments)) as context:
            cli.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as end:
        sys.stdout.flush()
        return end.exit_code
    except SparsecError as error:
        _fail(error.kind, error.message, error.where, as_json, verbose)
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else ""
        _fail("UsageError", " ".join(error.format_message().split()), where, as_json, verbose)
        return 2
    except KeyboardInterrupt:
        kept = "what was measured is kept" if "tune" in arguments[:1] else "nothing was written"
        _fail("Interrupted", f"interrupted; {kept}", "", as_json, False)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at exit
        return 141
    except OSError as error:
        _fail("UsageError", error.strerror or str(error), str(error.filename or ""), as_json, verbose)
        return 2
    except Exception as error:  # a bug of ours: still one line
        lines = str(error).strip().splitlines()
        text = f"internal error: {type(error).__name__}: {lines[0] if lines else ''}; -v shows where; please report it"
        _fail("InternalError", text, "", as_json, verbose)
        return 1


def _fail(kind: str, message: str, where: str, as_json: bool, verbose: bool) -> None:
    if verbose:
        traceback.print_exc()
    else:
        message = " ".join(message.split())
    if as_json:
        print_json({"error": {"kind": kind, "message": message, "where": where}})
    else:
        click.echo(f"error: {where}: {message}" if where else f"error: {message}", err=True)


def main() -> None:
    """Entry point of the `sparsec` command."""

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)  # SystemExit runs the clean-up that a signal would skip

    signal.signal(signal.SIGTERM, end)
    sys.exit(run(sys.argv[1:]))
