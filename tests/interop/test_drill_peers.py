"""Drill's own packages against the lab's admin: its client of the HTTP side, and its types.

`@drill4j/js-auto-test-agent` drives a browser through a devtools proxy; here the proxy is in Node itself, and the
product runs in the same process under the same profiler.
"""

import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.drill_house import CALC, admin, agent_of, methods_reached
from tests.test_lab_drill import attached
from tests.test_lab_server import client_of, lab_in

pytestmark = pytest.mark.interop

CLIENT = "@drill4j/js-auto-test-agent@0.1.0"
TYPES = "@drill4j/types-admin@1.1.1"

DRIVER = """\
const http = require('node:http');
const inspector = require('node:inspector');
const {Drill} = require('@drill4j/js-auto-test-agent');

const devtools = new inspector.Session();
devtools.connect();
const post = (method, params) => new Promise((resolve, reject) =>
	devtools.post(method, params, (error, result) => error ? reject(error) : resolve(result)));
const scripts = [];
devtools.on('Debugger.scriptParsed', ({params}) => scripts.push(params));

async function answer(url, body) {
	if (url === '/connection' || url === '/event/Debugger.scriptParsed') return {};
	if (url === '/event/Debugger.scriptParsed/get-data') return scripts;
	if (url === '/command/Target.getTargets') return {targetInfos: [{type: 'page', targetId: '1', url: 'http://app'}]};
	if (url === '/command/Target.attachToTarget') return {sessionId: '1'};
	return post(url.replace('/command/', ''), body.params);
}

const proxy = http.createServer((request, response) => {
	let text = '';
	request.on('data', piece => text += piece);
	request.on('end', async () => response.end(JSON.stringify(await answer(request.url, JSON.parse(text)))));
});

proxy.listen(0, '127.0.0.1', async () => {
	const [adminUrl, agentId, product] = process.argv.slice(2);
	const devtoolsProxyUrl = `http://127.0.0.1:${proxy.address().port}`;
	const drill = new Drill({adminUrl, agentId, devtoolsProxyUrl, webSocketDebuggerUrl: 'ws://app', targetHost: 'app'});
	try {
		await drill.ready();
		await drill.startSession('AUTO', false);
		const test = {testName: 'adds', params: {}, metadata: {}};
		await drill.startTest(test);
		require(product).add(1, 2);
		await drill.stopTest(test, 'PASSED', 1, 2);
		await drill.stopSession();
		console.log('done');
	} catch (error) {
		console.log(`failed: ${error.message}`);
	}

	process.exit(0);
});
"""


async def test_drills_own_client_gives_coverage_to_a_session(
    npm_project: Callable[..., Path], node: Path, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "calc.js").write_text(CALC)
    packages = npm_project(CLIENT, TYPES) / "node_modules"

    driver = tmp_path / "driver.cjs"
    driver.write_text(DRIVER)

    async def drive(url: str, ident: str) -> str:
        argv = [str(node), str(driver), url, ident, str(project / "calc.js")]
        run = partial(trio.run_process, argv, capture_stdout=True, env={"NODE_PATH": str(packages)})
        with trio.fail_after(60):
            done = await run()
        return done.stdout.decode().strip()

    async with admin(tmp_path / "lab") as user, agent_of(user.lab, tmp_path / "agent", project):
        await user.online()
        assert await drive(user.lab.url, "lab-08") == "failed: no agent 'lab-08' has attached"
        assert await drive(user.lab.url, "lab-07") == "done"
        (session,) = user.lab.drill.agents["lab-07"].plugin.sessions
        shown = await user.finished(session)
        (reached,) = methods_reached(user.lab, shown)["./calc.js"].values()
        assert "exports.unused" not in reached
        assert any("add" in name for name in reached), reached


async def test_what_the_api_shows_has_drills_types(
    npm_project: Callable[..., Path], node: Path, tmp_path: Path
) -> None:
    packages = npm_project(CLIENT, TYPES) / "node_modules"
    async with lab_in(tmp_path / "lab") as lab, attached(lab) as agent, client_of(lab) as client:
        await agent.until(lambda: len(agent.heard) >= 2)
        waiting = (await client.get("/api/agents/lab-07")).json()
        registered = (await client.post("/api/agents/lab-07", json={"name": "Lab 7"})).json()
    lines = ["import type {ActiveAgentsBuild, Agent} from '@drill4j/types-admin';"]
    for shown in (waiting, registered):
        build = {"agentId": shown["id"], "build": shown.pop("build")}
        lines.append(f"export const agent{len(lines)}: Agent = {json.dumps(shown)};")
        lines.append(f"export const build{len(lines)}: ActiveAgentsBuild = {json.dumps(build)};")
    (tmp_path / "node_modules").symlink_to(packages)
    compiled = partial(tsc, node, packages, tmp_path)
    assert compiled("\n".join(lines)) == ""
    assert "TS2322" in compiled(f"{lines[0]} export const agent: Agent = {{status: 'ONLINE'}};")  # so it does look


def tsc(node: Path, packages: Path, folder: Path, text: str) -> str:
    """What the compiler complains of."""
    (folder / "check.ts").write_text(text)
    argv = [str(node), str(packages / "typescript/bin/tsc"), "--noEmit", "--strict", "--skipLibCheck", "check.ts"]
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=120).stdout
