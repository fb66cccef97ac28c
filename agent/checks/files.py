"""What is wrong with files of the configuration: settings, rules of the log monitor, hardware profiles.

Source: protocols/packaging.md 5 and 6; protocols/logs.md 2.2.
"""

import pwd
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from agent.core import config, profile
from agent.core.config import ConfigErrors, Effective, Overlay
from agent.core.errors import ConfigError
from agent.core.profile import FOLDERS, Profiles
from agent.logs import lint
from agent.logs.rules import CompiledRule, RuleErrors
from agent.logs.settings import LogsSettings
from agent.settings import Settings, check_overlays, choose


def check(files: Sequence[Path]) -> list[str]:
    """Check them all: settings together, as layers, with the rules that they name. Returns what is to be warned of.

    Raises ConfigErrors with all that is wrong in any of them.
    """
    profiles = [file for file in files if profile.is_profile(file)]
    rules = [file for file in files if file not in profiles and lint.holds_rules(file)]
    settings = [file for file in files if file not in profiles and file not in rules]
    errors: list[ConfigError] = []
    warnings: list[str] = []
    logs, origins = LogsSettings(rules=()), dict[str, str]()
    try:
        effective = config.load(Settings, settings, env={})
    except ConfigErrors as err:
        errors += err.errors
    else:
        warnings += [*effective.warnings, *_absent_users(effective)]
        logs = effective.settings.logs if settings else logs
        origins = {key: origin.text for key, origin in effective.origins.items()}
        errors += _of_the_profile_asked_for(effective, profiles)
    compiled, wrong = _rules(msgspec.structs.replace(logs, rules=(*logs.rules, *map(str, rules))), origins)
    errors += wrong
    for file in profiles:
        overlays, wrong = Profiles(FOLDERS, check_overlays, (*profiles, file)).overlays_of(file.stem)
        errors += wrong
        if not wrong:
            layered = config.load(Settings, [], env={}, profile=overlays).settings.logs
            more, wrong = _rules(layered, dict(_places(overlays)))
            errors += wrong
            compiled += more
    if errors:
        raise ConfigErrors(list({str(error): error for error in errors}.values()))
    return [*warnings, *dict.fromkeys(lint.told(lint.slow(compiled), time.perf_counter))]


def _of_the_profile_asked_for(effective: Effective[Settings], files: Sequence[Path]) -> list[ConfigError]:
    if effective.settings.profile == "auto":
        return []
    try:
        choose(Profiles(FOLDERS, check_overlays, files), {}, effective)
    except ConfigErrors as err:
        return list(err.errors)
    return []


def _absent_users(effective: Effective[Settings]) -> Iterator[str]:
    """Of monitors. It is no error: the machine that is to run them may be another than the one that checks."""
    for monitor in effective.settings.monitors.monitor:
        if monitor.user is not None:
            try:
                pwd.getpwnam(monitor.user)
            except KeyError:
                key = f"monitors.monitor[{monitor.id}].user"
                yield (
                    f"{effective.origins[key].text}: {key}: there is no user {monitor.user!r} on this machine."
                    " Where it is to run, create it, or name another."
                )


def _rules(logs: LogsSettings, origins: dict[str, str]) -> tuple[list[CompiledRule], list[ConfigError]]:
    try:
        return lint.check(logs, origins), []
    except RuleErrors as err:
        return [], list(err.errors)


def _places(overlays: Sequence[Overlay]) -> Iterator[tuple[str, str]]:
    """Where a profile names the rules of each of its watches."""
    for overlay in overlays:
        for i, watch in enumerate(overlay.data.get("logs", {}).get("watch", ())):
            line = overlay.document.line((*overlay.at, "logs", "watch", i, "rules"))
            yield f"logs.watch[{watch['name']}].rules", f"{overlay.path}:{line}"
