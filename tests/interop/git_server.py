"""A git server over https on loopback: git's own `http-backend` behind a small CGI, with the faults of real ones.

Repositories lie in `folder`. What a path begins with decides how its request is met:

    /git/        served
    /secret/     401 without the one user and password
    /away/       redirected, to /git/ of this server
    /plain/      redirected, to the same over http
    /silent/     taken, and never answered
    /cut/        half of the pack, then the end of the line
"""

import base64
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import h11
import trio

from agent.core.tls import server_context
from tests.certificates import Issued

LET_IN = b"Basic " + base64.b64encode(b"reader:open sesame")
ENV = {"PATH": os.environ["PATH"], "HOME": "/nowhere", "GIT_CONFIG_NOSYSTEM": "1"}


def git(*words: str | Path) -> str:
    me = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "init.defaultBranch=main")
    done = subprocess.run(["git", *me, *words], check=True, capture_output=True, text=True, env=ENV)
    return done.stdout.strip()


class GitServer:
    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port

    def url(self, how: str, name: str) -> str:
        return f"https://127.0.0.1:{self.port}/{how}/{name}"

    async def meet(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        """One connection. A client that goes away in mid-answer, or does not trust us, is what is tested."""
        with suppress(trio.BrokenResourceError, h11.ProtocolError):
            wire = h11.Connection(h11.SERVER)
            while wire.our_state is not h11.MUST_CLOSE:
                request, body = None, b""
                while not isinstance(event := wire.next_event(), h11.EndOfMessage):
                    if event is h11.NEED_DATA:
                        wire.receive_data(bytes(await stream.receive_some()))
                    elif isinstance(event, h11.Request):
                        request = event
                    elif isinstance(event, h11.Data):
                        body += event.data
                    elif isinstance(event, h11.ConnectionClosed):
                        return
                assert request is not None
                status, headers, answer = await self._answer(request, body)
                await stream.send_all(wire.send(h11.Response(status_code=status, headers=headers)) or b"")
                await stream.send_all(wire.send(h11.Data(data=answer)) or b"")
                await stream.send_all(wire.send(h11.EndOfMessage()) or b"")  # of a half answer h11 says that it is one
                wire.start_next_cycle()

    async def _answer(self, request: h11.Request, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        _, how, path = request.target.decode().split("/", 2)
        asked = dict(request.headers)
        if how == "silent":
            await trio.sleep_forever()
        if how == "secret" and asked.get(b"authorization") != LET_IN:
            return 401, [("WWW-Authenticate", 'Basic realm="git"'), ("Content-Length", "0")], b""
        if how in ("away", "plain"):
            scheme = {"away": "https", "plain": "http"}[how]
            return 302, [("Location", f"{scheme}://127.0.0.1:{self.port}/git/{path}"), ("Content-Length", "0")], b""
        name, _, query = path.partition("?")
        env = ENV | {
            "GIT_PROJECT_ROOT": str(self.folder),
            "GIT_HTTP_EXPORT_ALL": "1",
            "REQUEST_METHOD": request.method.decode(),
            "PATH_INFO": f"/{name}",
            "QUERY_STRING": query,
            "CONTENT_TYPE": asked.get(b"content-type", b"").decode(),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": asked.get(b"content-encoding", b"").decode(),
            "GIT_PROTOCOL": asked.get(b"git-protocol", b"").decode(),
            "REMOTE_ADDR": "127.0.0.1",
        }
        run = partial(trio.run_process, stdin=body, capture_stdout=True, capture_stderr=True, check=False, env=env)
        head, _, answer = (await run(["git", "http-backend"])).stdout.partition(b"\r\n\r\n")
        said = [(key, value.strip()) for key, _, value in (line.partition(":") for line in head.decode().splitlines())]
        status = next((int(value.split()[0]) for key, value in said if key == "Status"), 200)
        kept = answer[: len(answer) // 2] if how == "cut" and b"PACK" in answer else answer
        headers = [each for each in said if each[0] != "Status"]
        return status, [*headers, ("Content-Length", str(len(answer)))], kept


@asynccontextmanager
async def git_server(folder: Path, issued: Issued) -> AsyncIterator[GitServer]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    server = GitServer(folder, listener.socket.getsockname()[1])
    context = server_context(issued.cert, issued.key)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, server.meet, [trio.SSLListener(listener, context)])
        yield server
        nursery.cancel_scope.cancel()
