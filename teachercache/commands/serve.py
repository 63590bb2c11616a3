"""`tc serve`: search one or two caches in the browser."""

import json
import threading

import click

from teachercache.commands.options import cache_path, output_options
from teachercache.core.command import place, text
from teachercache.core.progress import say, show

PORT = 8350


@click.command()
@click.argument("cache", type=place, shell_complete=cache_path)
@click.argument("cache2", type=place, required=False, shell_complete=cache_path)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    type=text,
    help="The address to listen on; any other than this machine's own shows the pictures to its network.",
)
@click.option("--port", default=PORT, show_default=True, type=click.IntRange(0, 65535), help="0: a free one.")
@click.option("--open", "opens", is_flag=True, help="Open the page in the browser.")
@click.option(
    "--teacher",
    "teachers",
    metavar="MODULE:ENTRY",
    multiple=True,
    type=text,
    help="The teacher of a cache that was built with one that is not installed; once per cache, in their order.",
)
@output_options
def serve(
    cache: str,
    cache2: str | None,
    host: str,
    port: int,
    opens: bool,
    teachers: tuple[str, ...],
    as_json: bool,
) -> None:
    """Search a cache in the browser: by text, by picture, by neighbors; two caches side by side.

    \u0008
    tc serve caches/demo/clip-lite.zarr
    tc serve caches/demo/clip-lite.zarr caches/demo/mine.zarr      # teacher and student answer the same query
    tc serve caches/demo/clip-lite.zarr --port 0 --open

    The page asks nothing of the network, and this command writes no file.
    """
    from teachercache.serve.guard import LOOPBACK
    from teachercache.serve.server import listen, url_of, uvicorn_module
    from teachercache.serve.server import serve as run

    uvicorn_module()
    paths = [path for path in (cache, cache2) if path is not None]
    if len(teachers) > len(paths):
        raise click.UsageError(f"{len(teachers)} --teacher for {len(paths)} caches")
    from teachercache.serve.opened import open_served

    named = [*teachers, *[None] * (len(paths) - len(teachers))]
    opened = [open_served(path, teacher) for path, teacher in zip(paths, named, strict=True)]
    if host not in LOOPBACK:
        say(
            f"WARNING: --host {host}: everyone who reaches this address sees the pictures and texts, without a password"
        )
    socket = listen(host, port)
    url = url_of(socket)

    def ready() -> None:
        if as_json:
            print(json.dumps({"url": url}), flush=True)
        else:
            show(url)
            say(f"serving {' and '.join(paths)}: open the address above in a browser; Ctrl-C ends it")
        if opens:
            import webbrowser

            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

    run(opened, socket, host, ready=ready)
