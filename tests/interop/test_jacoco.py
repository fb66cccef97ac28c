"""The source `jacoco` against Debian's libjacoco-java, in a real JVM: its own dump has the same probes."""

import os
import subprocess
import zipfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from agent.core.lines import Lines
from agent.core.process import Child, Spec, drain, environ, open_child
from agent.coverage.catalog import Catalog, Delta
from agent.coverage.jacoco import Executed, Reader
from agent.coverage.settings import CoverageSettings
from agent.coverage.sources.jacoco import Jacoco
from tests.interop.conftest import PeerAbsent

pytestmark = pytest.mark.interop

JARS = Path("/usr/share/java")

PRODUCT = """
package com.acme;

public class Valve {
    static int turns;

    static void open(int by) {
        if (by > 10) {
            throw new IllegalArgumentException();
        }
        turns += by > 5 ? 5 : by;
    }

    static class Leak {
        int drops = 1;
        int drip() { return drops > 0 && turns > 0 ? drops++ : 0; }
    }

    public static void turn(String how) {
        switch (how) {
            case "open": open(3); break;
            case "wide": open(7); break;
            case "leak": new Leak().drip(); break;
            case "lambda": java.util.stream.IntStream.range(0, 3).map(i -> i * turns).sum(); break;
        }
    }
}
"""
# Reads a word a line, does what it says, and answers; itself it is not covered. "dump" is JaCoCo's, inside of the JVM.
MAIN = """
import java.nio.file.*;
import java.util.Scanner;

public class Main {
    public static void main(String[] args) throws Exception {
        Object agent = Class.forName("org.jacoco.agent.rt.RT").getMethod("getAgent").invoke(null);
        var data = Class.forName("org.jacoco.agent.rt.IAgent").getMethod("getExecutionData", boolean.class);
        Scanner words = new Scanner(System.in);
        while (words.hasNextLine()) {
            String word = words.nextLine();
            if (word.equals("dump")) Files.write(Paths.get(args[0]), (byte[]) data.invoke(agent, false));
            else com.acme.Valve.turn(word);
            System.out.println("done");
        }
    }
}
"""
# JaCoCo's own client, and its own reader of exec files.
DUMP = """
import org.jacoco.core.tools.ExecDumpClient;
import org.jacoco.core.tools.ExecFileLoader;
import java.io.File;

public class Dump {
    public static void main(String[] args) throws Exception {
        if (args.length > 1) {
            ExecDumpClient client = new ExecDumpClient();
            client.setReset(false);
            client.dump("127.0.0.1", Integer.parseInt(args[1])).save(new File(args[0]), false);
        }
        ExecFileLoader loader = new ExecFileLoader();
        loader.load(new File(args[0]));
        loader.getExecutionDataStore().getContents().forEach(data -> {
            StringBuilder flags = new StringBuilder();
            for (boolean probe : data.getProbes()) flags.append(probe ? '1' : '0');
            System.out.println(Long.toHexString(data.getId()) + " " + data.getName() + " " + flags);
        });
    }
}
"""


def find_jar(name: str) -> Path:
    if not (JARS / name).exists():
        raise PeerAbsent(f"no {JARS / name}; packaging/deps peers installs it")
    return JARS / name


