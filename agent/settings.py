"""agent.toml, whole: the tables of all folders, and how the effective settings are found.

Imports no trio: who only checks a file, or starts with a broken one, is answered at once.

Source: protocols/settings.md; protocols/packaging.md 6.
"""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec

from agent.control.settings import ControlSettings
from agent.core import config, facts
from agent.core.config import ConfigErrors, Effective, Overlay, Size
from agent.core.errors import ConfigError
from agent.core.profile import BUNDLED, FOLDERS, Choice, ProfileMissing, Profiles, Report, forbidden
from agent.coverage.settings import CoverageSettings
from agent.eman.settings import EmanSettings
from agent.files.settings import EntitlementSettings, FilesSettings
from agent.gator.settings import GatorSettings
from agent.lab.settings import LabSettings
from agent.logs.settings import LogsSettings
from agent.mimir.settings import MimirSettings
from agent.monitors.settings import MonitorsSettings
from agent.polarize.settings import CibusSettings, PolarizeSettings
from agent.seneschal.settings import SeneschalSettings
from agent.suites.settings import SuitesSettings


class ClockSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`wait_sync_s`: wait that long for a synchronised clock before READY."""

    wait_sync_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 0


class StateSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The state directory, and how its store is kept. An empty `dir` is the default of the user."""

    dir: str = ""
    group_commit_ms: Annotated[float, msgspec.Meta(ge=0, le=10_000)] = 10
    journal_max: Annotated[Size, msgspec.Meta(ge=4096)] = 256 * 2**20
    reserve: Annotated[Size, msgspec.Meta(ge=4096, le=2**30)] = 16 * 2**20


class LogSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The agent's own log. `to` is "auto" (standard error) or a file, rotated at `max`."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    to: Annotated[str, msgspec.Meta(pattern=r"^(auto|/[^\n]+)$", description='"auto" or an absolute path')] = "auto"
    max: Annotated[Size, msgspec.Meta(ge=1024)] = 16 * 2**20


