"""The web application of `tc serve`: the page, the answers as JSON, and pictures by the number of their row.

Every route is fixed or takes numbers, so that no path of a request reaches the file system.
"""

from collections.abc import Callable, Iterable
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from teachercache.core.command import OURS, explained
from teachercache.core.errors import UserError
from teachercache.core.progress import say
from teachercache.data.sample import BadSample
from teachercache.serve.answers import answer, parse, row_details
from teachercache.serve.guard import LOOPBACK, MOST_BYTES, Guard
from teachercache.serve.opened import Served, check_number, describe
from teachercache.serve.pictures import EDGES

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


def make_app(caches: list[Served], *, hosts: Iterable[str] = LOOPBACK, any_address: bool = False) -> Guard:
    """Return the ASGI application for one or two caches.

    Args:
        caches: The opened caches.
        hosts: The names under which the server is reached.
        any_address: Also accept every numeric address, see `Guard`.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    def caches_of(request: "Request") -> list[dict[str, Any]]:
        return [describe(served, number) for number, served in enumerate(caches)]

    def row_of(request: "Request") -> dict[str, Any]:
        return row_details(caches, request.path_params["cache"], request.path_params["row"])

    def load_teachers(request: "Request") -> list[str]:
        return [_load(served) for served in caches]

    def picture(request: "Request") -> "Response":
        from starlette.responses import PlainTextResponse, Response

        size = request.path_params["size"]
        if size not in EDGES:
            return PlainTextResponse("there is no such size", 404)
        try:
            served, row = check_number(caches, request.path_params["cache"], request.path_params["row"])
            return Response(served.pictures.get(row, size), media_type="image/jpeg")
        except (BadSample, UserError) as error:
            return PlainTextResponse(str(error), 404)

    async def search(request: "Request") -> "Response":
        from starlette.concurrency import run_in_threadpool

        try:
            content = await _body(request)
        except UserError as error:
            return _json({"error": str(error)}, 413)
        return await run_in_threadpool(_answered, lambda: {"answers": answer(caches, parse(content))})

    pages = [Route(path, _page(*file)) for path, file in PAGE.items()]
    routes = [
        Route("/api/caches", _guarded(caches_of)),
        Route("/api/row/{cache:int}/{row:int}", _guarded(row_of)),
        Route("/api/teachers", _guarded(load_teachers), methods=["POST"]),
        Route("/api/search", search, methods=["POST"]),
        Route("/picture/{cache:int}/{row:int}/{size}", picture),
    ]
    handlers: dict[Any, Any] = {HTTPException: _refused}
    return Guard(
        Starlette(routes=[*pages, *routes], exception_handlers=handlers), hosts, any_address=any_address
    )


async def _refused(request: "Request", error: Any) -> "Response":
    return _json({"error": "there is no such page"}, error.status_code)


def _page(name: str, kind: str) -> Callable[["Request"], "Response"]:
    """Return the endpoint of a file of the page, read once."""
    content = files("teachercache.serve").joinpath(name).read_bytes()

    def page(request: "Request") -> "Response":
        from starlette.responses import Response

        return Response(content, media_type=kind)

    return page


def _guarded(find: "Callable[[Request], Any]") -> "Callable[[Request], Response]":
    """Return an endpoint that answers with JSON, also where the function fails."""
    return lambda request: _answered(lambda: find(request))


def _answered(find: Callable[[], Any]) -> "Response":
    """Return what a function computes as JSON; an error becomes one line for the page."""
    try:
        return _json(find())
    except Exception as error:
        code, line = explained(error)
        if code == OURS:
            say(f"error: {line}")
        return _json({"error": line}, 500 if code == OURS else 400)


def _json(values: Any, status: int = 200) -> "Response":
    from starlette.responses import JSONResponse

    return JSONResponse(values, status)


def _load(served: Served) -> str:
    """Load the teacher of a cache ahead of the first query; return why it cannot be loaded, or an empty string."""
    try:
        served.live.load()
    except Exception as error:
        return explained(error)[1]
    return ""


async def _body(request: "Request") -> bytes:
    """Return the body of a request in memory; raise UserError if it is too large, whatever its header promised."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MOST_BYTES:
            raise UserError(f"the request is larger than {MOST_BYTES >> 20} MB: search by a smaller picture")
    return bytes(content)