class Jvm:
    """The product in a JVM with JaCoCo's agent."""

    def __init__(self, child: Child, folder: Path, core: Path) -> None:
        self._child, self._folder, self._core = child, folder, core
        self.stderr = bytearray()
        self._lines = Lines(100)
        self._did, self._done = trio.open_memory_channel[bytes](10)
        self.port = 0

    async def hear(self) -> None:
        def feed(data: bytes) -> None:
            for line in self._lines.feed(data):
                self._did.send_nowait(line)

        await drain(self._child.streams["stdout"], feed)

    async def do(self, word: str) -> None:
        """Have it do something, and wait until it is done."""
        assert self._child.stdin is not None
        await self._child.stdin.send_all(f"{word}\n".encode())
        with trio.fail_after(60):
            assert await self._done.receive() == b"done"

    def find_port(self) -> None:
        """Where its agent listens, of all that it has open."""
        open_files = {os.readlink(path) for path in Path(f"/proc/{self._child.pid}/fd").iterdir()}
        tables = [Path(f"/proc/{self._child.pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
        rows = [row.split() for table in tables for row in table.splitlines()[1:]]
        (address,) = [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in open_files]
        self.port = int(address.rpartition(":")[2], 16)

    async def end(self) -> None:
        """It has read all its words, and ends by itself."""
        assert self._child.stdin is not None
        await self._child.stdin.aclose()
        with trio.fail_after(60):
            await self._child.wait()

    async def dumped(self) -> list[Executed]:
        """What JaCoCo itself has seen by now; its exec file is read by its own reader, and by ours."""
        await self.do("dump")
        found = await self.told()
        exec_file = (self._folder / "own.exec").read_bytes()
        ours = [event for event in Reader().feed(exec_file) if isinstance(event, Executed)]
        assert sorted(ours, key=lambda each: each.id) == sorted(found, key=lambda each: each.id)
        return [each for each in found if each.probes]

    async def told(self, *port: str) -> list[Executed]:
        """What JaCoCo's own reader finds in the exec file, which its own client has fetched from a port."""
        classpath = f"{self._core}:{self._folder}"
        argv: list[str | Path] = ["java", "-cp", classpath, "Dump", self._folder / "own.exec", *port]
        done = await trio.run_process(argv, capture_stdout=True)
        rows = [line.split() for line in done.stdout.decode().splitlines()]
        return [Executed(int(row[0], 16), row[1], len(row[2]), int(row[2][::-1], 2)) for row in rows]


@asynccontextmanager
async def jvm_of(folder: Path, peer: Callable[..., Path], peer_command: Callable[[str], Path]) -> AsyncIterator[Jvm]:
    core = peer(find_jar, "org.jacoco.core.jar")
    with zipfile.ZipFile(peer(find_jar, "org.jacoco.agent.jar")) as jar:
        agent = jar.extract("jacocoagent.jar", folder)
    sources = {"Valve.java": PRODUCT, "Main.java": MAIN, "Dump.java": DUMP}
    for name, text in sources.items():
        (folder / name).write_text(text)
    # This JaCoCo knows classes up to Java 15.
    argv: list[str | Path] = [peer_command("javac"), "--release", "11", "-cp", core, "-d", folder]
    argv += [folder / name for name in sources]
    await trio.to_thread.run_sync(lambda: subprocess.run(argv, check=True, timeout=120))
    spec = Spec(
        argv=(
            *("java", f"-javaagent:{agent}=output=tcpserver,address=127.0.0.1,port=0,includes=com.acme.*"),
            *("-cp", str(folder), "Main", str(folder / "own.exec")),
        ),
        cwd=folder,
        env=environ(os.environ),
        mark=f"jacoco-{os.getpid()}",
        stdin=True,
    )
    async with open_child(spec) as child, trio.open_nursery() as nursery:
        jvm = Jvm(child, folder, core)
        nursery.start_soon(jvm.hear)
        nursery.start_soon(drain, child.streams["stderr"], jvm.stderr.extend)
        await jvm.do("nothing")
        jvm.find_port()
        yield jvm
        await child.kill()


async def test_covered_probes_are_those_of_jacocos_own_dump(
    peer: Callable[..., Path], peer_command: Callable[[str], Path], tmp_path: Path
) -> None:
    peer_command("java")
    async with jvm_of(tmp_path, peer, peer_command) as jvm:
        catalog = Catalog()
        source = Jacoco(CoverageSettings(jacoco=(f"127.0.0.1:{jvm.port}",)), catalog, tmp_path)
        await source.start()
        for word in ("open", "leak", "lambda"):
            await jvm.do(word)
            theirs = {each.name: each for each in await jvm.dumped()}
            found = {delta.class_id: delta.probes for delta in await source.collect()}
            assert found == {name: each.probes for name, each in theirs.items()}
            for name, each in theirs.items():
                assert catalog.units[name].probe_count == each.count
                assert catalog.units[name].methods[0].checksum == f"{each.id:016x}"
        assert sorted(catalog.units) == ["com/acme/Valve", "com/acme/Valve$Leak"]
        assert source.alive()
        # Another who asks it gets a turn.
        has_had_it = trio.Event()
        async with trio.open_nursery() as nursery:
            with trio.fail_after(60):
                nursery.start_soon(collect_until, has_had_it, source)
                await jvm.told(str(jvm.port))
            has_had_it.set()
        await heard_of(source)
        # What it runs until it ends by itself is not lost.
        await jvm.do("wide")
        (theirs_last,) = await jvm.dumped()
        await jvm.end()
        assert await source.collect(final=True) == [Delta("com/acme/Valve", theirs_last.probes)]
        assert not source.alive()
        assert (source.told(), source.why_empty(), bytes(jvm.stderr)) == ([], "", b"")
    await source.stop()


async def heard_of(source: Jacoco) -> None:
    """Wait until the JVM's agent has taken our connection: it begins with its header."""
    (agent,) = source._agents
    assert agent._stream is not None
    with trio.fail_after(60):
        await trio.lowlevel.wait_readable(agent._stream.socket)


async def collect_until(event: trio.Event, source: Jacoco) -> None:
    while not event.is_set():
        await source.collect()


async def test_a_jvm_that_is_killed_is_told_of(
    peer: Callable[..., Path], peer_command: Callable[[str], Path], tmp_path: Path
) -> None:
    peer_command("java")
    async with jvm_of(tmp_path, peer, peer_command) as jvm:
        source = Jacoco(CoverageSettings(jacoco=(f"127.0.0.1:{jvm.port}",)), Catalog(), tmp_path)
        await source.start()
        await heard_of(source)
        await jvm.do("open")
    assert await source.collect(final=True) == []
    assert not source.alive()
    (warned,) = source.told()
    assert "it has ended; what it ran last is not known" in str(warned)
    await source.stop()
