"""What machine this is: facts for hardware profiles, from /proc, /sys, /dev and /etc.

A fact that cannot be read is absent, never an error: microVMs have neither DMI nor device tree.

Source: protocols/packaging.md 5.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

Fact: TypeAlias = str | int | tuple[str, ...]
Facts: TypeAlias = Mapping[str, Fact]
"""By name, in the order of NAMES. Lists are sorted; `pci` and `usb` are "vendor:device" in hex, `devices` paths."""

NUMBERS = ("cpu.cores", "memory_mib")
NAMES = (
    *("arch", "kernel", "os.id", "os.version", "libc", "init", "container", "hypervisor"),
    *("cpu.vendor", "cpu.model", "cpu.cores", "cpu.flags", "memory_mib"),
    *("dmi.sys_vendor", "dmi.product_name", "dmi.product_family", "dmi.board_vendor", "dmi.board_name"),
    *("dmi.bios_version", "dmi.chassis_type", "dt.model", "dt.compatible"),
    *("nic.drivers", "pci", "usb", "devices", "storage.root"),
)

_MAX = 64 * 1024  # bytes of a file: /proc/cpuinfo repeats itself for each core
_EVERY_MACHINE = re.compile(r"tty\d*|vcs.*|loop[\d-].*|ram\d+|zram\d+|pt.*|null|zero|full|u?random|console|mem|port")


def detect(root: Path = Path("/")) -> dict[str, Fact]:
    """The facts of the machine whose file system is at `root`."""
    cpu = _cpuinfo(root)
    release = _os_release(root)
    found: dict[str, Fact | None] = {
        "arch": _text(root / "proc/sys/kernel/arch") or os.uname().machine,  # the file is there since Linux 6.1
        "kernel": _text(root / "proc/sys/kernel/osrelease"),
        "os.id": release.get("ID"),
        "os.version": release.get("VERSION_ID"),
        "libc": _libc(root),
        "init": _init(root),
        "container": _container(root),
        "cpu.vendor": cpu.get("vendor_id") or cpu.get("CPU implementer"),
        "cpu.model": cpu.get("model name") or cpu.get("Model") or cpu.get("Hardware"),
        "cpu.cores": _cores(root),
        "cpu.flags": tuple(sorted((cpu.get("flags") or cpu.get("Features") or "").split())),
        "memory_mib": _memory_mib(root),
        **{name: _text(root / "sys/class/dmi/id" / name[4:]) for name in NAMES if name.startswith("dmi.")},
        "dt.model": _text(root / "proc/device-tree/model"),
        "dt.compatible": tuple(filter(None, (_text(root / "proc/device-tree/compatible") or "").split("\0"))),
        "nic.drivers": _set(_driver(nic) for nic in _listed(root / "sys/class/net")),
        "pci": _set(map(_pci, _listed(root / "sys/bus/pci/devices"))),
        "usb": _set(map(_usb, _listed(root / "sys/bus/usb/devices"))),
        "devices": tuple(_devices(root)),
        "storage.root": _root_device(root),
    }
    found["hypervisor"] = _hypervisor(root, found)
    return {name: fact for name in NAMES if (fact := found[name])}


def _text(path: Path) -> str | None:
    """What a small file says, without what ends it."""
    try:
        with path.open("rb") as file:
            return file.read(_MAX).decode(errors="replace").strip("\0\n ") or None
    except OSError:
        return None


def _listed(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in sorted(os.listdir(folder))]
    except OSError:
        return []


def _set(found: Iterator[str | None]) -> tuple[str, ...]:
    return tuple(sorted({text for text in found if text}))


def _cpuinfo(root: Path) -> dict[str, str]:
    """Of the first core, and what stands once for the board."""
    facts: dict[str, str] = {}
    for line in (_text(root / "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    return facts


def _cores(root: Path) -> int | None:
    """From a list as "0-3,6"."""
    online = _text(root / "sys/devices/system/cpu/online") or ""
    try:
        ranges = [[int(number) for number in part.split("-")] for part in online.split(",") if part]
    except ValueError:
        return None
    return sum(numbers[-1] - numbers[0] + 1 for numbers in ranges)


def _memory_mib(root: Path) -> int | None:
    found = re.search(r"^MemTotal:\s*(\d+) kB", _text(root / "proc/meminfo") or "", re.MULTILINE)
    return int(found[1]) // 1024 if found else None


def _os_release(root: Path) -> dict[str, str]:
    text = _text(root / "etc/os-release") or _text(root / "usr/lib/os-release") or ""
    pairs = (line.partition("=") for line in text.splitlines())
    return {name.strip(): value.strip().strip("\"'") for name, _, value in pairs}


def _libc(root: Path) -> str | None:
    """ "glibc 2.36", "musl"."""
    if any(root.glob("lib/ld-musl-*")):
        return "musl"
    try:
        return os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError):
        return None


def _init(root: Path) -> str | None:
    if (root / "run/systemd/system").is_dir():
        return "systemd"
    return "openrc" if (root / "run/openrc").is_dir() else _text(root / "proc/1/comm")


def _container(root: Path) -> str | None:
    if named := _text(root / "run/systemd/container"):
        return named
    if (root / ".dockerenv").exists():
        return "docker"
    return "podman" if (root / "run/.containerenv").exists() else None


def _hypervisor(root: Path, facts: Mapping[str, Fact | None]) -> str | None:
    clocks = _text(root / "sys/devices/system/clocksource/clocksource0/available_clocksource") or ""
    if "kvm-clock" in clocks.split():
        return "kvm"
    if named := _text(root / "sys/hypervisor/type"):
        return named
    if "hyperv_clocksource" in clocks:
        return "hyperv"
    vendors = {"VMware, Inc.": "vmware", "innotek GmbH": "virtualbox", "QEMU": "qemu"}
    if named := vendors.get(str(facts["dmi.sys_vendor"])):
        return named
    flags = facts["cpu.flags"]
    return "unknown" if isinstance(flags, tuple) and "hypervisor" in flags else None


def _driver(nic: Path) -> str | None:
    try:
        return Path(os.readlink(nic / "device/driver")).name
    except OSError:  # a virtual interface has none
        return None


def _pci(device: Path) -> str | None:
    vendor, product = _text(device / "vendor"), _text(device / "device")
    return f"{vendor}:{product}".replace("0x", "") if vendor and product else None


def _usb(device: Path) -> str | None:
    vendor, product = _text(device / "idVendor"), _text(device / "idProduct")
    return f"{vendor}:{product}" if vendor and product else None  # an interface of a device has neither


def _devices(root: Path) -> Iterator[str]:
    """What is directly in /dev, but for folders, links and what every machine has."""
    try:
        entries = sorted(os.scandir(root / "dev"), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if not (entry.is_symlink() or entry.is_dir() or _EVERY_MACHINE.fullmatch(entry.name)):
            yield f"/dev/{entry.name}"


def _root_device(root: Path) -> str | None:
    """What is mounted at /: "mmcblk0p2", or "overlay" where that is no device."""
    for line in reversed((_text(root / "proc/self/mountinfo") or "").splitlines()):
        mount, _, filesystem = line.partition(" - ")
        fields, source = mount.split(), filesystem.split()
        if len(fields) > 4 and fields[4] == "/" and len(source) > 1:
            try:  # the source may be "/dev/root"
                return Path(os.readlink(root / "sys/dev/block" / fields[2])).name
            except OSError:
                return source[1].removeprefix("/dev/")
    return None
