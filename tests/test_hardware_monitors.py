"""The monitors of the hardware profiles, each with a tool of our own in place of the machine's."""

import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

from agent.core.profile import BUNDLED
from agent.install.steps import SHARE
from tests.monitors_house import SDK, house, monitor

EXAMPLES = SDK / "examples"
SEL = "Entries          : 12\nPercent Used     : {}%\n"
SDR = "CPU Temp         | 45 degrees C      | ok\nFAN 1            | no reading        | ns\n"


def monitors_of(profile: Path) -> list[dict[str, Any]]:
    text = tomllib.loads(profile.read_text())
    tables = [text.get("settings", {}), *(each["settings"] for each in text.get("when", ()))]
    return [each for table in tables for each in table.get("monitors", {}).get("monitor", ())]


MONITORS = {each["id"]: each for path in sorted(BUNDLED.glob("*.toml")) for each in monitors_of(path)}


def test_profiles_name_programs_that_are_installed_and_the_same_for_the_same_id() -> None:
    for path in sorted(BUNDLED.glob("*.toml")):
        for each in monitors_of(path):
            [command] = each["command"]
            assert Path(command).parent == SHARE / "examples"
            assert os.access(EXAMPLES / Path(command).name, os.X_OK)
            assert each == MONITORS[each["id"]]
    assert MONITORS.keys() == {"bmc", "gpu", "steal", "tegra", "throttled"}


def tool(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


async def said(folder: Path, name: str, **more: Any) -> dict[str, tuple[str, str | None, dict[str, Any]]]:
    """By step: how it ended, its text, its numbers."""
    given = MONITORS[name]
    env = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SYS": str(folder / "sys"), "PROC": str(folder / "proc")}
    program = (str(EXAMPLES / Path(given["command"][0]).name),)
    with_env = monitor(
        program, steps=tuple(given["steps"]), on_error=given.get("on_error", "stop"), env=env, **more
    )  # fmt: skip
    async with house(folder, with_env) as here:
        return {step.step: (step.state, step.text, step.metadata) for step in await here.run_once()}


GPU = "0, 45, 17, 400, Not Active, 0\n1, 88, 99, 15000, {}, {}"


@pytest.mark.parametrize(
    ("slow", "faults", "state", "text"),
    [
        ("Not Active", "[N/A]", "ok", None),
        ("Active", "0", "error", "GPU 1 is slowed down by its hardware at 88 C;"),
        ("Not Active", "3", "error", "GPU 1 has 3 uncorrected memory errors;"),
    ],
)
async def test_gpu(tmp_path: Path, slow: str, faults: str, state: str, text: str | None) -> None:
    tool(tmp_path / "bin", "nvidia-smi", f"cat <<E\n{GPU.format(slow, faults)}\nE")
    numbers = {"temp0": 45, "use0": 17, "memory0": 400, "temp1": 88, "use1": 99, "memory1": 15000}
    assert await said(tmp_path, "gpu") == {"Gpus": (state, text, numbers)}


async def test_a_tool_that_fails_says_why(tmp_path: Path) -> None:
    tool(tmp_path / "bin", "nvidia-smi", "echo 'NVIDIA-SMI has failed: no driver' >&2; exit 9")
    [(state, text, _)] = (await said(tmp_path, "gpu")).values()
    assert (state, "no driver" in (text or "")) == ("error", True)


@pytest.mark.parametrize(
    ("used", "sensor", "sel", "sensors"),
    [
        (40, "ok", ("ok", None), ("ok", None)),
        (95, "cr", ("error", "the event log is 95 % full; save it, then: ipmitool sel clear"),
         ("error", "PSU 2 is 0 Watts; PSU 3 is 1 Watts")),
    ],
)  # fmt: skip
async def test_bmc(tmp_path: Path, used: int, sensor: str, sel: tuple[str, str], sensors: tuple[str, str]) -> None:
    listed = f"{SDR}PSU 2            | 0 Watts           | {sensor}\nPSU 3            | 1 Watts           | {sensor}"
    tool(
        tmp_path / "bin", "ipmitool",
        f"case $* in 'sel info') cat <<E\n{SEL.format(used)}E\n;; 'sdr list') cat <<E\n{listed}\nE\n;; *) exit 7; esac",
    )  # fmt: skip
    assert await said(tmp_path, "bmc") == {
        "Sel": (*sel, {"entries": 12, "used": used}),
        "Sensors": (*sensors, {"sensors": 4}),
    }


@pytest.mark.parametrize(
    ("bits", "state", "text"),
    [("0x50000", "ok", None), ("0x50005", "error", "now: under-voltage; throttled")],
)
@pytest.mark.parametrize("is_file", [True, False], ids=["sysfs", "vcgencmd"])
async def test_throttled(tmp_path: Path, bits: str, state: str, text: str | None, is_file: bool) -> None:
    put(tmp_path / "sys/class/thermal/thermal_zone0/temp", "61234\n")
    if is_file:
        put(tmp_path / "sys/devices/platform/soc/soc:firmware/get_throttled", f"{bits.removeprefix('0x')}\n")
    else:
        tool(tmp_path / "bin", "vcgencmd", f"[ $1 = get_throttled ] && echo throttled={bits}")
    assert await said(tmp_path, "throttled") == {"Throttled": (state, text, {"throttled": bits, "temp": 61})}


async def test_tegra(tmp_path: Path) -> None:
    line = "11-22-2026 08:00:00 RAM 2459/15389MB (lfb 4x4MB) SWAP 0/7694MB CPU [2%@729,off] GR3D_FREQ 7% cpu@41.8C"
    tool(tmp_path / "bin", "tegrastats", f"while :; do echo '{line}'; sleep 0.1; done")
    for n, (kind, millis) in enumerate((("cpu-thermal", "41800"), ("gpu-thermal", "97000"))):
        put(tmp_path / f"sys/class/thermal/thermal_zone{n}/type", f"{kind}\n")
        put(tmp_path / f"sys/class/thermal/thermal_zone{n}/temp", f"{millis}\n")
    (tmp_path / "sys/class/thermal/thermal_zone2").mkdir()  # one that is off
    temperatures = {"cpu_thermal": 41, "gpu_thermal": 97}
    assert await said(tmp_path, "tegra") == {
        "Tegrastats": ("ok", None, {"memory": 2459, "gpu": 7}),
        "Thermal": ("error", "gpu-thermal has 97 C;", temperatures),
    }
    assert (await said(tmp_path, "tegra", config={"Limit": "99"}))["Thermal"] == ("ok", None, temperatures)


async def test_steal(tmp_path: Path) -> None:
    """The second look is at what the first one has put there."""
    put(tmp_path / "proc/stat", "cpu  100 0 100 800 0 0 0 0 0 0\n")
    tool(tmp_path / "bin", "sleep", f'[ "$1" = 1 ] && echo "cpu  150 0 110 900 0 0 0 40 0 0" >{tmp_path}/proc/stat')
    taken = await said(tmp_path, "steal", config={"Seconds": "1"})
    assert taken == {"Steal": ("error", "the host took 20 % of the time", {"steal": 20})}
    tool(tmp_path / "bin", "sleep", "exit 0")
    assert await said(tmp_path, "steal") == {"Steal": ("ok", None, {"steal": 0})}
