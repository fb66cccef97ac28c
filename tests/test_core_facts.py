"""Facts are read from any tree, and what cannot be read is absent."""

import os
from pathlib import Path

import pytest

from agent.core.facts import NAMES, detect


def write(root: Path, path: str, text: str = "") -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def link(root: Path, path: str, to: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).symlink_to(to)


def test_an_empty_tree_has_no_facts_but_those_of_the_process(tmp_path: Path) -> None:
    assert detect(tmp_path).keys() <= {"arch", "libc"}
    assert detect(tmp_path)["arch"] == os.uname().machine


def test_a_server(tmp_path: Path) -> None:
    write(tmp_path, "proc/sys/kernel/arch", "x86_64\n")
    write(tmp_path, "proc/sys/kernel/osrelease", "5.14.0-427.el9.x86_64\n")
    write(tmp_path, "etc/os-release", 'NAME="Red Hat"\nID="rhel"\nVERSION_ID="9.4"\n')
    write(tmp_path, "proc/1/comm", "systemd\n")
    core = "vendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R) Gold 6130\nflags\t\t: sse2 avx2\n\n"
    write(tmp_path, "proc/cpuinfo", core * 2)
    write(tmp_path, "sys/devices/system/cpu/online", "0-30,32\n")
    write(tmp_path, "proc/meminfo", "MemTotal:       131072000 kB\nMemFree: 1 kB\n")
    write(tmp_path, "sys/class/dmi/id/sys_vendor", "Dell Inc.\n")
    write(tmp_path, "sys/class/dmi/id/product_name", "PowerEdge R640\n")
    write(tmp_path, "sys/class/dmi/id/board_name", "\n")
    link(tmp_path, "sys/class/net/eno1/device/driver", "../../../../bus/pci/drivers/tg3")
    link(tmp_path, "sys/class/net/eno2/device/driver", "../../../../bus/pci/drivers/tg3")
    write(tmp_path, "sys/class/net/lo/mtu", "65536")
    for slot in ("0000:01:00.0", "0000:01:00.1"):
        write(tmp_path, f"sys/bus/pci/devices/{slot}/vendor", "0x14e4\n")
        write(tmp_path, f"sys/bus/pci/devices/{slot}/device", "0x165f\n")
    write(tmp_path, "sys/bus/usb/devices/1-1/idVendor", "1a86\n")
    write(tmp_path, "sys/bus/usb/devices/1-1/idProduct", "7523\n")
    write(tmp_path, "sys/bus/usb/devices/1-1:1.0/bInterfaceNumber", "00\n")
    for name in ("ipmi0", "ttyUSB0", "null", "tty7", "loop3", "vcs1"):
        write(tmp_path, f"dev/{name}")
    (tmp_path / "dev/disk").mkdir()
    link(tmp_path, "dev/stdin", "/proc/self/fd/0")
    write(tmp_path, "proc/self/mountinfo", "30 1 8:2 / / rw,relatime shared:1 - xfs /dev/root rw\n")
    link(tmp_path, "sys/dev/block/8:2", "../../devices/pci0000:00/ata1/block/sda/sda2")
    found = detect(tmp_path)
    found.pop("libc", None)
    assert found == {
        "arch": "x86_64",
        "kernel": "5.14.0-427.el9.x86_64",
        "os.id": "rhel",
        "os.version": "9.4",
        "init": "systemd",
        "cpu.vendor": "GenuineIntel",
        "cpu.model": "Intel(R) Xeon(R) Gold 6130",
        "cpu.cores": 32,
        "cpu.flags": ("avx2", "sse2"),
        "memory_mib": 128000,
        "dmi.sys_vendor": "Dell Inc.",
        "dmi.product_name": "PowerEdge R640",
        "nic.drivers": ("tg3",),
        "pci": ("14e4:165f",),
        "usb": ("1a86:7523",),
        "devices": ("/dev/ipmi0", "/dev/ttyUSB0"),
        "storage.root": "sda2",
    }
    assert list(found) == [name for name in NAMES if name in found]


def test_a_board(tmp_path: Path) -> None:
    write(tmp_path, "proc/device-tree/model", "Raspberry Pi 4 Model B Rev 1.4\0")
    write(tmp_path, "proc/device-tree/compatible", "raspberrypi,4-model-b\0brcm,bcm2711\0")
    write(tmp_path, "usr/lib/os-release", "ID=debian\n")
    (tmp_path / "run/openrc").mkdir(parents=True)
    found = detect(tmp_path)
    assert found["dt.model"] == "Raspberry Pi 4 Model B Rev 1.4"
    assert found["dt.compatible"] == ("raspberrypi,4-model-b", "brcm,bcm2711")
    assert (found["os.id"], found["init"]) == ("debian", "openrc")


@pytest.mark.parametrize(
    ("path", "text", "hypervisor"),
    [
        ("sys/devices/system/clocksource/clocksource0/available_clocksource", "tsc kvm-clock acpi_pm \n", "kvm"),
        (
            "sys/devices/system/clocksource/clocksource0/available_clocksource",
            "hyperv_clocksource_tsc_page\n",
            "hyperv",
        ),
        ("sys/hypervisor/type", "xen\n", "xen"),
        ("sys/class/dmi/id/sys_vendor", "VMware, Inc.\n", "vmware"),
        ("proc/cpuinfo", "flags : fpu hypervisor sse\n", "unknown"),
        ("proc/cpuinfo", "flags : fpu sse\n", None),
    ],
)
def test_the_hypervisor(tmp_path: Path, path: str, text: str, hypervisor: str | None) -> None:
    write(tmp_path, path, text)
    assert detect(tmp_path).get("hypervisor") == hypervisor


@pytest.mark.parametrize(
    ("path", "text", "container"),
    [("run/systemd/container", "lxc\n", "lxc"), (".dockerenv", "", "docker"), ("run/.containerenv", "", "podman")],
)
def test_the_container(tmp_path: Path, path: str, text: str, container: str) -> None:
    write(tmp_path, path, text)
    assert detect(tmp_path)["container"] == container


def test_nonsense_and_what_may_not_be_read_is_absent(tmp_path: Path) -> None:
    for path in ("sys/devices/system/cpu/online", "proc/meminfo", "proc/self/mountinfo", "etc/os-release"):
        write(tmp_path, path, "\xff\0=\n:,-- x 30 1 / / - \n")
    (tmp_path / "proc/cpuinfo").mkdir()
    write(tmp_path, "sys/bus/pci/devices/0000:00:00.0/vendor", "0x8086")
    assert detect(tmp_path).keys() <= {"arch", "libc"}


def test_this_machine_has_the_facts_that_every_linux_has() -> None:
    assert {"arch", "kernel", "cpu.cores", "memory_mib"} <= detect().keys()