class Tls(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[tls]`: for every outgoing link that has none of its own."""

    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""


# On the wire a label is its name, or "name=value".
Label = Annotated[
    str, msgspec.Meta(pattern=r"^[^=\x00-\x1f\x7f]{1,128}$", description="a name of 1 to 128 characters without =")
]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """agent.toml, whole. Each folder's table is its `settings.py`."""

    ident: Annotated[
        str, msgspec.Meta(pattern=r"^([A-Za-z0-9._-]{1,128})?$", description="1 to 128 of A-Z a-z 0-9 . _ -")
    ] = ""
    labels: dict[Label, str | bool] = {}
    profile: str = "auto"
    timeout_factor: Annotated[float, msgspec.Meta(gt=0, le=100)] = 1.0
    clock: ClockSettings = ClockSettings()
    state: StateSettings = StateSettings()
    log: LogSettings = LogSettings()
    tls: Tls = Tls()
    control: ControlSettings = ControlSettings()
    suites: SuitesSettings = SuitesSettings()
    seneschal: SeneschalSettings = SeneschalSettings()
    mimir: MimirSettings = MimirSettings()
    polarize: PolarizeSettings = PolarizeSettings()
    cibus: CibusSettings = CibusSettings()
    logs: LogsSettings = LogsSettings()
    files: FilesSettings = FilesSettings()
    entitlement: EntitlementSettings = EntitlementSettings()
    coverage: CoverageSettings = CoverageSettings()
    monitors: MonitorsSettings = MonitorsSettings()
    eman: EmanSettings = EmanSettings()
    gator: GatorSettings = GatorSettings()
    lab: LabSettings = LabSettings()

    def __post_init__(self) -> None:
        for name in ("tls", "seneschal", "mimir", "polarize", "cibus"):
            own = getattr(self, name)
            if own.key_file and not own.cert_file:
                raise ValueError(f"{name}: key_file means nothing without cert_file. Set cert_file too, or neither.")

    @property
    def name(self) -> str:
        """The machine's name in the lab: `ident`, by default the host name."""
        return self.ident or socket.gethostname()

    @property
    def sinks(self) -> set[str]:
        """The peers that are told of events, by table."""
        return {name for name in ("mimir", "polarize", "cibus", "eman", "seneschal") if getattr(self, name).url}


DEFAULT_TOKEN = "token"  # of control.tokens, made at the first start
MACHINES_STATE = Path("/var/lib/agent")  # of the service, and of root


class Devices(NamedTuple):
    """What a label opens to the service: `kinds` of /proc/devices, as DeviceAllow= takes them, their `nodes` in /dev,
    and the `groups` that these belong to beside those of every service.
    """

    kinds: tuple[str, ...]
    nodes: tuple[str, ...]
    groups: tuple[str, ...] = ()


# By the label that hardware profiles give.
DEVICES = {
    "serial": Devices(("char-ttyS", "char-ttyUSB", "char-ttyACM"), ("ttyS*", "ttyUSB*", "ttyACM*")),
    "gpu": Devices(("char-nvidia*", "char-drm"), ("nvidia[0-9]*", "nvidiactl", "dri/renderD*"), ("video", "render")),
    "bmc": Devices(("char-ipmidev",), ("ipmi*",)),
}

# What no hardware profile may set (packaging.md 5): peers, tokens, roots, users, and who this machine is.
FORBIDDEN = (
    *("ident", "profile", "tls", "seneschal", "mimir", "polarize", "cibus", "eman", "gator", "lab"),
    *(f"control.{name}" for name in ("listen", "tokens", "insecure_loopback", "origins", "tls")),
    *(f"coverage.{name}" for name in ("enabled", "admin", "headers", "agent_id", "instance_id", "jacoco")),
    *("entitlement.bus", "*.roots", "*.content_allow", "*_file", "*.url", "*.user", "*.users", "*.token*"),
)


def state_dir(settings: Settings) -> Path:
    """Where the state is: `state.dir`, else by user (protocols/settings.md). A whole path: runners start elsewhere."""
    if settings.state.dir:
        return Path(settings.state.dir).absolute()
    if given := os.environ.get("STATE_DIRECTORY"):  # systemd's StateDirectory=; respawn.py says it too
        return Path(given)
    own = (os.environ.get("XDG_STATE_HOME", ""), os.path.expanduser("~/.local/state")) if os.geteuid() else ()
    # A relative one is to be ignored (XDG Base Directory Specification), and not every user has a home.
    return next((Path(base) / "agent" for base in own if os.path.isabs(base)), MACHINES_STATE)


def find(name: str, folder: Path) -> Path:
    """A file that the settings name: relative to the credentials directory, /etc/agent, the state directory.

    The first that is there, or that cannot be seen there. Else where it is to be put: of the machine's agent in
    /etc/agent, as what root puts into the state directory of a dynamic user is not that user's; of others in the state
    directory, where the default token is made too.
    """
    handed_over = os.environ.get("CREDENTIALS_DIRECTORY")
    places = [Path(handed_over) / credential(name)] if handed_over else []
    places += [Path("/etc/agent") / name, folder / name]
    wanted = places[-2] if folder == MACHINES_STATE and name != DEFAULT_TOKEN else places[-1]
    return next((path for path in places if config.is_there(path)), wanted)


def credential(name: str) -> str:
    """What the service file calls a file that the settings name, when systemd hands it over."""
    return name.strip("/").replace("/", "_")


def certificates(
    settings: Settings, peer: SeneschalSettings | MimirSettings | PolarizeSettings | CibusSettings | Tls, folder: Path
) -> tuple[Path | None, Path | None, Path | None]:
    """The peer's own files of authorities, certificate and key, else those of `[tls]`."""
    own = peer if peer.ca_file or peer.cert_file or peer.key_file else settings.tls
    ca, cert, key = (find(name, folder) if name else None for name in (own.ca_file, own.cert_file, own.key_file))
    return ca, cert, key


class Given(msgspec.Struct, frozen=True):
    """The options of a command: each `--config`, in place of /etc/agent, and `--profile`."""

    config: tuple[Path, ...] = ()
    profile: str | None = None


def load_settings(given: Given) -> Effective[Settings]:
    """The effective settings: hardware profile, files, environment, flags. Raises ConfigErrors.

    A profile never makes settings unusable that are good without it.
    """
    return _survey(given, facts.detect())[0]


def survey(given: Given) -> tuple[Effective[Settings], Report]:
    """The effective settings, and which hardware profile fits and why, and what it decides. Raises ConfigErrors."""
    machine = facts.detect()
    effective, choice = _survey(given, machine, all_of_them=True)
    return effective, Report(
        profile=effective.profile or None,
        forced=choice.forced,
        facts={name: list(fact) if isinstance(fact, tuple) else fact for name, fact in machine.items()},
        fits=choice.fits,
        refused=choice.refused,
        warnings=choice.warnings,
        settings={key: said["value"] for key, said in effective.as_dict().items() if effective.origins[key].is_profile},
    )


def _survey(given: Given, machine: facts.Facts, *, all_of_them: bool = False) -> tuple[Effective[Settings], Choice]:
    paths, flags = config.default_files(given.config), {"profile": given.profile}
    alone = config.load(Settings, paths, env=os.environ, flags=flags)
    profiles = Profiles(FOLDERS, check_overlays)
    if all_of_them:
        profiles.check_all()
    choice = choose(profiles, machine, alone)
    warnings = [*choice.warnings, *(line for refused in choice.refused for line in refused.errors)]
    try:
        effective = config.load(Settings, paths, env=os.environ, flags=flags, profile=choice.overlays)
        _check_rule_sets(effective)
    except ConfigErrors as err:
        warnings.append(f"hardware profile {choice.name} does not go with the settings and is not used: {err}")
        effective = alone
    effective.warnings.extend(warnings)
    return effective, msgspec.structs.replace(choice, warnings=tuple(warnings))


def _check_rule_sets(effective: Effective[Settings]) -> None:
    """Raise ConfigErrors for rule sets that a hardware profile names, and that neither we nor the lab have."""
    logs, errors = effective.settings.logs, list[ConfigError]()
    for watch in logs.watch:
        key = f"logs.watch[{watch.name}].rules"
        strange = [name for name in watch.rules if not (BUNDLED / f"rules/{name}.toml").exists()]
        if strange and (origin := effective.origins.get(key)) and origin.is_profile:
            from agent.logs.lint import files_named, files_of  # and the native engine: hardly any machine needs it here

            own = files_of(logs.rules)
            errors += [
                ConfigError(
                    origin.text, 0, key, f"no rule set is called {name!r}", remedy="Correct it, or write the set."
                )
                for name in strange
                if not files_named(name, own)
            ]
    if errors:
        raise ConfigErrors(errors)


def choose(profiles: Profiles, machine: facts.Facts, alone: Effective[Settings]) -> Choice:
    """The hardware profile that fits, or that the settings ask for. Raises ConfigErrors: it is missing, or broken."""
    asked = alone.settings.profile
    try:
        return profiles.choose(machine, None if asked == "auto" else asked)
    except ProfileMissing as err:
        missing = ConfigError(alone.origins["profile"].text, 0, "profile", err.what, remedy=err.remedy)
        raise ConfigErrors([*err.errors, missing]) from None


def check_overlays(overlays: Sequence[Overlay]) -> list[ConfigError]:
    """All that is wrong with the settings of a hardware profile."""
    return [*config.check(Settings, overlays), *forbidden(overlays, FORBIDDEN)]
