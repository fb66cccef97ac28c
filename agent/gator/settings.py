"""The `[gator]` table of the configuration. Source: protocols/settings.md; protocols/gator.md."""

from typing import Annotated, Literal

import msgspec

_Seconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]


class GatorSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How specs are run here.

    `dialect` forces one upon a parent. `env`: a spec's is laid over the process environment, or replaces it. `enforce`:
    what becomes of a task beyond its `!Memory`, where no cgroup holds it. Layers listen on the address `listen`; unless
    it is loopback, their addresses end in a secret path, which `path_secret = false` leaves out. A child without its
    parent (and a parent without its child) waits `resume_wait_s` seconds. What ends as in `retry_on` is started again
    as often as its `retries` say. `licenses` are counted; others are unlimited.
    """

    dialect: Literal["auto", "d0", "d1", "d2"] = "auto"
    env: Literal["overlay", "replace"] = "overlay"
    enforce: Literal["kill", "warn"] = "kill"
    listen: str = "127.0.0.1"
    path_secret: bool = True
    resume_wait_s: _Seconds = 600
    retry_on: tuple[Literal["lost", "timeout", "fail"], ...] = ("lost",)
    licenses: dict[str, _Count] = {}
