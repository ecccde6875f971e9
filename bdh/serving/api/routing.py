"""Requests as monitors and clients of other servers send them: with HEAD, or with a slash at the end of the path."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

FILES = "/page"  # paths of files mean just what they say


class RouteNormalizer:
    """An ASGI app around another that has routes for GET only, and none that ends in a slash.

    HEAD is answered as GET, without the body. One slash at the end of a path is left out.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        is_head = scope["method"] == "HEAD"
        method = "GET" if is_head else scope["method"]
        inner = {**scope, "method": method, "path": without_slash(scope["path"])}
        try:
            await self.app(inner, receive, send_head if is_head else send)
        finally:
            if "route" in inner:  # which the log tells
                scope["route"] = inner["route"]


def without_slash(path: str) -> str:
    """The path without one slash at its end."""
    is_file = path == FILES or path.startswith(f"{FILES}/")
    return path[:-1] if len(path) > 1 and path[-1] == "/" != path[-2] and not is_file else path
