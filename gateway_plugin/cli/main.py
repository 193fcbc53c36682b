"""``gateway``: the command group, its options, and the handling of errors."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import click

from gateway_plugin import __version__
from gateway_plugin.cli import authority, blocks, chat, controller, endpoint, keys, models, service, usage
from gateway_plugin.cli.output import Settings, put, report_error
from gateway_plugin.errors import GatewayError, ServiceError
from gateway_plugin.files import NO_ROOM
from gateway_plugin.paths import default_state_root

_EPILOG = """\b
Exit codes:
  0    done (status: it is ready)
  1    doctor found something that forbids a start
  2    wrong command line, catalog or site: nothing was started
  3    status: the gateway is not ready
  64   the request is wrong            65   a body is too large
  66   no such model, key, block, log  69   it cannot be started, or reached
  70   internal error                  75   not now: try again later
  77   no or wrong API key, or not allowed
  130  interrupted

\b
Environment:
  GATEWAY_STATE      state folder, as --state
  GATEWAY_URL        address of a gateway elsewhere, for status, models, chat, embed, blocks
  GATEWAY_API_KEY    key for it
  GATEWAY_CA         certificates to verify it with: what 'gateway ca' prints there
  GATEWAY_PLAIN_HTTP 1: send the key over plain HTTP too, to whatever listens at that address
  GATEWAY_WEIGHTS    where prepared weights lie
"""


class GatewayCommands(click.Group):
    """The group; a ``GatewayError`` becomes one line and an exit code, never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Raises ``Exit`` with the error's own code."""
        try:
            return super().invoke(ctx)
        except GatewayError as error:
            found = ctx.find_root().obj
            report_error(error, as_json=isinstance(found, Settings) and found.json)
            raise click.exceptions.Exit(error.exit_code) from None
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            where = error.filename or "a file of the gateway"
            told = ServiceError(f"{where} cannot be written: {error.strerror}. Make room there, then run it again.")
            report_error(told, as_json=isinstance(found := ctx.find_root().obj, Settings) and found.json)
            raise click.exceptions.Exit(told.exit_code) from None
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C while leaving keeps the exit code
            put("interrupted", err=True)
            raise click.exceptions.Exit(130) from None


@click.group(
    cls=GatewayCommands,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="gateway")
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="GATEWAY_STATE",
    help="State folder of the gateway.",
)
@click.pass_context
def cli(context: click.Context, state: Path | None) -> None:
    """Language models on batch clusters: start the gateway, look after it, and use it."""
    explicit = context.get_parameter_source("state") is click.core.ParameterSource.COMMANDLINE
    context.obj = Settings((state or default_state_root()).expanduser().absolute(), explicit)


for command in (service.up, service.down, service.status, service.doctor, service.logs):
    cli.add_command(command)
for command in (
    models.models,
    keys.keys,
    authority.ca,
    blocks.blocks,
    chat.chat,
    chat.embed,
    controller.controller,
    endpoint.endpoint,
    usage.usage,
):
    cli.add_command(command)


def main() -> None:
    """Entry point of the command ``gateway``."""
    cli(prog_name="gateway")


if __name__ == "__main__":
    sys.exit(main())  # type: ignore[func-returns-value]
